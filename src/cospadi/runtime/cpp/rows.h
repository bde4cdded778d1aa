// Rows of x or z as kernels take them, and sums on their way out: conversions and batches.
#pragma once

#include <algorithm>
#include <bit>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace cospadi {

enum Dtype { FLOAT = 0, BF16 = 1, HALF = 2 };

constexpr int RUN = MAX_COLUMNS;  // columns a task takes

inline uint16_t to_bf16(float value) {
  const uint32_t pattern = std::bit_cast<uint32_t>(value), rounded = pattern + 0x7FFF + (pattern >> 16 & 1);
  const bool nan = (pattern & 0x7FFFFFFF) > 0x7F800000;
  return static_cast<uint16_t>((nan ? pattern | 0x400000 : rounded) >> 16);  // no branch: loops take many at once
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7F800000 | mantissa << 13);
  if (exponent) return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}

inline uint16_t to_half(float value) {
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

inline int runs(int d2) { return (d2 + RUN - 1) / RUN; }

// A batch of rows of z as a kernel takes them, on the boundary of a cache line.
template <class Entry>
class Rows {
 public:
  // In memory for as many entries as `entries` says.
  Rows(int64_t first, int count, Entry* data)
      : first_(first), count_(count), padded_count_(std::bit_ceil(static_cast<unsigned>(count))), data_(data) {}
  static size_t entries(int count, int k) {
    return static_cast<size_t>(std::bit_ceil(static_cast<unsigned>(count))) * padded(k);
  }
  // With a scale for each column, if any.
  void fill(const void* z, int k, int dtype, const float* scales, Scale scale_32 = nullptr) {
    if (k % ATOMS || count_ != padded_count_) std::fill_n(data_, entries(count_, k), Entry{0});
    for (int r = 0; r < count_; ++r) {
      const size_t from = static_cast<size_t>(first_ + r) * k;
      for (int j = 0; j < k; j += ATOMS) {
        const int atoms = std::min(ATOMS, k - j);
        Entry* to = data_ + place_in_z(padded_count_, r, j);
        if (sizeof(Entry) == 2 && scales && scale_32 && atoms == ATOMS) {
          scale_32(static_cast<const uint16_t*>(z) + from + j, scales + j, reinterpret_cast<uint16_t*>(to));
        } else if (scales) {
          scale(z, from + j, scales + j, atoms, dtype, to);
        } else {
          copy(z, from + j, atoms, dtype, to);
        }
      }
    }
  }
  const Entry* data() const { return data_; }
  int64_t first() const { return first_; }
  int count() const { return count_; }
  int padded_count() const { return padded_count_; }  // with rows of zeros

 private:
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

  static void scale(const void* z, size_t at, const float* scales, int count, int dtype, Entry* to) {
    const auto each = [&](auto entry) {
      for (int i = 0; i < count; ++i) {
        const float value = entry(at + i) * scales[i];
        if constexpr (sizeof(Entry) == 2) {
          to[i] = to_bf16(value);
        } else {
          to[i] = value;
        }
      }
    };
    const auto bits = static_cast<const uint16_t*>(z);
    if (dtype == FLOAT) return each([&](size_t i) { return static_cast<const float*>(z)[i]; });
    if (dtype == BF16) return each([&](size_t i) { return to_float(bits[i]); });
    each([&](size_t i) { return half_to_float(bits[i]); });
  }

  int64_t first_;
  int count_, padded_count_;
  Entry* data_;
};

inline void store(void* y, size_t at, float value, int dtype) {
  if (dtype == FLOAT) {
    static_cast<float*>(y)[at] = value;
  } else {
    static_cast<uint16_t*>(y)[at] = dtype == BF16 ? to_bf16(value) : to_half(value);
  }
}

// Memory of a cache line.
struct alignas(64) Line {
  uint8_t bytes[64];
};

// All rows of z, in batches of at most so many as kernels take them. Their memory is this thread's, until it makes others of that type: what
// is given back to the system has to be cleared by it for each product.
template <class Entry>
std::vector<Rows<Entry>> in_batches(const void* z, int64_t rows, int k, int dtype, const float* scales = nullptr,
                                    int threads = 1, int most = MAX_ROWS, Scale scale_32 = nullptr) {
  thread_local std::vector<Line> room;
  const size_t lines = Rows<Entry>::entries(most, k) * sizeof(Entry) / sizeof(Line);  // of a batch
  const size_t count = (rows + most - 1) / most;
  if (room.size() < count * lines) room.resize(count * lines);
  std::vector<Rows<Entry>> batches;
  batches.reserve(count);
  for (int64_t first = 0; first < rows; first += most) {
    auto* data = reinterpret_cast<Entry*>(room.data() + batches.size() * lines);
    batches.emplace_back(first, static_cast<int>(std::min<int64_t>(most, rows - first)), data);
  }
  parallel(static_cast<int>(batches.size()), threads, [&](int b) { batches[b].fill(z, k, dtype, scales, scale_32); });
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

}  // namespace cospadi
