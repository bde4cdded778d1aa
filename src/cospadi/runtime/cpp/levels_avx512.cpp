// Products with small integers, 32 at a time; those of bf16 in pairs.
#include "avx512.h"
#include "levels.h"
#include "tiles.h"

namespace cospadi {
namespace {

// 32 levels of a row as floats, or in pairs as bf16; all exact.
template <int BITS>
struct Load;

template <>
struct Load<8> {
  static __m512 floats(const uint8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  __m512 low(const uint8_t* row, int i) const { return floats(row + i); }
  __m512 high(const uint8_t* row, int i) const { return floats(row + i + 16); }
  __m512i bf16(const uint8_t* row, int i) const {
    return (__m512i)_mm512_cvtne2ps_pbh(floats(row + i + 16), floats(row + i));
  }
};

// By tables of the sixteen.
template <>
struct Load<4> {
  __m512 as_floats = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  __m512i as_bf16 = (__m512i)_mm512_cvtne2ps_pbh(as_floats, as_floats);

  static __m128i both(const uint8_t* row, int i) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i / 2));
  }
  __m512 low(const uint8_t* row, int i) const {  // of an index, its low four bits count
    return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(both(row, i)), as_floats);
  }
  __m512 high(const uint8_t* row, int i) const {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(_mm512_cvtepu8_epi32(both(row, i)), 4), as_floats);
  }
  __m512i bf16(const uint8_t* row, int i) const {  // the low five, of which the table has two of each
    const __m256i bytes = _mm256_castsi128_si256(both(row, i));
    const __m256i halves = _mm256_inserti128_si256(bytes, _mm_srli_epi16(both(row, i), 4), 1);
    return _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(halves), as_bf16);
  }
};

// Chains of sums hide the latency of adding where rows are few.
template <int BITS, int ROWS, class Entry>
void multiply(const LevelRows& levels, const Entry* x, float* sums) {
  constexpr int CHAINS = ROWS <= 2 ? 4 : ROWS == 4 ? 2 : 1;
  const Load<BITS> load;
  for (int c = 0; c < levels.count; ++c) {
    const uint8_t* row = levels.row(c);
    __m512 sum[CHAINS][ROWS];
    for (auto& chain : sum) {
      for (__m512& one : chain) one = _mm512_setzero_ps();
    }
    const auto step = [&](int i, __m512* chain) {
      _mm_prefetch(reinterpret_cast<const char*>(row + i * BITS / 8) + AHEAD, _MM_HINT_T0);
      const Entry* own = x + static_cast<size_t>(i) * ROWS;
      if constexpr (sizeof(Entry) == 2) {
        const __m512bh weights = (__m512bh)load.bf16(row, i);
        for (int r = 0; r < ROWS; ++r, own += ATOMS) {
          chain[r] = _mm512_dpbf16_ps(chain[r], (__m512bh)_mm512_loadu_si512(own), weights);
        }
      } else {
        const __m512 low = load.low(row, i), high = load.high(row, i);
        for (int r = 0; r < ROWS; ++r, own += ATOMS) {
          chain[r] = _mm512_fmadd_ps(_mm512_loadu_ps(own), low, chain[r]);
          chain[r] = _mm512_fmadd_ps(_mm512_loadu_ps(own + 16), high, chain[r]);
        }
      }
    };
    int i = 0;
    for (; i + CHAINS * ATOMS <= levels.width; i += CHAINS * ATOMS) {
      for (int chain = 0; chain < CHAINS; ++chain) step(i + chain * ATOMS, sum[chain]);
    }
    for (; i < levels.width; i += ATOMS) step(i, sum[0]);
    for (int r = 0; r < ROWS; ++r) {
      for (int chain = 1; chain < CHAINS; ++chain) sum[0][r] = _mm512_add_ps(sum[0][r], sum[chain][r]);
      sums[c * ROWS + r] = _mm512_reduce_add_ps(sum[0][r]);
    }
  }
}

template <class Entry>
void multiply(const LevelRows& levels, const Entry* x, int rows, float* sums) {
  with_rows(rows, [&](auto count) {
    return levels.bits == 4 ? multiply<4, count>(levels, x, sums) : multiply<8, count>(levels, x, sums);
  });
}

template <int BITS, class Entry>
void unpack(const LevelRows& levels, int inputs, Entry* out) {
  const Load<BITS> load;
  for (int c = 0; c < levels.count; ++c, out += inputs) {
    for (int i = 0; i < inputs; i += ATOMS) {
      const uint8_t* row = levels.row(c);
      const uint32_t lanes = lanes_left(inputs - i);
      if constexpr (sizeof(Entry) == 2) {
        _mm512_mask_storeu_epi16(out + i, lanes, load.bf16(row, i));
      } else {
        _mm512_mask_storeu_ps(out + i, static_cast<__mmask16>(lanes), load.low(row, i));
        if (lanes >> 16) _mm512_mask_storeu_ps(out + i + 16, static_cast<__mmask16>(lanes >> 16), load.high(row, i));
      }
    }
  }
}

template <class Entry>
void unpack(const LevelRows& levels, int inputs, Entry* out) {
  return levels.bits == 4 ? unpack<4>(levels, inputs, out) : unpack<8>(levels, inputs, out);
}

// Sixteen bytes of each of sixteen rows, transposed by pairs: register q of `pairs` has bytes 4 q and 4 q + 1 of all of
// them in its lower half, bytes 4 q + 2 and 4 q + 3 in its upper one.
inline void transpose_pairs(const uint8_t* const (&rows)[16], size_t at, __m512i (&pairs)[4]) {
  // Of eight rows: pairs 0 to 3 and pairs 4 to 7, sixteen bytes each.
  static const __m512i first = [] {
    alignas(64) uint16_t index[32];
    for (int i = 0; i < 32; ++i) index[i] = static_cast<uint16_t>(i % 8 * 8 + i / 8);  // row i % 8, pair i / 8
    return _mm512_load_si512(index);
  }();
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(4));
  const auto load = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + at)); };
  __m512i four[4];
  for (int i = 0; i < 4; ++i) {
    four[i] = _mm512_castsi128_si512(load(4 * i));
    four[i] = _mm512_inserti32x4(four[i], load(4 * i + 1), 1);
    four[i] = _mm512_inserti32x4(four[i], load(4 * i + 2), 2);
    four[i] = _mm512_inserti32x4(four[i], load(4 * i + 3), 3);
  }
  const __m512i lower[2] = {_mm512_permutex2var_epi16(four[0], first, four[1]),
                            _mm512_permutex2var_epi16(four[0], second, four[1])};
  const __m512i upper[2] = {_mm512_permutex2var_epi16(four[2], first, four[3]),
                            _mm512_permutex2var_epi16(four[2], second, four[3])};
  const __m512i left = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), right = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (int half = 0; half < 2; ++half) {
    pairs[2 * half] = _mm512_permutex2var_epi64(lower[half], left, upper[half]);
    pairs[2 * half + 1] = _mm512_permutex2var_epi64(lower[half], right, upper[half]);
  }
}

inline void unpack_tile(const Load<4>& load, const uint8_t* const (&rows)[16], int i, uint16_t* to, size_t stride) {
  __m512i pairs[4];
  transpose_pairs(rows, i / 2, pairs);
  const auto store = [&](int pair, __m256i bytes) {
    _mm512_store_si512(to + pair * stride, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(bytes), load.as_bf16));
  };
  for (int q = 0; q < 4; ++q) {
    const __m512i high = _mm512_srli_epi16(pairs[q], 4);
    store(2 * q, _mm512_castsi512_si256(pairs[q]));
    store(2 * q + 1, _mm512_extracti64x4_epi64(pairs[q], 1));
    store(2 * q + 8, _mm512_castsi512_si256(high));
    store(2 * q + 9, _mm512_extracti64x4_epi64(high, 1));
  }
}

inline void unpack_tile(const Load<8>&, const uint8_t* const (&rows)[16], int i, uint16_t* to, size_t stride) {
  const auto floats = [](__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)); };
  for (int half = 0; half < 2; ++half) {
    __m512i pairs[4];
    transpose_pairs(rows, i + 16 * half, pairs);
    for (int q = 0; q < 4; ++q, to += 2 * stride) {
      const __m512 low = floats(_mm512_castsi512_si128(pairs[q])), high = floats(_mm512_extracti32x4_epi32(pairs[q], 1));
      _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
      const __m512 lower = floats(_mm512_extracti32x4_epi32(pairs[q], 2));
      const __m512 upper = floats(_mm512_extracti32x4_epi32(pairs[q], 3));
      _mm512_store_si512(to + stride, (__m512i)_mm512_cvtne2ps_pbh(upper, lower));
    }
  }
}

template <int BITS>
void unpack_tile(const LevelRows& levels, int begin, int end, uint16_t* tile, size_t stride) {
  const Load<BITS> load;
  for (int half = 0; half < TILE; half += 16, tile += 16 * stride) {
    const uint8_t* rows[16];
    for (int c = 0; c < 16; ++c) rows[c] = levels.row(std::min(half + c, levels.count - 1));
    for (int i = begin; i < end; i += ATOMS) unpack_tile(load, rows, i, tile + i - begin, stride);
  }
}

}  // namespace

void unpack_levels_tile_avx512(const LevelRows& levels, int begin, int end, uint16_t* tile, size_t stride) {
  return levels.bits == 4 ? unpack_tile<4>(levels, begin, end, tile, stride)
                          : unpack_tile<8>(levels, begin, end, tile, stride);
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
