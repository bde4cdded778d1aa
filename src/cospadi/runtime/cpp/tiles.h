// Products of many rows: 32 outputs at a time are unpacked once, into a near cache, and multiplied with all rows.
#pragma once

#include <atomic>
#include <new>

#include "parallel.h"
#include "rows.h"

namespace cospadi {

static_assert(TILE == RUN);

// From so many rows on it pays to unpack; levels, which kernels multiply faster; both, where two batches are multiplied
// at once.
constexpr int TILED_ROWS = 9, TILED_LEVEL_ROWS = 25, TWICE_TILED_ROWS = 5;

// Inputs of a tile that two batches are multiplied with while they are in the first cache.
constexpr int TWICE_DEEP = 512;

// Tiles that x is read for at once where it has more than FEW_ROWS, and two batches are multiplied at once: so fast that
// reading x takes longer.
constexpr int GROUP = 4, FEW_ROWS = 64;

// Entries of x, 4 MB, that every tile is multiplied with while they are in the last cache.
constexpr int64_t NEAR = 2 << 20;

// Entries from a tile's row to the next: whole cache lines, and no power of two, which would share few places of a cache.
inline size_t tile_stride(int k) { return padded(k) + ATOMS; }

// A thread's room for a tile and for sums, on boundaries of cache lines; kept for the next product.
struct Room {
  uint16_t* tile;
  float* sums;
};
Room room_of_thread(size_t tile_entries, size_t sum_entries);

// y (rows, d2) = x S in bf16, times a scale for each input and output, if any. unpack(first, count, begin, end, tile,
// stride) makes a tile of outputs from `first` on and inputs from `begin` on, at most `deep` of them, a multiple of ATOMS;
// stored(first, count) is the memory that it reads for all inputs of some outputs.
template <class Unpack, class Stored>
void multiply_through_tiles(const Kernels& kernels, const void* x, const float* inputs, void* y, int64_t rows, int d2,
                            int k, const float* outputs, int threads, int deep, const Unpack& unpack,
                            const Stored& stored) {
  const int64_t parts = (rows * k + NEAR - 1) / NEAR, together = (rows + parts - 1) / parts;
  if (parts > 1) {
    for (int64_t first = 0; first < rows; first += together) {
      const auto* some = static_cast<const uint16_t*>(x) + first * k;
      auto* to = static_cast<uint16_t*>(y) + first * d2;
      multiply_through_tiles(kernels, some, inputs, to, std::min(together, rows - first), d2, k, outputs, threads, deep,
                             unpack, stored);
    }
    return;
  }
  std::atomic<bool> out_of_memory{false};
  const bool twice = kernels.multiply_tile_twice;
  const int most = twice ? TWICE_ROWS : MAX_ROWS;
  const auto batches = in_batches<uint16_t>(x, rows, k, BF16, inputs, threads, most, kernels.scale);
  const size_t stride = tile_stride(std::min(k, deep)), sums_of_tile = batches.size() * most * TILE;
  const int group = twice && rows > FEW_ROWS ? std::clamp(runs(d2) / (2 * threads), 1, GROUP) : 1;
  parallel((runs(d2) + group - 1) / group, threads, [&](int task) {
    const int first = task * group * TILE, outputs_here = std::min(group * TILE, d2 - first);
    const int tiles = runs(outputs_here);
    Room room;
    try {
      room = room_of_thread(group * TILE * stride, group * sums_of_tile);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
      return;
    }
    std::fill_n(room.sums, tiles * sums_of_tile, 0.0f);
    const int next = first + threads * group * TILE;  // most probably this thread's
    Ahead ahead = next < d2 ? stored(next, std::min(group * TILE, d2 - next)) : Ahead{};
    const size_t part = (ahead.count * deep + k - 1) / k;  // is fetched during the product with some inputs
    for (int begin = 0; begin < k; begin += deep) {
      const int end = std::min(k, begin + deep);
      for (int t = 0; t < tiles; ++t) {
        const int count = std::min(TILE, outputs_here - t * TILE);
        unpack(first + t * TILE, count, begin, end, room.tile + t * TILE * stride, stride);
      }
      Ahead some{ahead.bytes, std::min(part, ahead.count)};
      ahead = {ahead.bytes + some.count, ahead.count - some.count};
      const int near = twice ? TWICE_DEEP : end - begin;
      for (int at = begin; at < end; at += near) {
        const int width = padded(std::min(near, end - at));
        size_t b = 0;
        for (int both; b < batches.size(); b += both) {
          const Rows<uint16_t>& batch = batches[b];
          const uint16_t* from = batch.data() + place_in_z(batch.padded_count(), 0, at);
          both = twice && b + 1 < batches.size() && batches[b + 1].padded_count() == most ? 2 : 1;
          for (int t = 0; t < tiles; ++t) {
            const uint16_t* tile = room.tile + t * TILE * stride + (at - begin);
            float* sums = room.sums + t * sums_of_tile + b * most * TILE;
            if (both == 2) {
              kernels.multiply_tile_twice(tile, stride, width, from, batches[b + 1].data() - batch.data(), sums, some);
            } else {
              kernels.multiply_tile(tile, stride, width, from, batch.padded_count(), sums, some);
            }
            some.count = 0;
          }
        }
      }
    }
    for (int t = 0; t < tiles; ++t) {
      const int begin = first + t * TILE, count = std::min(TILE, d2 - begin);
      const float* sums = room.sums + t * sums_of_tile;
      for (const Rows<uint16_t>& batch : batches) {
        for (int r = 0; r < batch.count(); ++r) {
          uint16_t* to = static_cast<uint16_t*>(y) + static_cast<size_t>(batch.first() + r) * d2 + begin;
          const float* sum = sums + r * TILE;
          if (kernels.round && count == TILE) {
            kernels.round(sum, outputs ? outputs + begin : nullptr, to);
            continue;
          }
          for (int c = 0; c < count; ++c) to[c] = to_bf16(outputs ? sum[c] * outputs[begin + c] : sum[c]);
        }
        sums += most * TILE;
      }
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

inline bool pays_to_unpack(const Kernels& kernels, int64_t rows, int otherwise) {
  return kernels.multiply_tile && rows >= (kernels.multiply_tile_twice ? TWICE_TILED_ROWS : otherwise);
}

#ifdef COSPADI_X86
void interleave_avx512(uint16_t* tile, size_t stride, int width);
// The same of the half of a tile.
void interleave_half_avx512(uint16_t* half, size_t stride, int width);
void unpack_levels_tile_avx512(const LevelRows&, int begin, int end, uint16_t* tile, size_t stride);
void scale_avx512(const uint16_t* x, const float* scales, uint16_t* to);
void round_avx512(const float* sums, const float* scales, uint16_t* to);
void multiply_tile_avx512(const uint16_t* tile, size_t stride, int width, const uint16_t* x, int rows, float* sums,
                          Ahead ahead);
#endif

}  // namespace cospadi
