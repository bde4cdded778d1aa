// Products with coefficients S (k x d2) in the form the checkpoint stores them: a support mask and packed values.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "rans.h"

namespace cospadi {

// Values may be read this many bytes past the last one of a `Columns`, and not further.
constexpr int MARGIN = 64;
// Atoms that a kernel takes at once.
constexpr int ATOMS = 32;
// Rows of z that a kernel takes at most. It is called with 1, 2, 4 or 8 of them.
constexpr int MAX_ROWS = 8;
// Columns that a kernel takes at most.
constexpr int MAX_COLUMNS = 32;

inline int padded(int k) { return (k + ATOMS - 1) / ATOMS * ATOMS; }

// Where a kernel finds atom j's entry of row r: 32 atoms of every row lie together, and k is padded with zeros.
inline size_t place_in_z(int rows, int r, int j) {
  return (static_cast<size_t>(j / ATOMS) * rows + r) * ATOMS + j % ATOMS;
}

// Outputs of a tile, in which pairs of inputs of sixteen outputs lie together.
constexpr int TILE = 32;

// Rows of a batch that a tile is multiplied with where two batches are at once.
constexpr int TWICE_ROWS = 16;

// Where a tile has coefficient i of output c.
inline size_t place_in_tile(size_t stride, int c, int i) {
  return (c / 16 * 16 + i % ATOMS / 2) * stride + i / ATOMS * ATOMS + c % 16 * 2 + i % 2;
}

// Memory that will be needed next.
struct Ahead {
  const uint8_t* bytes;
  size_t count;
};

// A run of columns of S.
struct Columns {
  int count;
  int k;
  int value_bits;          // 16 (bf16), or 10, 12, 14: the top bits of a bf16 pattern
  const uint8_t* support;  // the first column's mask; the next one follows after row_bytes
  int row_bytes;           // ceil(k / 8)
  const uint8_t* values;   // a little-endian bit stream
  uint64_t first_bit;      // position in the whole stream of bit 0 of `values`
  const int32_t* offsets;  // values before each column, and before the one after the last

  const uint8_t* mask(int c) const { return support + static_cast<size_t>(c) * row_bytes; }
  uint64_t bit(int c) const { return static_cast<uint64_t>(offsets[c]) * value_bits - first_bit; }
};

// Bits that a level may have.
constexpr int LEAST_BITS = 2, MOST_BITS = 8;

// A run of outputs of a matrix of small integers (levels), in rows of `width` of them: a multiple of ATOMS, zeros after
// the last input. A row is a little-endian stream of levels in two's complement, of so many bits each as `places` grows
// by there. MARGIN bytes after the last one may be read.
struct LevelRows {
  int count;
  int width;
  const uint8_t* levels;
  const int32_t* places;

  int bits(int c) const { return places[c + 1] - places[c]; }
  const uint8_t* row(int c) const { return levels + static_cast<size_t>(places[c]) * (width / 8); }
  LevelRows run(int first, int rows) const { return {rows, width, levels, places + first}; }
};

using Scale = void (*)(const uint16_t* x, const float* scales, uint16_t* to);

// One instruction set's way of doing it.
struct Kernels {
  const char* name;
  bool (*supported)();
  // sums[c * rows + r] = sum over atoms j of z[place_in_z(rows, r, j)] S[j, c], accumulated in float.
  void (*multiply_float)(const Columns&, const float* z, int rows, float* sums);
  // The same for z in bf16; null where bf16 is to be turned into float first.
  void (*multiply_bf16)(const Columns&, const uint16_t* z, int rows, float* sums);
  // Columns of S as rows of k entries: bf16 bits, or float.
  void (*unpack_bf16)(const Columns&, uint16_t* out);
  void (*unpack_float)(const Columns&, float* out);
  // sums[c * rows + r] = sum over j < width of x[place_in_z(rows, r, j)] matrix[c * width + j] for c < count, in bf16;
  // null where the machine's library does it as well.
  void (*multiply_dense)(const uint16_t* matrix, int count, int width, const uint16_t* x, int rows, float* sums);
  // sums[c * rows + r] = sum over inputs i of x[place_in_z(rows, r, i)] level[c, i], accumulated in float.
  void (*multiply_levels_float)(const LevelRows&, const float* x, int rows, float* sums);
  // The same for x in bf16; null where bf16 is to be turned into float first.
  void (*multiply_levels_bf16)(const LevelRows&, const uint16_t* x, int rows, float* sums);
  // Levels of the first `inputs` inputs, as rows of so many bf16 bits, or floats.
  void (*unpack_levels_bf16)(const LevelRows&, int inputs, uint16_t* out);
  void (*unpack_levels_float)(const LevelRows&, int inputs, float* out);
  // sums[r * TILE + c] += sum over inputs i < width of x[place_in_z(rows, r, i)] times coefficient i of output c, which
  // is at place_in_tile(stride, c, i) of `tile`; in bf16, on cache lines, width a multiple of ATOMS. Meanwhile it fetches
  // what is `ahead`. This and what follows is null where a machine lacks such products.
  void (*multiply_tile)(const uint16_t* tile, size_t stride, int width, const uint16_t* x, int rows, float* sums,
                        Ahead ahead);
  // Makes a tile of what is outputs in rows of coefficients, `stride` entries apart, where it lies.
  void (*interleave)(uint16_t* tile, size_t stride, int width);
  // Makes a tile of the levels of some inputs, `begin` a multiple of ATOMS; places of outputs that there are not hold
  // anything.
  void (*unpack_levels_tile)(const LevelRows&, int begin, int end, uint16_t* tile, size_t stride);
  // Sixteen lanes of coded levels; null where plain C++ does it.
  DecodeSixteen decode_sixteen;
  // As multiply_tile, which then takes up to TWICE_ROWS rows, of two batches of so many, `second` entries apart in x and
  // one after the other in sums; null where a machine does not multiply two at once.
  void (*multiply_tile_twice)(const uint16_t* tile, size_t stride, int width, const uint16_t* x, size_t second,
                              float* sums, Ahead ahead) = nullptr;
  // to = x scales for 32 numbers of bf16; null where plain C++ does it.
  Scale scale = nullptr;
  // to = sums scales for TILE sums, with scales or without, in bf16; null where plain C++ does it.
  void (*round)(const float* sums, const float* scales, uint16_t* to) = nullptr;
};

extern const Kernels portable_kernels;
#ifdef COSPADI_X86
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif
#ifdef COSPADI_AMX
const Kernels& amx_kernels();  // those of AVX-512 with products of tiles of their own
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

// Those of a level that was built.
const Kernels& kernels_of(int level);

// Mask bits of atoms 8 byte .. 8 byte + 31 of a row; atoms past the row's end read as 0 and are not touched.
inline uint32_t mask_at(const uint8_t* row, int byte, int row_bytes) {
  uint32_t bits = 0;
  if (row_bytes - byte >= 4) {
    std::memcpy(&bits, row + byte, 4);
  } else {
    std::memcpy(&bits, row + byte, row_bytes - byte);
  }
  return bits;
}

inline float to_float(uint16_t bf16) {
  uint32_t pattern = static_cast<uint32_t>(bf16) << 16;
  float value;
  std::memcpy(&value, &pattern, 4);
  return value;
}

}  // namespace cospadi
