// The C interface, which Python calls through ctypes: levels, threads, conversions, and the ends of buffers.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "rows.h"
#include "tiles.h"

namespace cospadi {

Parallel openmp = nullptr;

Room room_of_thread(size_t tile_entries, size_t sum_entries) {
  thread_local std::vector<Line> tile, sums;
  const auto grow = [](std::vector<Line>& lines, size_t bytes) {
    if (lines.size() * sizeof(Line) < bytes) lines.resize((bytes + sizeof(Line) - 1) / sizeof(Line));
    return lines.data();
  };
  return {reinterpret_cast<uint16_t*>(grow(tile, tile_entries * sizeof(uint16_t))),
          reinterpret_cast<float*>(grow(sums, sum_entries * sizeof(float)))};
}

namespace {

const Kernels* const LEVELS[] = {
    &portable_kernels,
#ifdef COSPADI_X86
    &avx2_kernels,
    &avx512_kernels,
#endif
#ifdef COSPADI_AMX
    &amx_kernels(),
#endif
};
constexpr int LEVEL_COUNT = sizeof(LEVELS) / sizeof(LEVELS[0]);

// S with the last columns' values in a copy, after which a kernel may read on.
class Coefficients {
 public:
  Coefficients(const uint8_t* support, const uint8_t* values, size_t value_bytes, const int32_t* offsets, int d2,
               int k, int value_bits)
      : all_{d2, k, value_bits, support, (k + 7) / 8, values, 0, offsets}, tail_(d2) {
    while (tail_ > 0 && (all_.bit(tail_) >> 3) + MARGIN > value_bytes) --tail_;
    // Column tail_ may end closer to the end than that: it begins the copy.
    const size_t first = all_.bit(tail_) >> 3;
    copy_.assign(value_bytes - std::min(first, value_bytes) + MARGIN, 0);
    if (first < value_bytes) std::memcpy(copy_.data(), values + first, value_bytes - first);
  }

  // Calls use(columns, first) for the columns from begin to end, in one part or two.
  template <class Use>
  void in_parts(int begin, int end, const Use& use) const {
    if (begin < tail_) use(part(begin, std::min(end, tail_)), begin);
    if (end > tail_) {
      const int first = std::max(begin, tail_);
      Columns last = part(first, end);
      last.values = copy_.data();
      last.first_bit = all_.bit(tail_) >> 3 << 3;
      use(last, first);
    }
  }

 private:
  Columns part(int begin, int end) const {
    Columns run = all_;
    run.count = end - begin;
    run.support = all_.mask(begin);
    run.offsets = all_.offsets + begin;
    return run;
  }

  Columns all_;
  int tail_;  // columns before it end MARGIN bytes before the stream's end, or earlier
  std::vector<uint8_t> copy_;
};

// Every run of columns is multiplied with all batches of rows while it is in a near cache.
template <class Entry, class Multiply>
void multiply(const Coefficients& s, Multiply multiply_rows, const void* z, void* y, int64_t rows, int d2, int k,
              int dtype, int threads) {
  const auto batches = in_batches<Entry>(z, rows, k, dtype);
  parallel(runs(d2), threads, [&](int run) {
    s.in_parts(run * RUN, std::min((run + 1) * RUN, d2), [&](const Columns& columns, int column) {
      float sums[MAX_ROWS * RUN];
      for (const Rows<Entry>& batch : batches) {
        multiply_rows(columns, batch.data(), batch.padded_count(), sums);
        store_sums(batch, sums, y, d2, column, columns.count, dtype);
      }
    });
  });
}

bool fits(size_t value_bytes, const int32_t* offsets, int d2, int value_bits) {
  return static_cast<uint64_t>(offsets[d2]) * value_bits <= 8 * static_cast<uint64_t>(value_bytes);
}

}  // namespace

const Kernels& kernels_of(int level) { return *LEVELS[level]; }

}  // namespace cospadi

using namespace cospadi;

// Levels of instructions that were built, best last.
EXPORT int cospadi_levels() { return LEVEL_COUNT; }
EXPORT const char* cospadi_level_name(int level) { return LEVELS[level]->name; }
EXPORT int cospadi_level_supported(int level) { return LEVELS[level]->supported(); }

EXPORT void cospadi_use_openmp(void* gomp_parallel) { openmp = reinterpret_cast<Parallel>(gomp_parallel); }

// y (rows, d2) = z (rows, k) S, both contiguous and of `dtype`; sums are made in float.
EXPORT int cospadi_multiply(const void* z, void* y, int64_t rows, int dtype, const uint8_t* support,
                            const uint8_t* values, size_t value_bytes, const int32_t* offsets, int d2, int k,
                            int value_bits, int threads, int level) try {
  if (!fits(value_bytes, offsets, d2, value_bits)) return STREAM_TOO_SHORT;
  const Kernels& kernels = *LEVELS[level];
  const Coefficients s(support, values, value_bytes, offsets, d2, k, value_bits);
  if (dtype == BF16 && pays_to_unpack(kernels, rows, TILED_ROWS)) {
    const auto unpack = [&](int first, int count, int, int, uint16_t* tile, size_t stride) {
      for (int c = 0; c < count; ++c) {
        uint16_t* row = tile + c * stride;
        s.in_parts(first + c, first + c + 1, [&](const Columns& column, int) { kernels.unpack_bf16(column, row); });
        std::fill(row + k, row + padded(k), 0);
      }
      kernels.interleave(tile, stride, padded(k));
    };
    const auto stored = [&](int first, int count) {
      const uint64_t begin = static_cast<uint64_t>(offsets[first]) * value_bits / 8;
      return Ahead{values + begin, static_cast<uint64_t>(offsets[first + count]) * value_bits / 8 - begin};
    };
    multiply_through_tiles(kernels, z, nullptr, y, rows, d2, k, nullptr, threads, padded(k), unpack, stored);
  } else if (dtype == BF16 && kernels.multiply_bf16) {
    multiply<uint16_t>(s, kernels.multiply_bf16, z, y, rows, d2, k, dtype, threads);
  } else {
    multiply<float>(s, kernels.multiply_float, z, y, rows, d2, k, dtype, threads);
  }
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}

EXPORT int cospadi_level_multiplies_dense(int level) { return LEVELS[level]->multiply_dense != nullptr; }
EXPORT int cospadi_level_multiplies_tiles(int level) { return LEVELS[level]->multiply_tile != nullptr; }

// z (rows, k) = x (rows, d1) matrix^T for a bf16 matrix (k, d1), all contiguous and in bf16; sums are made in float.
EXPORT int cospadi_multiply_dense(const void* x, void* z, int64_t rows, const uint16_t* matrix, int k, int d1,
                                  int threads, int level) try {
  const auto batches = in_batches<uint16_t>(x, rows, d1, BF16);
  parallel(runs(k), threads, [&](int run) {
    const int first = run * RUN, count = std::min(RUN, k - first);
    float sums[MAX_ROWS * RUN];
    for (const Rows<uint16_t>& batch : batches) {
      LEVELS[level]->multiply_dense(matrix + static_cast<size_t>(first) * d1, count, d1, batch.data(),
                                    batch.padded_count(), sums);
      store_sums(batch, sums, z, k, first, count, BF16);
    }
  });
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}

// G (d, d) += A A^T on its diagonal and above it, in float, for A (d, tokens) in bf16, both contiguous; what is below is
// left to whoever needs it. Each entry is summed by one thread in one order.
EXPORT int cospadi_gram(const uint16_t* a, float* gram, int d, int tokens, int threads, int level) try {
  const Kernels& kernels = *LEVELS[level];
  const auto batches = in_batches<uint16_t>(a, d, tokens, BF16, nullptr, threads);
  const size_t stride = tile_stride(tokens);
  std::atomic<bool> out_of_memory{false};
  parallel(runs(d), threads, [&](int run) {
    const int first = (runs(d) - 1 - run) * TILE, count = std::min(TILE, d - first);  // the longest work first
    Room room;
    try {
      room = room_of_thread(TILE * stride, MAX_ROWS * TILE);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
      return;
    }
    for (int c = 0; c < TILE; ++c) {
      uint16_t* row = room.tile + c * stride;
      const int entries = c < count ? tokens : 0;
      std::copy_n(a + static_cast<size_t>(first + c) * tokens, entries, row);
      std::fill(row + entries, row + padded(tokens), 0);
    }
    kernels.interleave(room.tile, stride, padded(tokens));
    for (const Rows<uint16_t>& batch : batches) {
      if (batch.first() >= first + count) break;
      std::fill_n(room.sums, MAX_ROWS * TILE, 0.0f);
      kernels.multiply_tile(room.tile, stride, padded(tokens), batch.data(), batch.padded_count(), room.sums, {});
      for (int r = 0; r < batch.count(); ++r) {
        float* to = gram + static_cast<size_t>(batch.first() + r) * d + first;
        for (int c = 0; c < count; ++c) to[c] += room.sums[r * TILE + c];
      }
    }
  });
  return out_of_memory ? OUT_OF_MEMORY : OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}

// Columns `begin` to `end` of S as rows of k entries, of `dtype` FLOAT or BF16.
EXPORT int cospadi_unpack(void* out, int dtype, int begin, int end, const uint8_t* support, const uint8_t* values,
                          size_t value_bytes, const int32_t* offsets, int d2, int k, int value_bits, int threads,
                          int level) try {
  if (!fits(value_bytes, offsets, d2, value_bits)) return STREAM_TOO_SHORT;
  const Kernels& kernels = *LEVELS[level];
  const Coefficients s(support, values, value_bytes, offsets, d2, k, value_bits);
  parallel(runs(end - begin), threads, [&](int run) {
    const int first = begin + run * RUN;
    s.in_parts(first, std::min(first + RUN, end), [&](const Columns& columns, int column) {
      const size_t at = static_cast<size_t>(column - begin) * k;
      if (dtype == BF16) {
        kernels.unpack_bf16(columns, static_cast<uint16_t*>(out) + at);
      } else {
        kernels.unpack_float(columns, static_cast<float*>(out) + at);
      }
    });
  });
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}
