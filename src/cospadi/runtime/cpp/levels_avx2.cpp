// Products with small integers, eight at a time.
#include "avx2.h"
#include "levels.h"

namespace cospadi {
namespace {

struct Thirty2 {
  __m256 quarters[4];
};

inline __m256 floats(__m128i bytes) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)); }

inline Thirty2 floats(__m128i low, __m128i high) {
  return {floats(low), floats(_mm_srli_si128(low, 8)), floats(high), floats(_mm_srli_si128(high, 8))};
}

// Reads levels of so many bits.
struct Load {
  explicit Load(int bits) : bits(bits) {}
  int bits;
  uint64_t places = 0x0101010101010101u * ((1u << bits) - 1);
  __m128i sign = _mm_set1_epi8(static_cast<char>(1 << (bits - 1)));

  // Eight of them, each in the low bits of a byte.
  long long eight(const uint8_t* at) const {
    uint64_t word;
    std::memcpy(&word, at, sizeof(word));
    return static_cast<long long>(_pdep_u64(word, places));
  }
  __m128i sixteen(const uint8_t* at) const {
    const __m128i unsigned_ = _mm_set_epi64x(eight(at + bits), eight(at));
    return _mm_sub_epi8(_mm_xor_si128(unsigned_, sign), sign);
  }
  // 32 levels of a row from input i on.
  Thirty2 operator()(const uint8_t* row, int i) const {
    const uint8_t* at = row + i / 8 * bits;
    return floats(sixteen(at), sixteen(at + 2 * bits));
  }
};

// Chains of sums hide the latency of adding where rows are few.
template <int ROWS>
void multiply(const LevelRows& levels, const float* x, float* sums) {
  constexpr int CHAINS = ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1;
  for (int c = 0; c < levels.count; ++c) {
    const uint8_t* row = levels.row(c);
    const Load load(levels.bits(c));
    __m256 sum[ROWS][CHAINS];
    for (auto& own : sum) {
      for (__m256& one : own) one = _mm256_setzero_ps();
    }
    for (int i = 0; i < levels.width; i += ATOMS) {
      const Thirty2 weights = load(row, i);
      for (int r = 0; r < ROWS; ++r) {
        const float* own = x + place_in_z(ROWS, r, i);
        for (int q = 0; q < 4; ++q) {
          __m256& to = sum[r][q % CHAINS];
          to = _mm256_fmadd_ps(weights.quarters[q], _mm256_loadu_ps(own + 8 * q), to);
        }
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      for (int chain = 1; chain < CHAINS; ++chain) sum[r][0] = _mm256_add_ps(sum[r][0], sum[r][chain]);
      sums[c * ROWS + r] = total(sum[r][0]);
    }
  }
}

template <class Entry>
void unpack(const LevelRows& levels, int inputs, Entry* out) {
  alignas(32) Entry some[ATOMS];
  for (int c = 0; c < levels.count; ++c, out += inputs) {
    const Load load(levels.bits(c));
    for (int i = 0; i < inputs; i += ATOMS) {
      const Thirty2 weights = load(levels.row(c), i);
      Entry* to = inputs - i < ATOMS ? some : out + i;
      for (int q = 0; q < 4; ++q) {
        if constexpr (sizeof(Entry) == 4) {
          _mm256_storeu_ps(to + 8 * q, weights.quarters[q]);
        } else {  // levels are exact in bf16
          const __m256i tops = _mm256_srli_epi32(_mm256_castps_si256(weights.quarters[q]), 16);
          const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(tops), _mm256_extracti128_si256(tops, 1));
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8 * q), words);
        }
      }
      if (to == some) std::memcpy(out + i, some, sizeof(Entry) * (inputs - i));
    }
  }
}

}  // namespace

void multiply_levels_avx2(const LevelRows& levels, const float* x, int rows, float* sums) {
  with_rows(rows, [&](auto count) { multiply<count>(levels, x, sums); });
}

void unpack_levels_avx2(const LevelRows& levels, int inputs, uint16_t* out) { unpack(levels, inputs, out); }
void unpack_levels_avx2(const LevelRows& levels, int inputs, float* out) { unpack(levels, inputs, out); }

}  // namespace cospadi
