// AVX-512 with VBMI, VBMI2 and BF16: 32 packed values are expanded under 32 mask bits and multiplied in pairs.
#include <type_traits>

#include "avx512.h"
#include "kernels.h"
#include "levels.h"
#include "tiles.h"

namespace cospadi {
namespace {

// How to turn 32 values of BITS bits into 16-bit lanes with the value's bits on top.
template <int BITS>
struct alignas(64) Lanes {
  uint8_t bytes[64] = {};      // four values lie in 8 bytes, which one 64-bit lane takes
  uint8_t shifts[4][64] = {};  // by half the stream's phase: where in its 8 bytes each byte of a lane starts
  constexpr Lanes() {
    for (int i = 0; i < 64; ++i) bytes[i] = static_cast<uint8_t>(i / 8 * (BITS / 2) + i % 8);
    for (int half = 0; half < 4; ++half) {
      for (int i = 0; i < 64; ++i) {
        const int end = 2 * half + BITS * (i % 8 / 2 + 1);  // one past the value's last bit
        shifts[half][i] = static_cast<uint8_t>((end - (i % 2 ? 8 : 16) + 64) % 64);
      }
    }
  }
};
template <int BITS>
constexpr Lanes<BITS> LANES;

// 32 values from a bit of the stream on, as bf16. Reads 64 bytes.
template <int BITS>
inline __m512i load(const uint8_t* values, uint64_t bit) {
  const __m512i raw = _mm512_loadu_si512(values + (bit >> 3));
  if constexpr (BITS == 16) {
    return raw;
  } else {
    const __m512i spread = _mm512_permutexvar_epi8(_mm512_load_si512(LANES<BITS>.bytes), raw);
    const __m512i shifts = _mm512_load_si512(LANES<BITS>.shifts[(bit & 7) >> 1]);
    const __m512i top = _mm512_set1_epi16(static_cast<short>(0xFFFF << (16 - BITS)));
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, spread), top);
  }
}

// Calls take(atom, weights, half) for each 32 atoms of column c, their coefficients as bf16; `half` is 0 and 1 in turn.
template <int BITS, class Take>
inline void for_each_32(const Columns& columns, int c, Take take) {
  const uint8_t* mask = columns.mask(c);
  const uint8_t* values = columns.values;
  uint64_t bit = columns.bit(c);
  const size_t row_bytes = columns.row_bytes;
  size_t byte = 0;
  const auto step = [&](uint32_t bits, auto half) {
    take(8 * byte, _mm512_maskz_expand_epi16(bits, load<BITS>(values, bit)), half);
    bit += BITS * static_cast<uint64_t>(_mm_popcnt_u64(bits));
    byte += 4;
  };
  constexpr std::integral_constant<int, 0> even;
  constexpr std::integral_constant<int, 1> odd;
  while (byte + 8 <= row_bytes) {
    uint64_t bits;
    std::memcpy(&bits, mask + byte, 8);
    _mm_prefetch(reinterpret_cast<const char*>(values + (bit >> 3) + AHEAD), _MM_HINT_T0);
    step(static_cast<uint32_t>(bits), even);
    step(static_cast<uint32_t>(bits >> 32), odd);
  }
  while (byte < row_bytes) step(mask_at(mask, static_cast<int>(byte), columns.row_bytes), even);
}

inline __m512 low_floats(__m512i bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(bf16)), 16));
}

inline __m512 high_floats(__m512i bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bf16, 1)), 16));
}

// The four sums of four accumulators.
inline __m128 totals(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));  // a b a b in each quarter
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Two accumulators a row hide the latency of the sums where rows are few.
template <int BITS, int ROWS, class Entry>
void multiply_rows(const Columns& columns, const Entry* z, float* sums) {
  constexpr bool bf16 = sizeof(Entry) == 2;
  constexpr int CHAINS = ROWS <= 4 ? 2 : 1;
  for (int c = 0; c < columns.count; ++c) {
    __m512 sum[CHAINS][ROWS];
    for (auto& chain : sum) {
      for (__m512& one : chain) one = _mm512_setzero_ps();
    }
    for_each_32<BITS>(columns, c, [&](size_t atom, __m512i weights, auto half) {
      __m512* chain = sum[half % CHAINS];
      for (int r = 0; r < ROWS; ++r) {
        const Entry* x = z + atom * ROWS + r * ATOMS;  // as place_in_z says, for a multiple of 32
        if constexpr (bf16) {
          chain[r] = _mm512_dpbf16_ps(chain[r], (__m512bh)_mm512_loadu_si512(x), (__m512bh)weights);
        } else {
          chain[r] = _mm512_fmadd_ps(_mm512_loadu_ps(x), low_floats(weights), chain[r]);
          chain[r] = _mm512_fmadd_ps(_mm512_loadu_ps(x + 16), high_floats(weights), chain[r]);
        }
      }
    });
    if constexpr (CHAINS == 2) {
      for (int r = 0; r < ROWS; ++r) sum[0][r] = _mm512_add_ps(sum[0][r], sum[1][r]);
    }
    float* out = sums + c * ROWS;
    if constexpr (ROWS < 4) {
      for (int r = 0; r < ROWS; ++r) out[r] = _mm512_reduce_add_ps(sum[0][r]);
    } else {
      for (int r = 0; r < ROWS; r += 4) {
        _mm_storeu_ps(out + r, totals(sum[0][r], sum[0][r + 1], sum[0][r + 2], sum[0][r + 3]));
      }
    }
  }
}

template <int BITS, class Entry>
void multiply_bits(const Columns& columns, const Entry* z, int rows, float* sums) {
  with_rows(rows, [&](auto count) { multiply_rows<BITS, count>(columns, z, sums); });
}

template <class Entry>
void multiply(const Columns& columns, const Entry* z, int rows, float* sums) {
  switch (columns.value_bits) {
    case 10: return multiply_bits<10>(columns, z, rows, sums);
    case 12: return multiply_bits<12>(columns, z, rows, sums);
    case 14: return multiply_bits<14>(columns, z, rows, sums);
    default: return multiply_bits<16>(columns, z, rows, sums);
  }
}

template <int BITS>
void unpack_bits(const Columns& columns, uint16_t* out) {
  for (int c = 0; c < columns.count; ++c, out += columns.k) {
    for_each_32<BITS>(columns, c, [&](size_t atom, __m512i weights, auto) {
      _mm512_mask_storeu_epi16(out + atom, lanes_left(columns.k - static_cast<int>(atom)), weights);
    });
  }
}

template <int BITS>
void unpack_bits(const Columns& columns, float* out) {
  for (int c = 0; c < columns.count; ++c, out += columns.k) {
    for_each_32<BITS>(columns, c, [&](size_t atom, __m512i weights, auto) {
      const uint32_t lanes = lanes_left(columns.k - static_cast<int>(atom));
      _mm512_mask_storeu_ps(out + atom, static_cast<__mmask16>(lanes), low_floats(weights));
      if (lanes >> 16) _mm512_mask_storeu_ps(out + atom + 16, static_cast<__mmask16>(lanes >> 16), high_floats(weights));
    });
  }
}

template <class Entry>
void unpack(const Columns& columns, Entry* out) {
  switch (columns.value_bits) {
    case 10: return unpack_bits<10>(columns, out);
    case 12: return unpack_bits<12>(columns, out);
    case 14: return unpack_bits<14>(columns, out);
    default: return unpack_bits<16>(columns, out);
  }
}

template <int ROWS>
void multiply_dense_rows(const uint16_t* matrix, int count, int width, const uint16_t* x, float* sums) {
  constexpr int CHAINS = ROWS <= 2 ? 4 : ROWS == 4 ? 2 : 1;
  for (int c = 0; c < count; ++c, matrix += width) {
    __m512 sum[CHAINS][ROWS];
    for (auto& chain : sum) {
      for (__m512& one : chain) one = _mm512_setzero_ps();
    }
    const auto step = [&](int j, uint32_t lanes, __m512* chain) {
      _mm_prefetch(reinterpret_cast<const char*>(matrix + j) + AHEAD, _MM_HINT_T0);
      const __m512i weights = _mm512_maskz_loadu_epi16(lanes, matrix + j);
      for (int r = 0; r < ROWS; ++r) {
        const __m512i z = _mm512_loadu_si512(x + static_cast<size_t>(j) * ROWS + r * ATOMS);
        chain[r] = _mm512_dpbf16_ps(chain[r], (__m512bh)z, (__m512bh)weights);
      }
    };
    int j = 0;
    for (; j + CHAINS * ATOMS <= width; j += CHAINS * ATOMS) {
      for (int i = 0; i < CHAINS; ++i) step(j + i * ATOMS, 0xFFFFFFFFu, sum[i]);
    }
    for (; j < width; j += ATOMS) step(j, lanes_left(width - j), sum[0]);
    for (int r = 0; r < ROWS; ++r) {
      for (int i = 1; i < CHAINS; ++i) sum[0][r] = _mm512_add_ps(sum[0][r], sum[i][r]);
      sums[c * ROWS + r] = _mm512_reduce_add_ps(sum[0][r]);
    }
  }
}

void multiply_dense(const uint16_t* matrix, int count, int width, const uint16_t* x, int rows, float* sums) {
  with_rows(rows, [&](auto n) { multiply_dense_rows<n>(matrix, count, width, x, sums); });
}

bool supported() {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
         __builtin_cpu_supports("avx512bf16");
}

}  // namespace

const Kernels avx512_kernels = {"avx512", supported, multiply<float>, multiply<uint16_t>, unpack<uint16_t>,
                                unpack<float>, multiply_dense, multiply_levels_avx512, multiply_levels_avx512,
                                unpack_levels_avx512, unpack_levels_avx512, multiply_tile_avx512,
                                interleave_avx512, unpack_levels_tile_avx512, decode_sixteen_avx512, nullptr,
                                scale_avx512, round_avx512};

}  // namespace cospadi
