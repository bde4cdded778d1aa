// Products with small integers, by instruction set.
#pragma once

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

}  // namespace cospadi
