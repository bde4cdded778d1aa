// Levels of trellis-coded quantization in interleaved rANS, as src/cospadi/format/rans.py specifies them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace cospadi {

constexpr int LOWEST_CLASS = -12, CLASSES = 53;
constexpr int MAX_LANES = 16;
constexpr int PRECISION = 12, SLOTS = 1 << PRECISION;
constexpr uint32_t BOUND = 1u << 16;  // states are at least this between symbols
constexpr int ESCAPE = -128;          // in a table of slots: the symbol follows in ESCAPE_BITS raw bits
constexpr int ESCAPE_BITS = 16;

// State of the trellis and parity of the symbol -> next state; a state's lowest bit is its quantizer.
constexpr uint8_t NEXT_STATE[16] = {0, 2, 5, 7, 1, 3, 6, 4, 2, 0, 4, 6, 3, 1, 7, 5};

// Classes, counted from 0, and the low bits of a symbol that are stored as they are.
inline int class_of(int row, int col) {
  const int c = row + col - LOWEST_CLASS;
  return c < 0 ? 0 : c < CLASSES ? c : CLASSES - 1;
}
constexpr int FIRST_RAW_CLASS = 17 - LOWEST_CLASS;
inline int raw_bits(int c) { return c < FIRST_RAW_CLASS ? 0 : (c - FIRST_RAW_CLASS) / 4 + 1; }

inline int level_of(int k, int quantizer) { return 2 * k - quantizer * ((k > 0) - (k < 0)); }

// Groups of columns of one block, one after another, as they are decoded.
struct Decoding {
  const int16_t* rows;    // the classes of the block's rows
  int row_count;
  const uint32_t* slots;  // [class][quantizer][slot]: frequency, slot - cumulated frequency, symbol: 12, 12, 8 bits
  uint32_t states[MAX_LANES];
  const uint8_t* next;    // words of 16 bits
  const uint8_t* end;
  bool overrun = false;   // words were missing
  bool unfit = false;     // a level that int16 does not hold

  void refill(uint32_t& x) {
    if (x >= BOUND) return;
    uint16_t word = 0;
    if (next == end) {
      overrun = true;
    } else {
      std::memcpy(&word, next, 2);
      next += 2;
    }
    x = x << 16 | word;
  }

  uint32_t raw(uint32_t& x, int bits) {
    const uint32_t value = x & ((1u << bits) - 1);
    x >>= bits;
    refill(x);
    return value;
  }

  // The symbol for what a table said, with its raw bits. Tables are 2 class + quantizer.
  int16_t symbol(int from_table, int table, uint32_t& x) {
    if (from_table == ESCAPE) {
      const int k = static_cast<int16_t>(raw(x, ESCAPE_BITS)), n = level_of(k, table & 1);
      unfit |= n != static_cast<int16_t>(n);
      return static_cast<int16_t>(k);
    }
    const int bits = raw_bits(table >> 1);
    return static_cast<int16_t>(bits ? static_cast<uint32_t>(from_table) << bits | raw(x, bits) : from_table);
  }
};

// Blocks of equally many rows that are decoded together, at most.
constexpr int PAIR = 2;

// Decodes 16 columns of 1 or PAIR blocks to theirs of `outs`, where rows are `stride` apart.
using DecodeSixteen = void (*)(Decoding* blocks, int count, const int16_t* cols, int16_t* const* outs,
                               ptrdiff_t stride);

#ifdef COSPADI_X86
void decode_sixteen_avx512(Decoding* blocks, int count, const int16_t* cols, int16_t* const* outs, ptrdiff_t stride);
#endif

}  // namespace cospadi
