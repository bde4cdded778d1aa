// What the files of AVX-512 have in common.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace cospadi {

// How far ahead of its use memory is fetched; the processor's own guess falls behind.
constexpr int AHEAD = 2048;

// A mask of those of 32 lanes that are left.
inline uint32_t lanes_left(int atoms) { return atoms >= 32 ? 0xFFFFFFFFu : (1u << atoms) - 1; }

}  // namespace cospadi
