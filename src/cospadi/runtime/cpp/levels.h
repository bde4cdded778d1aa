// Products with small integers, by instruction set.
#pragma once

#include <type_traits>

#include "kernels.h"

namespace cospadi {

void multiply_levels_portable(const LevelRows&, const float* x, int rows, float* sums);
void unpack_levels_portable(const LevelRows&, int inputs, uint16_t* out);
void unpack_levels_portable(const LevelRows&, int inputs, float* out);

#ifdef COSPADI_X86
void multiply_levels_avx2(const LevelRows&, const float* x, int rows, float* sums);
void unpack_levels_avx2(const LevelRows&, int inputs, uint16_t* out);
void unpack_levels_avx2(const LevelRows&, int inputs, float* out);
void multiply_levels_avx512(const LevelRows&, const float* x, int rows, float* sums);
void multiply_levels_avx512(const LevelRows&, const uint16_t* x, int rows, float* sums);
void unpack_levels_avx512(const LevelRows&, int inputs, uint16_t* out);
void unpack_levels_avx512(const LevelRows&, int inputs, float* out);
#endif

// Calls body(std::integral_constant<int, rows>) for the numbers of rows that there are.
template <class Body>
void with_rows(int rows, const Body& body) {
  switch (rows) {
    case 1: return body(std::integral_constant<int, 1>{});
    case 2: return body(std::integral_constant<int, 2>{});
    case 4: return body(std::integral_constant<int, 4>{});
    default: return body(std::integral_constant<int, 8>{});
  }
}

}  // namespace cospadi
