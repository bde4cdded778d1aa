// Numbers between a dense matrix and the entries of it that a support mask has, for training.
#include <bit>

#include "kernels.h"
#include "parallel.h"

namespace cospadi {
namespace {

constexpr int ROWS_AT_ONCE = 32;

// Calls visit(i, at) for the i-th number of the stream, which is entry `at` of a dense (d2, k).
template <class Visit>
void for_each_entry(const uint8_t* support, const int32_t* offsets, int d2, int k, int threads, Visit visit) {
  const int row_bytes = (k + 7) / 8;
  parallel((d2 + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, threads, [&](int run) {
    for (int c = run * ROWS_AT_ONCE, end = std::min(c + ROWS_AT_ONCE, d2); c < end; ++c) {
      const uint8_t* mask = support + static_cast<size_t>(c) * row_bytes;
      const size_t first = static_cast<size_t>(c) * k;
      size_t i = offsets[c];
      for (int byte = 0; byte < row_bytes; byte += 4) {
        for (uint32_t left = mask_at(mask, byte, row_bytes); left; left &= left - 1, ++i) {
          const int j = 8 * byte + std::countr_zero(left);
          if (j < k) visit(i, first + j);
        }
      }
    }
  });
}

}  // namespace
}  // namespace cospadi

using namespace cospadi;

// A dense (d2, k) of floats, of numbers that lie column by column. `offsets` are those of the mask.
EXPORT void cospadi_scatter(const float* values, float* dense, const uint8_t* support, const int32_t* offsets, int d2,
                            int k, int threads) {
  std::memset(dense, 0, sizeof(float) * d2 * k);
  for_each_entry(support, offsets, d2, k, threads, [&](size_t i, size_t at) { dense[at] = values[i]; });
}

// The other way, from a dense (d2, k) of bf16, or of floats.
EXPORT void cospadi_gather(const void* dense, int is_bf16, float* values, const uint8_t* support,
                           const int32_t* offsets, int d2, int k, int threads) {
  if (is_bf16) {
    const auto* from = static_cast<const uint16_t*>(dense);
    for_each_entry(support, offsets, d2, k, threads, [&](size_t i, size_t at) { values[i] = to_float(from[at]); });
  } else {
    const auto* from = static_cast<const float*>(dense);
    for_each_entry(support, offsets, d2, k, threads, [&](size_t i, size_t at) { values[i] = from[at]; });
  }
}
