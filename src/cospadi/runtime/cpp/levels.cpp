// y = ((x u) N^T) v for small integers N: the C interface, and plain C++ for any machine.
#include "levels.h"

#include "parallel.h"
#include "rows.h"
#include "tiles.h"

namespace cospadi {
namespace {

// Eight levels fill a byte for each of their bits.
constexpr int EIGHT = 8;

// 32 levels of a row from input i on.
inline void load(const uint8_t* row, int bits, int i, int8_t* to) {
  const uint64_t mask = (1u << bits) - 1, sign = 1u << (bits - 1);
  for (int q = 0; q < ATOMS; q += EIGHT) {
    uint64_t word;
    std::memcpy(&word, row + (i + q) / EIGHT * bits, sizeof(word));
    for (int b = 0; b < EIGHT; ++b) to[q + b] = static_cast<int8_t>(((word >> b * bits & mask) ^ sign) - sign);
  }
}

template <class Entry, class Convert>
void unpack(const LevelRows& levels, int inputs, Entry* out, Convert convert) {
  int8_t some[ATOMS];
  for (int c = 0; c < levels.count; ++c, out += inputs) {
    for (int i = 0; i < inputs; i += ATOMS) {
      load(levels.row(c), levels.bits(c), i, some);
      for (int j = i; j < std::min(inputs, i + ATOMS); ++j) out[j] = convert(some[j - i]);
    }
  }
}

// Calls some(BITS), which then is a constant.
template <class Some>
void with_bits(int bits, const Some& some) {
  switch (bits) {
    case 2: return some(std::integral_constant<int, 2>());
    case 3: return some(std::integral_constant<int, 3>());
    case 4: return some(std::integral_constant<int, 4>());
    case 5: return some(std::integral_constant<int, 5>());
    case 6: return some(std::integral_constant<int, 6>());
    case 7: return some(std::integral_constant<int, 7>());
    default: return some(std::integral_constant<int, 8>());
  }
}

// The largest and the smallest level that BITS hold; -128 is none.
template <int BITS>
constexpr int16_t MOST = (1 << (BITS - 1)) - 1;
template <int BITS>
constexpr int16_t LEAST = BITS < MOST_BITS ? -MOST<BITS> - 1 : -MOST<BITS>;

// How many of these levels BITS do not hold. Counted in as many bits as a level has, which a compiler vectorizes.
template <int BITS>
int32_t too_large(const int16_t* row, int d1) {
  constexpr int FEW = 1 << 14;
  int32_t count = 0;
  for (int first = 0; first < d1; first += FEW) {
    const int last = std::min(d1, first + FEW);
    int16_t some = 0;
    for (int i = first; i < last; ++i) some += row[i] < LEAST<BITS> || row[i] > MOST<BITS>;
    count += some;
  }
  return count;
}

// The low BITS of eight bytes, one after another: of two neighbours, then of two pairs, then of the two halves.
template <int BITS>
uint64_t squeezed(uint64_t bytes) {
  constexpr uint64_t ONE = (1ull << BITS) - 1, TWO = (1ull << 2 * BITS) - 1, FOUR = (1ull << 4 * BITS) - 1;
  constexpr uint64_t FIRST = ONE * 0x0001000100010001, SECOND = TWO * 0x0000000100000001;
  bytes = (bytes & FIRST) | (bytes >> (8 - BITS) & FIRST << BITS);
  bytes = (bytes & SECOND) | (bytes >> (16 - 2 * BITS) & SECOND << 2 * BITS);
  return (bytes & FOUR) | (bytes >> (32 - 4 * BITS) & FOUR << 4 * BITS);
}

// The nearest level that BITS hold. Without references, with which a compiler would not vectorize it.
template <int BITS>
int16_t held(int16_t level) {
  const int16_t enough = level < LEAST<BITS> ? LEAST<BITS> : level;
  return enough > MOST<BITS> ? MOST<BITS> : enough;
}

// Packs ATOMS levels into `words`, and says whether BITS hold them all.
template <int BITS>
bool pack_some(const int16_t* levels, uint64_t* words) {
  int16_t kept[ATOMS], difference = 0;
  uint8_t low[ATOMS];
  for (int b = 0; b < ATOMS; ++b) kept[b] = held<BITS>(levels[b]);
  for (int b = 0; b < ATOMS; ++b) {
    difference |= levels[b] ^ kept[b];
    low[b] = static_cast<uint8_t>(kept[b]);
  }
  std::memcpy(words, low, sizeof(low));
  for (int q = 0; q < ATOMS / EIGHT; ++q) words[q] = squeezed<BITS>(words[q]);
  return !difference;
}

// Packs a row of levels, and says which ones BITS do not hold, and by how much.
template <int BITS>
void pack_row(const int16_t* row, int d1, uint8_t* to, int32_t* columns, float* rest) {
  for (int i = 0; i < d1; i += ATOMS) {
    const int count = std::min(ATOMS, d1 - i);
    const int16_t* some = row + i;
    int16_t padded[ATOMS] = {};
    if (count < ATOMS) some = std::copy_n(some, count, padded) - count;
    uint64_t words[ATOMS / EIGHT];
    if (!pack_some<BITS>(some, words)) {
      for (int b = 0; b < ATOMS; ++b) {
        const int difference = some[b] - held<BITS>(some[b]);
        if (!difference) continue;
        *columns++ = i + b;
        *rest++ = static_cast<float>(difference);
      }
    }
    for (int q = 0; q < ATOMS / EIGHT; ++q, to += BITS) {
      const bool last = i + ATOMS >= d1 && q + 1 == ATOMS / EIGHT;
      std::memcpy(to, words + q, last ? BITS : sizeof(uint64_t));  // the next ones overwrite what is too much
    }
  }
}

// What is added to some levels, which are too large for their bits: of output j those from offsets[j] on.
struct Rest {
  const int32_t* offsets;
  const int32_t* columns;
  const float* values;
};

template <class Entry>
float number(Entry entry) {
  if constexpr (sizeof(Entry) == 2) {
    return to_float(entry);
  } else {
    return entry;
  }
}

// Inputs of a tile: it stays in the second cache while all rows are multiplied with it.
constexpr int DEEP = 2048;

template <class Entry>
using Multiply = void (*)(const LevelRows&, const Entry*, int, float*);

template <class Entry>
void multiply(const LevelRows& all, Multiply<Entry> multiply_rows, const Rest& rest, const float* outputs,
              const float* inputs, const void* x, void* y, int64_t rows, int d1, int dtype, int threads) {
  const auto batches = in_batches<Entry>(x, rows, d1, dtype, inputs);
  parallel(runs(all.count), threads, [&](int run) {
    const int first = run * RUN;
    const LevelRows levels = all.run(first, std::min(RUN, all.count - first));
    float sums[MAX_ROWS * RUN];
    for (const Rows<Entry>& batch : batches) {
      const int padded_count = batch.padded_count();
      multiply_rows(levels, batch.data(), padded_count, sums);
      for (int c = 0; c < levels.count; ++c) {
        float* sum = sums + c * padded_count;
        for (int32_t e = rest.offsets[first + c]; e < rest.offsets[first + c + 1]; ++e) {
          for (int r = 0; r < padded_count; ++r) {
            sum[r] += number(batch.data()[place_in_z(padded_count, r, rest.columns[e])]) * rest.values[e];
          }
        }
        for (int r = 0; r < padded_count; ++r) sum[r] *= outputs[first + c];
      }
      store_sums(batch, sums, y, all.count, first, levels.count, dtype);
    }
  });
}

}  // namespace

void multiply_levels_portable(const LevelRows& levels, const float* x, int rows, float* sums) {
  with_rows(rows, [&](auto count) {
    constexpr int ROWS = count;
    int8_t some[ATOMS];
    for (int c = 0; c < levels.count; ++c) {
      float partial[ROWS][ATOMS] = {};
      for (int i = 0; i < levels.width; i += ATOMS) {
        load(levels.row(c), levels.bits(c), i, some);
        for (int r = 0; r < ROWS; ++r) {
          for (int j = 0; j < ATOMS; ++j) partial[r][j] += x[place_in_z(ROWS, r, i) + j] * some[j];
        }
      }
      for (int r = 0; r < ROWS; ++r) {
        float sum = 0;
        for (float one : partial[r]) sum += one;
        sums[c * ROWS + r] = sum;
      }
    }
  });
}

void unpack_levels_portable(const LevelRows& levels, int inputs, uint16_t* out) {
  unpack(levels, inputs, out, [](int8_t level) { return to_bf16(level); });
}

void unpack_levels_portable(const LevelRows& levels, int inputs, float* out) {
  unpack(levels, inputs, out, [](int8_t level) { return static_cast<float>(level); });
}

}  // namespace cospadi

using namespace cospadi;

// y (rows, d2) = ((x inputs) N^T) outputs for x (rows, d1), contiguous and of `dtype`; sums are made in float. N (d2, d1)
// is `levels`, in rows as `LevelRows` says, and the rest of those that are too large for so many bits.
EXPORT int cospadi_multiply_levels(const void* x, void* y, int64_t rows, int dtype, const uint8_t* levels,
                                   const int32_t* places, const int32_t* offsets, const int32_t* columns, const float* rest, int d2, int d1,
                                   const float* outputs, const float* inputs, int threads, int level) try {
  const Kernels& kernels = kernels_of(level);
  const LevelRows all{d2, padded(d1), levels, places};
  const Rest beside{offsets, columns, rest};
  if (dtype == BF16 && pays_to_unpack(kernels, rows, TILED_LEVEL_ROWS)) {
    const auto unpack = [&](int first, int count, int begin, int end, uint16_t* tile, size_t stride) {
      kernels.unpack_levels_tile(all.run(first, count), begin, end, tile, stride);
      for (int c = 0; c < count; ++c) {
        for (int32_t e = offsets[first + c]; e < offsets[first + c + 1]; ++e) {
          if (columns[e] < begin || columns[e] >= end) continue;
          uint16_t& entry = tile[place_in_tile(stride, c, columns[e] - begin)];
          entry = to_bf16(to_float(entry) + rest[e]);
        }
      }
    };
    const auto stored = [&](int first, int count) {
      return Ahead{all.row(first), static_cast<size_t>(all.row(first + count) - all.row(first))};
    };
    multiply_through_tiles(kernels, x, inputs, y, rows, d2, d1, outputs, threads, DEEP, unpack, stored);
  } else if (dtype == BF16 && kernels.multiply_levels_bf16) {
    multiply<uint16_t>(all, kernels.multiply_levels_bf16, beside, outputs, inputs, x, y, rows, d1, dtype, threads);
  } else {
    multiply<float>(all, kernels.multiply_levels_float, beside, outputs, inputs, x, y, rows, d1, dtype, threads);
  }
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}

// How many levels of each row (of d2, int16) are too large for LEAST_BITS and so on: counts (widths, d2).
EXPORT void cospadi_count_large(const int16_t* levels, int d2, int d1, int32_t* counts, int threads) {
  parallel(runs(d2), threads, [&](int run) {
    for (int j = run * RUN; j < std::min(d2, (run + 1) * RUN); ++j) {
      const int16_t* row = levels + static_cast<size_t>(j) * d1;
      for (int bits = LEAST_BITS; bits <= MOST_BITS; ++bits) {
        int32_t& count = counts[static_cast<size_t>(bits - LEAST_BITS) * d2 + j];
        with_bits(bits, [&](auto known) { count = too_large<known>(row, d1); });
      }
    }
  });
}

// Levels (d2, d1) in rows as `LevelRows` says, and what is beside them, where `offsets` says.
EXPORT void cospadi_pack_levels(const int16_t* levels, int d2, int d1, uint8_t* packed, const int32_t* places,
                                const int32_t* offsets, int32_t* columns, float* rest, int threads) {
  const LevelRows all{d2, padded(d1), packed, places};
  parallel(runs(d2), threads, [&](int run) {
    for (int j = run * RUN; j < std::min(d2, (run + 1) * RUN); ++j) {
      const int16_t* row = levels + static_cast<size_t>(j) * d1;
      uint8_t* to = packed + (all.row(j) - packed);
      with_bits(all.bits(j), [&](auto known) { pack_row<known>(row, d1, to, columns + offsets[j], rest + offsets[j]); });
    }
  });
}

// Rows `begin` to `end` of N, of `dtype` FLOAT or BF16.
EXPORT void cospadi_unpack_levels(void* out, int dtype, int begin, int end, const uint8_t* levels,
                                  const int32_t* places, const int32_t* offsets, const int32_t* columns,
                                  const float* rest, int d1, int threads, int level) {
  const Kernels& kernels = kernels_of(level);
  const LevelRows all{end, padded(d1), levels, places};
  const auto fill = [&](auto* to, auto unpack_some, auto add) {
    parallel(runs(end - begin), threads, [&](int run) {
      const int first = begin + run * RUN, count = std::min(RUN, end - first);
      auto* own = to + static_cast<size_t>(first - begin) * d1;
      unpack_some(all.run(first, count), d1, own);
      for (int c = 0; c < count; ++c, own += d1) {
        for (int32_t e = offsets[first + c]; e < offsets[first + c + 1]; ++e) add(own[columns[e]], rest[e]);
      }
    });
  };
  if (dtype == BF16) {
    fill(static_cast<uint16_t*>(out), kernels.unpack_levels_bf16,
         [](uint16_t& entry, float more) { entry = to_bf16(to_float(entry) + more); });
  } else {
    fill(static_cast<float*>(out), kernels.unpack_levels_float, [](float& entry, float more) { entry += more; });
  }
}
