// The C interface, which Python calls through ctypes: levels, threads, conversions, and the ends of buffers.
#include <algorithm>
#include <bit>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace cospadi {

Parallel openmp = nullptr;

namespace {

enum Dtype { FLOAT = 0, BF16 = 1, HALF = 2 };
enum Status { OK = 0, STREAM_TOO_SHORT = 1, OUT_OF_MEMORY = 2 };

constexpr int RUN = MAX_COLUMNS;  // columns a task takes

const Kernels* const LEVELS[] = {
    &portable_kernels,
#ifdef COSPADI_X86
    &avx2_kernels,
    &avx512_kernels,
#endif
};
constexpr int LEVEL_COUNT = sizeof(LEVELS) / sizeof(LEVELS[0]);

uint16_t to_bf16(float value) {
  uint32_t pattern = std::bit_cast<uint32_t>(value);
  if ((pattern & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>(pattern >> 16 | 0x40);
  return static_cast<uint16_t>((pattern + 0x7FFF + (pattern >> 16 & 1)) >> 16);
}

float half_to_float(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7F800000 | mantissa << 13);
  if (exponent) return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}

uint16_t to_half(float value) {
  const uint32_t pattern = std::bit_cast<uint32_t>(value);
  const uint32_t sign = pattern >> 16 & 0x8000, magnitude = pattern & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
  if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // rounds to 65536 or more
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3F000000));
  }
  return static_cast<uint16_t>(sign | (magnitude + 0xFFF + (magnitude >> 13 & 1) - 0x38000000) >> 13);
}

// S with the last columns' values in a copy, after which a kernel may read on.
class Coefficients {
 public:
  Coefficients(const uint8_t* support, const uint8_t* values, size_t value_bytes, const int32_t* offsets, int d2,
               int k, int value_bits)
      : all_{d2, k, value_bits, support, (k + 7) / 8, values, 0, offsets}, tail_(d2) {
    while (tail_ > 0 && (all_.bit(tail_) >> 3) + MARGIN > value_bytes) --tail_;
    // Column tail_ may end closer to the end than that: it begins the copy.
    const size_t first = all_.bit(tail_) >> 3;
    copy_.assign(value_bytes - std::min(first, value_bytes) + MARGIN, 0);
    if (first < value_bytes) std::memcpy(copy_.data(), values + first, value_bytes - first);
  }

  // Calls use(columns, first) for the columns from begin to end, in one part or two.
  template <class Use>
  void in_parts(int begin, int end, const Use& use) const {
    if (begin < tail_) use(part(begin, std::min(end, tail_)), begin);
    if (end > tail_) {
      const int first = std::max(begin, tail_);
      Columns last = part(first, end);
      last.values = copy_.data();
      last.first_bit = all_.bit(tail_) >> 3 << 3;
      use(last, first);
    }
  }

 private:
  Columns part(int begin, int end) const {
    Columns run = all_;
    run.count = end - begin;
    run.support = all_.mask(begin);
    run.offsets = all_.offsets + begin;
    return run;
  }

  Columns all_;
  int tail_;  // columns before it end MARGIN bytes before the stream's end, or earlier
  std::vector<uint8_t> copy_;
};

int runs(int d2) { return (d2 + RUN - 1) / RUN; }

// A batch of rows of z as a kernel takes them, on the boundary of a cache line.
template <class Entry>
class Rows {
 public:
  Rows(const void* z, int64_t first, int count, int k, int dtype)
      : first_(first),
        count_(count),
        padded_count_(static_cast<int>(std::bit_ceil(static_cast<unsigned>(count)))),
        memory_(static_cast<size_t>(padded_count_) * padded(k) + LINE, 0) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    data_ = memory_.data() + (-address % 64) / sizeof(Entry);
    for (int r = 0; r < count; ++r) {
      const size_t from = static_cast<size_t>(first + r) * k;
      for (int j = 0; j < k; j += ATOMS) {
        copy(z, from + j, std::min(ATOMS, k - j), dtype, data_ + place_in_z(padded_count_, r, j));
      }
    }
  }
  const Entry* data() const { return data_; }
  int64_t first() const { return first_; }
  int count() const { return count_; }
  int padded_count() const { return padded_count_; }  // with rows of zeros

 private:
  static constexpr size_t LINE = 64 / sizeof(Entry);

  static void copy(const void* z, size_t at, int count, int dtype, Entry* to) {
    if (dtype == FLOAT || sizeof(Entry) == 2) {
      std::memcpy(to, static_cast<const Entry*>(z) + at, sizeof(Entry) * count);
    } else {
      const uint16_t* bits = static_cast<const uint16_t*>(z) + at;
      for (int i = 0; i < count; ++i) {
        to[i] = static_cast<Entry>(dtype == BF16 ? to_float(bits[i]) : half_to_float(bits[i]));
      }
    }
  }

  int64_t first_;
  int count_, padded_count_;
  std::vector<Entry> memory_;  // moves with its contents in place, so data_ stays right
  Entry* data_;
};

void store(void* y, size_t at, float value, int dtype) {
  if (dtype == FLOAT) {
    static_cast<float*>(y)[at] = value;
  } else {
    static_cast<uint16_t*>(y)[at] = dtype == BF16 ? to_bf16(value) : to_half(value);
  }
}

// All rows of z, in batches as kernels take them.
template <class Entry>
std::vector<Rows<Entry>> in_batches(const void* z, int64_t rows, int k, int dtype) {
  std::vector<Rows<Entry>> batches;
  for (int64_t first = 0; first < rows; first += MAX_ROWS) {
    batches.emplace_back(z, first, static_cast<int>(std::min<int64_t>(MAX_ROWS, rows - first)), k, dtype);
  }
  return batches;
}

// Rounds sums of columns `column` .. `column + count - 1` to y (rows, d2).
template <class Entry>
void store_sums(const Rows<Entry>& batch, const float* sums, void* y, int d2, int column, int count, int dtype) {
  for (int r = 0; r < batch.count(); ++r) {
    const size_t at = static_cast<size_t>(batch.first() + r) * d2 + column;
    for (int c = 0; c < count; ++c) store(y, at + c, sums[c * batch.padded_count() + r], dtype);
  }
}

// Every run of columns is multiplied with all batches of rows while it is in a near cache.
template <class Entry, class Multiply>
void multiply(const Coefficients& s, Multiply multiply_rows, const void* z, void* y, int64_t rows, int d2, int k,
              int dtype, int threads) {
  const auto batches = in_batches<Entry>(z, rows, k, dtype);
  parallel(runs(d2), threads, [&](int run) {
    s.in_parts(run * RUN, std::min((run + 1) * RUN, d2), [&](const Columns& columns, int column) {
      float sums[MAX_ROWS * RUN];
      for (const Rows<Entry>& batch : batches) {
        multiply_rows(columns, batch.data(), batch.padded_count(), sums);
        store_sums(batch, sums, y, d2, column, columns.count, dtype);
      }
    });
  });
}

bool fits(size_t value_bytes, const int32_t* offsets, int d2, int value_bits) {
  return static_cast<uint64_t>(offsets[d2]) * value_bits <= 8 * static_cast<uint64_t>(value_bytes);
}

}  // namespace

const Kernels& kernels_of(int level) { return *LEVELS[level]; }

}  // namespace cospadi

using namespace cospadi;

// Levels of instructions that were built, best last.
EXPORT int cospadi_levels() { return LEVEL_COUNT; }
EXPORT const char* cospadi_level_name(int level) { return LEVELS[level]->name; }
EXPORT int cospadi_level_supported(int level) { return LEVELS[level]->supported(); }

EXPORT void cospadi_use_openmp(void* gomp_parallel) { openmp = reinterpret_cast<Parallel>(gomp_parallel); }

// y (rows, d2) = z (rows, k) S, both contiguous and of `dtype`; sums are made in float.
EXPORT int cospadi_multiply(const void* z, void* y, int64_t rows, int dtype, const uint8_t* support,
                            const uint8_t* values, size_t value_bytes, const int32_t* offsets, int d2, int k,
                            int value_bits, int threads, int level) try {
  if (!fits(value_bytes, offsets, d2, value_bits)) return STREAM_TOO_SHORT;
  const Kernels& kernels = *LEVELS[level];
  const Coefficients s(support, values, value_bytes, offsets, d2, k, value_bits);
  if (dtype == BF16 && kernels.multiply_bf16) {
    multiply<uint16_t>(s, kernels.multiply_bf16, z, y, rows, d2, k, dtype, threads);
  } else {
    multiply<float>(s, kernels.multiply_float, z, y, rows, d2, k, dtype, threads);
  }
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}

EXPORT int cospadi_level_multiplies_dense(int level) { return LEVELS[level]->multiply_dense != nullptr; }

// z (rows, k) = x (rows, d1) matrix^T for a bf16 matrix (k, d1), all contiguous and in bf16; sums are made in float.
EXPORT int cospadi_multiply_dense(const void* x, void* z, int64_t rows, const uint16_t* matrix, int k, int d1,
                                  int threads, int level) try {
  const auto batches = in_batches<uint16_t>(x, rows, d1, BF16);
  parallel(runs(k), threads, [&](int run) {
    const int first = run * RUN, count = std::min(RUN, k - first);
    float sums[MAX_ROWS * RUN];
    for (const Rows<uint16_t>& batch : batches) {
      LEVELS[level]->multiply_dense(matrix + static_cast<size_t>(first) * d1, count, d1, batch.data(),
                                    batch.padded_count(), sums);
      store_sums(batch, sums, z, k, first, count, BF16);
    }
  });
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}

// Columns `begin` to `end` of S as rows of k entries, of `dtype` FLOAT or BF16.
EXPORT int cospadi_unpack(void* out, int dtype, int begin, int end, const uint8_t* support, const uint8_t* values,
                          size_t value_bytes, const int32_t* offsets, int d2, int k, int value_bits, int threads,
                          int level) try {
  if (!fits(value_bytes, offsets, d2, value_bits)) return STREAM_TOO_SHORT;
  const Kernels& kernels = *LEVELS[level];
  const Coefficients s(support, values, value_bytes, offsets, d2, k, value_bits);
  parallel(runs(end - begin), threads, [&](int run) {
    const int first = begin + run * RUN;
    s.in_parts(first, std::min(first + RUN, end), [&](const Columns& columns, int column) {
      const size_t at = static_cast<size_t>(column - begin) * k;
      if (dtype == BF16) {
        kernels.unpack_bf16(columns, static_cast<uint16_t*>(out) + at);
      } else {
        kernels.unpack_float(columns, static_cast<float*>(out) + at);
      }
    });
  });
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}
