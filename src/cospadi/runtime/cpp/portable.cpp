// Plain C++ for any machine (little-endian, as torch's are).
#include <bit>

#include "kernels.h"
#include "levels.h"

namespace cospadi {
namespace {

// Calls visit(i, j, value) for the i-th nonzero of column c, which is atom j's.
template <class Visit>
void for_each_nonzero(const Columns& columns, int c, Visit visit) {
  const uint8_t* mask = columns.mask(c);
  const int bits = columns.value_bits;
  uint64_t bit = columns.bit(c);
  for (int byte = 0; byte < columns.row_bytes; byte += 4) {
    for (uint32_t left = mask_at(mask, byte, columns.row_bytes); left; left &= left - 1) {
      uint32_t word;  // at most 6 bits before the value, and 16 of it
      std::memcpy(&word, columns.values + (bit >> 3), 4);
      const uint32_t code = (word >> (bit & 7)) & ((1u << bits) - 1);
      visit(8 * byte + std::countr_zero(left), static_cast<uint16_t>(code << (16 - bits)));
      bit += bits;
    }
  }
}

template <int ROWS>
void multiply_rows(const Columns& columns, const float* z, float* sums) {
  for (int c = 0; c < columns.count; ++c) {
    float sum[ROWS] = {};
    for_each_nonzero(columns, c, [&](int j, uint16_t code) {
      const float value = to_float(code);
      for (int r = 0; r < ROWS; ++r) sum[r] += z[place_in_z(ROWS, r, j)] * value;
    });
    for (int r = 0; r < ROWS; ++r) sums[c * ROWS + r] = sum[r];
  }
}

void multiply(const Columns& columns, const float* z, int rows, float* sums) {
  with_rows(rows, [&](auto count) { multiply_rows<count>(columns, z, sums); });
}

template <class Entry, class Convert>
void unpack(const Columns& columns, Entry* out, Convert convert) {
  for (int c = 0; c < columns.count; ++c, out += columns.k) {
    std::memset(out, 0, sizeof(Entry) * columns.k);
    for_each_nonzero(columns, c, [&](int j, uint16_t code) {
      if (j < columns.k) out[j] = convert(code);
    });
  }
}

void unpack_bf16(const Columns& columns, uint16_t* out) {
  unpack(columns, out, [](uint16_t code) { return code; });
}

void unpack_float(const Columns& columns, float* out) { unpack(columns, out, to_float); }

}  // namespace

const Kernels portable_kernels = {"portable", [] { return true; }, multiply, nullptr, unpack_bf16, unpack_float,
                                  nullptr, multiply_levels_portable, nullptr, unpack_levels_portable,
                                  unpack_levels_portable, nullptr, nullptr, nullptr, nullptr};

}  // namespace cospadi
