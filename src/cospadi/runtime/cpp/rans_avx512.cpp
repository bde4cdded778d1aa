// Decoding of sixteen lanes at once with AVX-512: their states are one register.
#include <immintrin.h>

#include "rans.h"

namespace cospadi {
namespace {

inline __m512i broadcast(int value) { return _mm512_set1_epi32(value); }

// Lanes below the bound take the next words, in order.
inline __m512i refill(__m512i x, Decoding& block) {
  const __mmask16 low = _mm512_cmplt_epu32_mask(x, broadcast(BOUND));
  const ptrdiff_t left = block.end - block.next;
  const __m256i words = left >= 32 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block.next))
                                   : _mm256_maskz_loadu_epi16((1u << left / 2) - 1, block.next);
  ptrdiff_t read = 2 * _mm_popcnt_u32(low);
  if (read > left) {
    block.overrun = true;
    read = left;
  }
  block.next += read;
  const __m512i refilled = _mm512_or_si512(_mm512_slli_epi32(x, 16),
                                           _mm512_maskz_expand_epi32(low, _mm512_cvtepu16_epi32(words)));
  return _mm512_mask_mov_epi32(x, low, refilled);
}

inline __m512i load(const int16_t* values) {
  return _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
}

// Levels of symbols k; the masks are of lanes whose quantizer has the odd ones.
inline __m512i levels_of(__m512i k, __mmask16 odd) {
  const __m512i one = broadcast(1), zero = _mm512_setzero_si512(), twice = _mm512_add_epi32(k, k);
  const __m512i less = _mm512_mask_sub_epi32(twice, _mm512_mask_cmpgt_epi32_mask(odd, k, zero), twice, one);
  return _mm512_mask_add_epi32(less, _mm512_mask_cmplt_epi32_mask(odd, k, zero), less, one);
}

// Sixteen columns of a block on their way down.
struct Lanes {
  Decoding& block;
  __m512i columns;  // classes' parts, from 0 on
  __m512i x = _mm512_loadu_si512(block.states);
  __m512i trellis = _mm512_setzero_si512();
  __mmask16 unfit = 0;

  void decode_row(int r, int16_t* out) {
    const __m512i one = broadcast(1), low_bits = broadcast(SLOTS - 1);
    const __m512i next_state = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(NEXT_STATE)));
    __m512i classes = _mm512_add_epi32(columns, broadcast(block.rows[r]));
    classes = _mm512_min_epi32(_mm512_max_epi32(classes, _mm512_setzero_si512()), broadcast(CLASSES - 1));
    const __m512i table = _mm512_or_si512(_mm512_slli_epi32(classes, 1), _mm512_and_si512(trellis, one));
    const __m512i slot = _mm512_or_si512(_mm512_slli_epi32(table, PRECISION), _mm512_and_si512(x, low_bits));
    const __m512i entry = _mm512_i32gather_epi32(slot, block.slots, 4);
    x = _mm512_mullo_epi32(_mm512_and_si512(entry, low_bits), _mm512_srli_epi32(x, PRECISION));
    x = refill(_mm512_add_epi32(x, _mm512_and_si512(_mm512_srli_epi32(entry, 12), low_bits)), block);
    __m512i k = _mm512_srai_epi32(entry, 24);
    const __mmask16 escapes = _mm512_cmpeq_epi32_mask(k, broadcast(ESCAPE));
    const __mmask16 raw = escapes | _mm512_cmpge_epi32_mask(classes, broadcast(FIRST_RAW_CLASS));
    if (raw) k = with_raw_bits(k, classes, raw, escapes);
    const __m512i levels = levels_of(k, _mm512_test_epi32_mask(trellis, one));
    const __m256i words = _mm512_cvtepi32_epi16(levels);
    if (escapes) unfit |= _mm512_cmpneq_epi32_mask(_mm512_cvtepi16_epi32(words), levels);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), words);
    const __m512i step = _mm512_or_si512(_mm512_slli_epi32(trellis, 1), _mm512_and_si512(k, one));
    trellis = _mm512_permutexvar_epi32(step, next_state);
  }

  __m512i with_raw_bits(__m512i h, __m512i classes, __mmask16 raw, __mmask16 escapes) {
    __m512i bits = _mm512_srai_epi32(_mm512_sub_epi32(classes, broadcast(FIRST_RAW_CLASS - 4)), 2);
    bits = _mm512_mask_mov_epi32(_mm512_maskz_mov_epi32(raw, bits), escapes, broadcast(ESCAPE_BITS));
    const __m512i value = _mm512_andnot_si512(_mm512_sllv_epi32(broadcast(-1), bits), x);
    x = refill(_mm512_srlv_epi32(x, bits), block);
    const __m512i k = _mm512_or_si512(_mm512_sllv_epi32(h, bits), value);
    return _mm512_mask_srai_epi32(k, escapes, _mm512_slli_epi32(value, 16), 16);
  }

  void end() {
    _mm512_storeu_si512(block.states, x);
    block.unfit |= unfit != 0;
  }
};

}  // namespace

void decode_sixteen_avx512(Decoding* blocks, int count, const int16_t* cols, int16_t* const* outs, ptrdiff_t stride) {
  const __m512i columns = _mm512_sub_epi32(load(cols), broadcast(LOWEST_CLASS));
  Lanes first{blocks[0], columns};
  if (count == 1) {
    for (int r = 0; r < blocks[0].row_count; ++r) first.decode_row(r, outs[0] + r * stride);
  } else {
    Lanes second{blocks[1], columns};
    for (int r = 0; r < blocks[0].row_count; ++r) {
      first.decode_row(r, outs[0] + r * stride);
      second.decode_row(r, outs[1] + r * stride);
    }
    second.end();
  }
  first.end();
}

}  // namespace cospadi
