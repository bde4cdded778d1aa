// AVX2, FMA and BMI2: a column's values are decoded to bf16, then placed eight atoms at a time by a table of the mask
// byte's set bits. (There is no expanding load before AVX-512.)
#include <array>
#include <bit>
#include <vector>

#include "avx2.h"
#include "kernels.h"
#include "levels.h"

namespace cospadi {
namespace {

// For each mask byte, which of the next values each of its eight atoms takes.
struct alignas(64) Places {
  uint8_t of[256][8] = {};
  constexpr Places() {
    for (int byte = 0; byte < 256; ++byte) {
      int next = 0;
      for (int atom = 0; atom < 8; ++atom) {
        if (byte >> atom & 1) of[byte][atom] = static_cast<uint8_t>(next++);
      }
    }
  }
};
constexpr Places PLACES;

// Columns' values as bf16, in a buffer that is kept, and readable for eight values more.
const uint16_t* decode(const Columns& columns, int c) {
  static thread_local std::vector<uint16_t> buffer;
  const int count = columns.offsets[c + 1] - columns.offsets[c], bits = columns.value_bits;
  if (buffer.size() < static_cast<size_t>(count) + 16) buffer.resize(count + 16);
  uint64_t bit = columns.bit(c);
  if (bits == 16) {
    std::memcpy(buffer.data(), columns.values + (bit >> 3), 2 * static_cast<size_t>(count));
    return buffer.data();
  }
  const uint64_t lanes = (0xFFFFull << (16 - bits) & 0xFFFF) * 0x0001000100010001ull;
  for (int i = 0; i < count; i += 4, bit += 4 * bits) {
    uint64_t word;  // four values: at most 6 bits before them, and 56 of them
    std::memcpy(&word, columns.values + (bit >> 3), 8);
    word = _pdep_u64(word >> (bit & 7), lanes);
    std::memcpy(buffer.data() + i, &word, 8);
  }
  return buffer.data();
}

// Eight atoms' coefficients under a mask byte, and on to the next values.
inline __m256 expand(uint8_t byte, const uint16_t*& values) {
  const __m128i next = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  values += std::popcount(byte);
  const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(next), 16);
  const __m256i places =
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(PLACES.of[byte])));
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i chosen = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(byte), bits), bits);
  return _mm256_castsi256_ps(_mm256_and_si256(_mm256_permutevar8x32_epi32(wide, places), chosen));
}

template <int ROWS>
void multiply_rows(const Columns& columns, const float* z, float* sums) {
  for (int c = 0; c < columns.count; ++c) {
    const uint8_t* mask = columns.mask(c);
    const uint16_t* values = decode(columns, c);
    __m256 sum[ROWS];
    for (int r = 0; r < ROWS; ++r) sum[r] = _mm256_setzero_ps();
    for (int byte = 0; byte < columns.row_bytes; ++byte) {
      const __m256 weights = expand(mask[byte], values);
      for (int r = 0; r < ROWS; ++r) {
        sum[r] = _mm256_fmadd_ps(weights, _mm256_loadu_ps(z + place_in_z(ROWS, r, 8 * byte)), sum[r]);
      }
    }
    for (int r = 0; r < ROWS; ++r) sums[c * ROWS + r] = total(sum[r]);
  }
}

void multiply(const Columns& columns, const float* z, int rows, float* sums) {
  with_rows(rows, [&](auto count) { multiply_rows<count>(columns, z, sums); });
}

// Calls place(j, atoms, weights) for each mask byte's atoms j .. j + atoms - 1 of each column.
template <class Place>
void unpack(const Columns& columns, Place place) {
  for (int c = 0; c < columns.count; ++c) {
    const uint8_t* mask = columns.mask(c);
    const uint16_t* values = decode(columns, c);
    for (int byte = 0; byte < columns.row_bytes; ++byte) {
      alignas(32) float weights[8];
      _mm256_store_ps(weights, expand(mask[byte], values));
      const int atoms = columns.k - 8 * byte < 8 ? columns.k - 8 * byte : 8;
      place(static_cast<size_t>(c) * columns.k + 8 * byte, atoms, weights);
    }
  }
}

void unpack_float(const Columns& columns, float* out) {
  unpack(columns, [&](size_t at, int atoms, const float* weights) { std::memcpy(out + at, weights, 4 * atoms); });
}

void unpack_bf16(const Columns& columns, uint16_t* out) {
  unpack(columns, [&](size_t at, int atoms, const float* weights) {
    for (int i = 0; i < atoms; ++i) {
      uint32_t pattern;
      std::memcpy(&pattern, weights + i, 4);
      out[at + i] = static_cast<uint16_t>(pattern >> 16);
    }
  });
}

bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

}  // namespace

const Kernels avx2_kernels = {"avx2", supported, multiply, nullptr, unpack_bf16, unpack_float, nullptr,
                              multiply_levels_avx2, nullptr, unpack_levels_avx2,
                              unpack_levels_avx2, nullptr, nullptr, nullptr, nullptr};

}  // namespace cospadi
