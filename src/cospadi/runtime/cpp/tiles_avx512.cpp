// Many rows with 32 outputs that were unpacked: a pair of inputs of sixteen outputs fills a register.
#include "avx512.h"
#include "kernels.h"
#include "tiles.h"

namespace cospadi {
namespace {

constexpr int LANES = 16;

// 16 x 16 numbers of 32 bits, transposed in place.
inline void transpose(__m512i (&a)[LANES]) {
  __m512i b[LANES];
  for (int i = 0; i < LANES; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < LANES; i += 4) {  // each quarter of a register holds a number of four rows
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // quarters 0 and 2, and 1 and 3, of eight rows
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xDD);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xDD);
  }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
    a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xDD);
    a[i + 4] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xDD);
  }
}

template <int ROWS>
void multiply(const uint16_t* tile, size_t stride, int width, const uint16_t* x, float* sums, Ahead ahead) {
  // Lines to be fetched for 32 inputs.
  const int lines = static_cast<int>((ahead.count * ATOMS / width + 63) / 64);
  __m512 sum[ROWS][2];  // in registers where every loop over it is unrolled
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    sum[r][0] = _mm512_load_ps(sums + r * TILE);
    sum[r][1] = _mm512_load_ps(sums + r * TILE + LANES);
  }
  for (int i = 0; i < width; i += ATOMS, x += ROWS * ATOMS) {
    for (int line = 0; line < lines; ++line, ahead.bytes += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead.bytes), _MM_HINT_T1);
    }
    for (int p = 0; p < LANES; ++p) {
      const __m512bh first = (__m512bh)_mm512_load_si512(tile + p * stride + i);
      const __m512bh second = (__m512bh)_mm512_load_si512(tile + (p + LANES) * stride + i);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        int pair;
        std::memcpy(&pair, x + r * ATOMS + 2 * p, sizeof(pair));
        const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
        sum[r][0] = _mm512_dpbf16_ps(sum[r][0], first, both);
        sum[r][1] = _mm512_dpbf16_ps(sum[r][1], second, both);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    _mm512_store_ps(sums + r * TILE, sum[r][0]);
    _mm512_store_ps(sums + r * TILE + LANES, sum[r][1]);
  }
}

}  // namespace

void interleave_half_avx512(uint16_t* half, size_t stride, int width) {
  for (int i = 0; i < width; i += ATOMS) {
    __m512i rows[LANES];
    for (int p = 0; p < LANES; ++p) rows[p] = _mm512_load_si512(half + p * stride + i);
    transpose(rows);
    for (int p = 0; p < LANES; ++p) _mm512_store_si512(half + p * stride + i, rows[p]);
  }
}

void interleave_avx512(uint16_t* tile, size_t stride, int width) {
  for (int half = 0; half < TILE; half += LANES) interleave_half_avx512(tile + half * stride, stride, width);
}

namespace {

// 16 floats as bf16, as `to_bf16` rounds them.
inline __m256i rounded(__m512 values) {
  const __m512i pattern = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(pattern, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(pattern, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(up, nan, pattern, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}

inline __m512 widened(const uint16_t* bf16) {
  const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bf16));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(some), 16));
}

}  // namespace

void scale_avx512(const uint16_t* x, const float* scales, uint16_t* to) {
  for (int i = 0; i < ATOMS; i += LANES) {
    const __m512 scaled = _mm512_mul_ps(widened(x + i), _mm512_loadu_ps(scales + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), rounded(scaled));
  }
}

void round_avx512(const float* sums, const float* scales, uint16_t* to) {
  for (int i = 0; i < TILE; i += LANES) {
    __m512 sum = _mm512_loadu_ps(sums + i);
    if (scales) sum = _mm512_mul_ps(sum, _mm512_loadu_ps(scales + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), rounded(sum));
  }
}

void multiply_tile_avx512(const uint16_t* tile, size_t stride, int width, const uint16_t* x, int rows, float* sums,
                          Ahead ahead) {
  with_rows(rows, [&](auto count) { multiply<count>(tile, stride, width, x, sums, ahead); });
}

}  // namespace cospadi
