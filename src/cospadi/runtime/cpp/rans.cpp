// Coding of levels: the C interface, the encoder, and the decoder in plain C++. Each block of rows is its own stream.
#include "rans.h"

#include <atomic>
#include <new>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace cospadi {
namespace {

// Of two, the larger one is told.
constexpr int TABLE = 128;  // entries that the encoder's tables have for a class and a quantizer

// What is coded, or to be decoded: levels (d2, d1) in blocks of rows.
struct Shape {
  int64_t d2, d1, block_rows;
  int lanes;
  const int16_t* rows;
  const int16_t* cols;

  int blocks() const { return static_cast<int>((d2 + block_rows - 1) / block_rows); }
  int64_t first_row(int block) const { return block * block_rows; }
  int row_count(int block) const { return static_cast<int>(std::min(block_rows, d2 - first_row(block))); }
  // Bytes that a block takes at most: a word for each symbol, and one for its raw bits.
  size_t room(int64_t row_count) const { return 4 * (lanes + static_cast<size_t>(row_count) * d1); }
};

// The path of one column: what its levels are as symbols.
struct Path {
  int quantizer = 0, k = 0;
  bool valid = true;

  // Takes a level in a state of the trellis and returns the next state.
  uint8_t take(int level, uint8_t state) {
    quantizer = state & 1;
    const int magnitude = ((level < 0 ? -level : level) + quantizer) >> 1;
    k = level < 0 ? -magnitude : magnitude;
    valid &= level_of(k, quantizer) == level;
    return NEXT_STATE[2 * state + (magnitude & 1)];
  }
};

// A symbol as a table of class c knows it, and its raw bits.
struct Symbol {
  int index, bits;
  uint32_t raw;

  Symbol(int k, int c, int reach) : bits(raw_bits(c)) {
    const int h = k >> bits;
    if (h < -reach || h > reach) {
      index = 2 * reach + 1;
      bits = ESCAPE_BITS;
    } else {
      index = h + reach;
    }
    raw = k & ((1u << bits) - 1);
  }
};

struct Step {
  uint32_t entry;  // frequency and cumulated frequency
  uint16_t raw;
  uint16_t bits;
};

// Writes a block from its end to its beginning.
class Encoder {
 public:
  Encoder(const Shape& shape, const uint32_t* symbols, const int32_t* reaches)
      : shape_(shape),
        symbols_(symbols),
        reaches_(reaches),
        steps_(shape.lanes * std::min(shape.block_rows, shape.d2)) {}

  // Bytes of the block, whose last one is before `past`; 0 where a level is none of its quantizer's.
  size_t encode(const int16_t* levels, int block, uint8_t* past) {
    const int row_count = shape_.row_count(block);
    next_ = past;
    std::fill_n(states_, MAX_LANES, BOUND);
    for (int64_t end = (shape_.d1 + shape_.lanes - 1) / shape_.lanes * shape_.lanes; end; end -= shape_.lanes) {
      const int64_t first = end - shape_.lanes;
      const int lanes = static_cast<int>(std::min<int64_t>(shape_.lanes, shape_.d1 - first));
      if (!walk(levels, shape_.first_row(block), row_count, first, lanes)) return 0;
      for (int r = row_count - 1; r >= 0; --r) {
        const Step* row = steps_.data() + r * lanes;
        for (int lane = lanes - 1; lane >= 0; --lane) put_raw(states_[lane], row[lane]);
        for (int lane = lanes - 1; lane >= 0; --lane) put(states_[lane], row[lane].entry);
      }
    }
    next_ -= 4 * shape_.lanes;
    std::memcpy(next_, states_, 4 * shape_.lanes);
    return past - next_;
  }

 private:
  bool walk(const int16_t* levels, int64_t first_row, int row_count, int64_t first, int lanes) {
    uint8_t states[MAX_LANES] = {};
    Path path;
    for (int r = 0; r < row_count; ++r) {
      const int16_t* from = levels + (first_row + r) * shape_.d1 + first;
      for (int lane = 0; lane < lanes; ++lane) {
        states[lane] = path.take(from[lane], states[lane]);
        const int c = class_of(shape_.rows[first_row + r], shape_.cols[first + lane]);
        const Symbol symbol(path.k, c, reaches_[c]);
        steps_[r * lanes + lane] = {symbols_[(2 * c + path.quantizer) * TABLE + symbol.index],
                                    static_cast<uint16_t>(symbol.raw), static_cast<uint16_t>(symbol.bits)};
      }
    }
    return path.valid;
  }

  void write(uint32_t& x) {
    const uint16_t word = static_cast<uint16_t>(x);
    next_ -= 2;
    std::memcpy(next_, &word, 2);
    x >>= 16;
  }

  void put(uint32_t& x, uint32_t entry) {
    const uint32_t frequency = entry & 0xFFFF;
    if (x >= frequency << (32 - PRECISION)) write(x);
    x = (x / frequency << PRECISION) + x % frequency + (entry >> 16);
  }

  void put_raw(uint32_t& x, const Step& step) {
    if (!step.bits) return;
    if (x >> (32 - step.bits)) write(x);
    x = x << step.bits | step.raw;
  }

  const Shape& shape_;
  const uint32_t* symbols_;
  const int32_t* reaches_;
  std::vector<Step> steps_;
  uint32_t states_[MAX_LANES];
  uint8_t* next_ = nullptr;
};

// A group of `LANES` columns, or of as many as `lanes` says where LANES is 0. What is no matter of tables and words
// is in loops of int16 that a compiler vectorizes.
template <int LANES>
void decode_group(Decoding& block, int lanes, const int16_t* cols, int16_t* out, ptrdiff_t stride) {
  const int count = LANES ? LANES : lanes;
  const uint32_t* slots = block.slots;
  int16_t bits[3][MAX_LANES] = {};  // of the states of the trellis, lowest first
  uint32_t x[MAX_LANES];
  std::copy_n(block.states, count, x);
  int16_t columns[MAX_LANES];
  std::copy_n(cols, count, columns);
  const int widest = *std::max_element(columns, columns + count);
  for (int r = 0; r < block.row_count; ++r, out += stride) {
    const int16_t row = block.rows[r];
    int16_t tables[MAX_LANES], symbols[MAX_LANES];
    for (int lane = 0; lane < count; ++lane) {
      tables[lane] = static_cast<int16_t>(2 * class_of(row, columns[lane]) + bits[0][lane]);
    }
    const auto take = [&](int lane) {
      const uint32_t entry = slots[static_cast<size_t>(tables[lane]) * SLOTS + x[lane] % SLOTS];
      x[lane] = (entry & 0xFFF) * (x[lane] >> PRECISION) + (entry >> 12 & 0xFFF);
      symbols[lane] = static_cast<int16_t>(static_cast<int>(entry) >> 24);
    };
    if (block.end - block.next >= 2 * count) {
      const uint8_t* next = block.next;
      for (int lane = 0; lane < count; ++lane) {
        take(lane);
        uint16_t word;
        std::memcpy(&word, next, 2);
        const uint32_t low = x[lane] < BOUND;  // without a branch, which could not be foreseen
        x[lane] = x[lane] << 16 * low | (word & -low);
        next += 2 * low;
      }
      block.next = next;
    } else {
      for (int lane = 0; lane < count; ++lane) {
        take(lane);
        block.refill(x[lane]);
      }
    }
    bool raw = class_of(row, widest) >= FIRST_RAW_CLASS;
    for (int lane = 0; lane < count; ++lane) raw |= symbols[lane] == ESCAPE;
    if (raw) {
      for (int lane = 0; lane < count; ++lane) symbols[lane] = block.symbol(symbols[lane], tables[lane], x[lane]);
    }
    for (int lane = 0; lane < count; ++lane) {
      const int16_t k = symbols[lane], low = bits[0][lane], middle = bits[1][lane], high = bits[2][lane];
      out[lane] = static_cast<int16_t>(level_of(k, low));
      // NEXT_STATE, written out
      bits[0][lane] = middle ^ (low & ~high);
      bits[1][lane] = (k & 1) ^ (low ? middle : high);
      bits[2][lane] = low;
    }
  }
  std::copy_n(x, count, block.states);
}

void decode_group(Decoding& block, int lanes, const int16_t* cols, int16_t* out, ptrdiff_t stride) {
  switch (lanes) {
    case 1: return decode_group<1>(block, 1, cols, out, stride);
    case 4: return decode_group<4>(block, 4, cols, out, stride);
    case 16: return decode_group<16>(block, 16, cols, out, stride);
    default: return decode_group<0>(block, lanes, cols, out, stride);
  }
}

// What is to be decoded: blocks between offsets, which are in order and inside the stream.
struct Task {
  const Shape& shape;
  const uint8_t* stream;
  const int64_t* offsets;
  const uint32_t* slots;
  DecodeSixteen decode_sixteen;
  int16_t* out;  // of block `first`
  int first;

  // Decodes `count` blocks, PAIR at most, together: while one waits for its tables, the other one calculates.
  Status run(int block, int count) const {
    if (count == PAIR && shape.row_count(block) != shape.row_count(block + 1)) {
      return std::max(run(block, 1), run(block + 1, 1));
    }
    Decoding decodings[PAIR];
    int16_t* outs[PAIR];
    for (int i = 0; i < count; ++i) {
      if (!begin(decodings[i], block + i)) return DAMAGED;
      outs[i] = out + (shape.first_row(block + i) - shape.first_row(first)) * shape.d1;
    }
    for (int64_t column = 0; column < shape.d1; column += shape.lanes) {
      const int lanes = static_cast<int>(std::min<int64_t>(shape.lanes, shape.d1 - column));
      const int16_t* cols = shape.cols + column;
      if (lanes == MAX_LANES && decode_sixteen) {
        decode_sixteen(decodings, count, cols, outs, shape.d1);
      } else {
        for (int i = 0; i < count; ++i) decode_group(decodings[i], lanes, cols, outs[i], shape.d1);
      }
      for (int i = 0; i < count; ++i) {
        if (decodings[i].overrun) return DAMAGED;
        outs[i] += lanes;
      }
    }
    Status status = OK;
    for (int i = 0; i < count; ++i) status = std::max(status, end(decodings[i]));
    return status;
  }

 private:
  bool begin(Decoding& decoding, int block) const {
    const uint8_t* from = stream + offsets[block];
    const int64_t bytes = offsets[block + 1] - offsets[block], head = 4 * shape.lanes;
    if (bytes < head || bytes % 2) return false;
    decoding = {shape.rows + shape.first_row(block), shape.row_count(block), slots, {}, from + head, from + bytes};
    std::memcpy(decoding.states, from, head);
    return std::all_of(decoding.states, decoding.states + shape.lanes, [](uint32_t x) { return x >= BOUND; });
  }

  Status end(const Decoding& decoding) const {
    const uint32_t* states = decoding.states;
    const bool ended = std::all_of(states, states + shape.lanes, [](uint32_t x) { return x == BOUND; });
    return !ended || decoding.unfit || decoding.next != decoding.end ? DAMAGED : OK;
  }
};

int decode(const Task& task, int last_block, int threads) {
  std::atomic<int> worst{OK};
  const int blocks = last_block - task.first;
  const int each = task.decode_sixteen && task.shape.lanes == MAX_LANES && blocks >= PAIR * threads ? PAIR : 1;
  parallel((blocks + each - 1) / each, threads, [&](int i) {
    const int block = task.first + i * each;
    const int status = task.run(block, std::min(each, last_block - block));
    for (int known = worst; status > known && !worst.compare_exchange_weak(known, status);) {
    }
  });
  return worst;
}

}  // namespace
}  // namespace cospadi

using namespace cospadi;

// Codes levels (d2, d1) in blocks, which lie in `out` one after another from offsets[block] on. `out` has room for
// 4 (lanes + levels) bytes a block. symbols[class][quantizer][index] is a frequency and 16 bits above a cumulated one.
EXPORT int cospadi_rans_encode(const int16_t* levels, int64_t d2, int64_t d1, const int16_t* rows, const int16_t* cols,
                               int64_t block_rows, int lanes, const uint32_t* symbols, const int32_t* reaches,
                               uint8_t* out, int64_t* offsets, int threads) try {
  const Shape shape{d2, d1, block_rows, lanes, rows, cols};
  const int blocks = shape.blocks();
  std::atomic<int> status{OK};
  parallel(blocks, threads, [&](int block) {
    try {
      uint8_t* end = out + block * shape.room(block_rows) + shape.room(shape.row_count(block));
      offsets[block + 1] = static_cast<int64_t>(Encoder(shape, symbols, reaches).encode(levels, block, end));
      if (!offsets[block + 1]) status = NO_LEVEL;
    } catch (const std::bad_alloc&) {
      status = OUT_OF_MEMORY;
    }
  });
  if (status != OK) return status;
  offsets[0] = 0;
  for (int block = 0; block < blocks; ++block) {
    const int64_t size = offsets[block + 1];
    const uint8_t* end = out + block * shape.room(block_rows) + shape.room(shape.row_count(block));
    std::memmove(out + offsets[block], end - size, size);
    offsets[block + 1] += offsets[block];
  }
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}

// Levels of blocks first_block to last_block - 1. Offsets ascend inside the stream.
EXPORT int cospadi_rans_decode(const uint8_t* stream, const int64_t* offsets, int first_block, int last_block,
                               int64_t d2, int64_t d1, const int16_t* rows, const int16_t* cols, int64_t block_rows,
                               int lanes, const uint32_t* slots, int16_t* out, int threads, int level) {
  const Shape shape{d2, d1, block_rows, lanes, rows, cols};
  return decode({shape, stream, offsets, slots, kernels_of(level).decode_sixteen, out, first_block}, last_block, threads);
}
