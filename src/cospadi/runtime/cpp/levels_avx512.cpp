// Products with small integers, 64 at a time; those of bf16 in pairs.
#include <array>
#include <bit>

#include "avx512.h"
#include "levels.h"
#include "tiles.h"

namespace cospadi {
namespace {

// Levels of a step. Eight of them fill a byte for each of their bits.
constexpr int STEP = 64, EIGHT = 8;

// How levels of so many bits become bf16, all exact.
struct alignas(64) Table {
  // First, the bytes of each eight: of 32 levels to the lower halves of quarters, of the other 32 to the upper ones.
  std::array<uint8_t, STEP> bytes;
  // Then from which bit on a level is read. Bits above it are the next ones.
  std::array<uint8_t, STEP> shifts;
  // Then its bf16, in halves: up to NARROW bits by the six low bits of what was read, of 7 bits by seven, of 8 by its
  // size; the sign is put to it.
  std::array<uint8_t, 2 * STEP> low, high;
};

constexpr int NARROW = 6;

constexpr Table table_of(int bits) {
  Table table{};
  for (int p = 0; p < STEP; ++p) {
    const int eight = p / 16 + p % 16 / EIGHT * 4, b = p % EIGHT;
    table.bytes[p] = static_cast<uint8_t>(eight * bits + b);
    table.shifts[p] = static_cast<uint8_t>(b * bits);
  }
  for (int read = 0; read < 2 * STEP; ++read) {
    const int sign = bits < MOST_BITS ? 1 << (bits - 1) : 0, level = ((read & ((1 << bits) - 1)) ^ sign) - sign;
    const uint32_t pattern = std::bit_cast<uint32_t>(static_cast<float>(level));
    table.low[read] = static_cast<uint8_t>(pattern >> 16);
    table.high[read] = static_cast<uint8_t>(pattern >> 24);
  }
  return table;
}

constexpr Table TABLES[] = {table_of(2), table_of(3), table_of(4), table_of(5), table_of(6), table_of(7), table_of(8)};

// How many bits `Load` looks levels up by at most.
enum Kind { SIX, SEVEN, ALL };

struct Pair {
  __m512i first, second;
};

// Reads 64 levels of so many bits.
template <Kind KIND>
class Load {
 public:
  explicit Load(int bits) : bits_(bits) {
    const Table& table = TABLES[bits - LEAST_BITS];
    bytes_ = _mm512_load_si512(table.bytes.data());
    shifts_ = _mm512_load_si512(table.shifts.data());
    for (int half = 0; half < 2; ++half) {
      low_[half] = _mm512_load_si512(table.low.data() + half * STEP);
      high_[half] = _mm512_load_si512(table.high.data() + half * STEP);
    }
  }
  // Those of a row from input i on, as bf16: 32 each.
  Pair operator()(const uint8_t* row, int i) const {
    const __m512i stored = _mm512_loadu_si512(row + static_cast<ptrdiff_t>(i / EIGHT) * bits_);
    const __m512i read = _mm512_multishift_epi64_epi8(shifts_, _mm512_permutexvar_epi8(bytes_, stored));
    const __m512i low = look_up(low_, read), high = look_up(high_, read);
    return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
  }

 private:
  static __m512i look_up(const __m512i (&table)[2], __m512i read) {
    if constexpr (KIND == SIX) return _mm512_permutexvar_epi8(read, table[0]);
    return _mm512_permutex2var_epi8(table[0], read, table[1]);
  }

  int bits_;
  __m512i bytes_, shifts_, low_[2], high_[2];
};

// All eight: the sign, which a table of sizes lacks, is that of what was read.
template <>
inline Pair Load<ALL>::operator()(const uint8_t* row, int i) const {
  const __m512i read = _mm512_permutexvar_epi8(bytes_, _mm512_loadu_si512(row + i));
  const __m512i sizes = _mm512_abs_epi8(read), low = look_up(low_, sizes), size = look_up(high_, sizes);
  const __m512i high = _mm512_ternarylogic_epi64(size, read, _mm512_set1_epi8(-128), 0xF8);  // size | (read & sign)
  return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
}

// Calls body(load) with what reads levels of so many bits.
template <class Body>
void with_load(int bits, const Body& body) {
  if (bits <= NARROW) return body(Load<SIX>(bits));
  if (bits < MOST_BITS) return body(Load<SEVEN>(bits));
  return body(Load<ALL>(bits));
}

// Sixteen numbers of bf16 as floats.
inline __m512 floats(__m256i bf16) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16); }
inline __m512 low_floats(__m512i bf16) { return floats(_mm512_castsi512_si256(bf16)); }
inline __m512 high_floats(__m512i bf16) { return floats(_mm512_extracti64x4_epi64(bf16, 1)); }

// sums[r] += x[r] times 32 levels.
template <int ROWS>
inline void add(__m512i levels, const uint16_t* x, __m512 (&sums)[ROWS]) {
  for (int r = 0; r < ROWS; ++r) {
    sums[r] = _mm512_dpbf16_ps(sums[r], (__m512bh)_mm512_loadu_si512(x + r * ATOMS), (__m512bh)levels);
  }
}

template <int ROWS>
inline void add(__m512i levels, const float* x, __m512 (&sums)[ROWS]) {
  const __m512 low = low_floats(levels), high = high_floats(levels);
  for (int r = 0; r < ROWS; ++r) {
    sums[r] = _mm512_fmadd_ps(_mm512_loadu_ps(x + r * ATOMS), low, sums[r]);
    sums[r] = _mm512_fmadd_ps(_mm512_loadu_ps(x + r * ATOMS + 16), high, sums[r]);
  }
}

// Adds what some inputs give to one output. Chains of sums hide the latency of adding where rows are few.
template <int ROWS, class Loader, class Entry>
inline void multiply(const Loader& load, int bits, const uint8_t* row, int begin, int end, const Entry* x,
                     __m512 (&sums)[ROWS]) {
  constexpr int CHAINS = ROWS <= 2 ? 4 : ROWS == 4 ? 2 : 1, STEPS = CHAINS == 4 ? 2 : 1;
  __m512 sum[CHAINS][ROWS];
  for (auto& chain : sum) {
    for (__m512& one : chain) one = _mm512_setzero_ps();
  }
  int i = begin;
  for (; i + STEPS * STEP <= end; i += STEPS * STEP) {
    for (int step = 0; step < STEPS; ++step) {
      const int at = i + step * STEP;
      _mm_prefetch(reinterpret_cast<const char*>(row + at / EIGHT * bits) + AHEAD, _MM_HINT_T0);
      const Pair levels = load(row, at);
      const Entry* own = x + static_cast<size_t>(at) * ROWS;
      add(levels.first, own, sum[2 * step % CHAINS]);
      add(levels.second, own + ATOMS * ROWS, sum[(2 * step + 1) % CHAINS]);
    }
  }
  for (; i < end; i += STEP) {
    const Pair levels = load(row, i);
    const Entry* own = x + static_cast<size_t>(i) * ROWS;
    add(levels.first, own, sum[0]);
    if (i + ATOMS < end) add(levels.second, own + ATOMS * ROWS, sum[1 % CHAINS]);
  }
  for (int r = 0; r < ROWS; ++r) {
    for (const auto& chain : sum) sums[r] = _mm512_add_ps(sums[r], chain[r]);
  }
}

// The same of two outputs, for which each entry of x is read once: loads are what limits one with many rows.
template <int ROWS>
inline void multiply_two(const LevelRows& levels, int c, int begin, int end, const uint16_t* x, __m512 (&first)[ROWS],
                         __m512 (&second)[ROWS]) {
  const uint8_t *first_row = levels.row(c), *second_row = levels.row(c + 1);
  const int first_bits = levels.bits(c), second_bits = levels.bits(c + 1);
  const Load<SIX> load_first(first_bits), load_second(second_bits);
  __m512 a[ROWS], b[ROWS];  // in registers where every loop over them is unrolled
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    a[r] = first[r];
    b[r] = second[r];
  }
  const auto add = [&](__m512i one, __m512i other, const uint16_t* own) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const __m512bh entries = (__m512bh)_mm512_loadu_si512(own + r * ATOMS);
      a[r] = _mm512_dpbf16_ps(a[r], entries, (__m512bh)one);
      b[r] = _mm512_dpbf16_ps(b[r], entries, (__m512bh)other);
    }
  };
  int i = begin;
  for (; i + STEP <= end; i += STEP) {
    _mm_prefetch(reinterpret_cast<const char*>(first_row + i / EIGHT * first_bits) + AHEAD, _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(second_row + i / EIGHT * second_bits) + AHEAD, _MM_HINT_T0);
    const Pair one = load_first(first_row, i), other = load_second(second_row, i);
    add(one.first, other.first, x + static_cast<size_t>(i) * ROWS);
    add(one.second, other.second, x + static_cast<size_t>(i + ATOMS) * ROWS);
  }
  if (i < end) add(load_first(first_row, i).first, load_second(second_row, i).first, x + static_cast<size_t>(i) * ROWS);
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    first[r] = a[r];
    second[r] = b[r];
  }
}

// Entries of x that are multiplied with some outputs while they are in the first cache, and these outputs.
constexpr int NEAREST = 8192, TOGETHER = 8;

template <class Entry>
void multiply(const LevelRows& levels, const Entry* x, int rows, float* sums) {
  with_rows(rows, [&](auto count) {
    constexpr int ROWS = count, INPUTS = NEAREST / ROWS * 2 / sizeof(Entry);
    for (int first = 0; first < levels.count; first += TOGETHER) {
      const int last = std::min(levels.count, first + TOGETHER);
      __m512 partial[TOGETHER][ROWS];
      for (auto& own : partial) {
        for (__m512& one : own) one = _mm512_setzero_ps();
      }
      for (int begin = 0; begin < levels.width; begin += INPUTS) {
        const int end = std::min(levels.width, begin + INPUTS);
        for (int c = first; c < last; ++c) {
          if constexpr (sizeof(Entry) == 2 && ROWS == MAX_ROWS) {
            if (c + 1 < last && levels.bits(c) <= NARROW && levels.bits(c + 1) <= NARROW) {
              multiply_two(levels, c, begin, end, x, partial[c - first], partial[c + 1 - first]);
              ++c;
              continue;
            }
          }
          with_load(levels.bits(c), [&](const auto& load) {
            multiply<ROWS>(load, levels.bits(c), levels.row(c), begin, end, x, partial[c - first]);
          });
        }
      }
      for (int c = first; c < last; ++c) {
        for (int r = 0; r < ROWS; ++r) sums[c * ROWS + r] = _mm512_reduce_add_ps(partial[c - first][r]);
      }
    }
  });
}

// Levels of a row, of inputs from `begin` to `end`, as so many entries.
template <class Entry>
void unpack_row(const LevelRows& levels, int c, int begin, int end, Entry* out) {
  with_load(levels.bits(c), [&](const auto& load) {
    for (int i = begin; i < end; i += STEP, out += STEP) {
      const Pair pair = load(levels.row(c), i);
      const __m512i both[] = {pair.first, pair.second};
      for (int half = 0; half < 2; ++half) {
        const int left = end - i - half * ATOMS;
        if (left <= 0) break;
        const uint32_t lanes = lanes_left(left);
        Entry* to = out + half * ATOMS;
        if constexpr (sizeof(Entry) == 2) {
          _mm512_mask_storeu_epi16(to, lanes, both[half]);
        } else {
          _mm512_mask_storeu_ps(to, static_cast<__mmask16>(lanes), low_floats(both[half]));
          if (lanes >> 16) _mm512_mask_storeu_ps(to + 16, static_cast<__mmask16>(lanes >> 16), high_floats(both[half]));
        }
      }
    }
  });
}

template <class Entry>
void unpack(const LevelRows& levels, int inputs, Entry* out) {
  for (int c = 0; c < levels.count; ++c, out += inputs) unpack_row(levels, c, 0, inputs, out);
}

}  // namespace

void unpack_levels_tile_avx512(const LevelRows& levels, int begin, int end, uint16_t* tile, size_t stride) {
  constexpr int INPUTS = NEAREST / 16;  // of so many outputs are in the first cache
  for (int half = 0; half < TILE; half += 16, tile += 16 * stride) {
    for (int i = begin; i < end; i += INPUTS) {
      const int last = std::min(end, i + INPUTS);
      for (int c = 0; c < std::min(16, levels.count - half); ++c) {
        unpack_row(levels, half + c, i, padded(last), tile + c * stride + i - begin);
      }
      interleave_half_avx512(tile + i - begin, stride, last - i);
    }
  }
}
void multiply_levels_avx512(const LevelRows& levels, const float* x, int rows, float* sums) {
  multiply(levels, x, rows, sums);
}
void multiply_levels_avx512(const LevelRows& levels, const uint16_t* x, int rows, float* sums) {
  multiply(levels, x, rows, sums);
}
void unpack_levels_avx512(const LevelRows& levels, int inputs, uint16_t* out) { unpack(levels, inputs, out); }
void unpack_levels_avx512(const LevelRows& levels, int inputs, float* out) { unpack(levels, inputs, out); }

}  // namespace cospadi
