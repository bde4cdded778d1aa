// Trellis-coded quantization with error feedback: levels of a run of inputs, the cheapest path of each block of outputs.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#include "parallel.h"
#include "rans.h"

namespace cospadi {
namespace {

constexpr int STATES = 8;
constexpr float NEVER = std::numeric_limits<float>::infinity();

struct Run {
  float* target;          // (inputs, d2): what is to be told; feedback inside the run changes it
  const float* feedback;  // (inputs, inputs) of U, upper
  const float* steps;     // (inputs,)
  const float* scales;    // (d2,)
  const int16_t* cols;    // (inputs,) and rows (d2,): widths, whose sum is the index of a class
  const int16_t* rows;
  const float* prices;    // (classes, 2, symbols): what a symbol of each quantizer costs, in squared steps
  int classes, symbols;
  int16_t* levels;        // (inputs, d2)
  float* errors;          // (inputs, d2): (target - what levels stand for) / U_ii
  int inputs, d2;
};

// The cheapest symbol of each quantizer and parity for one output, as a magnitude, and what it costs.
struct Choices {
  float cost[4];
  int16_t symbol[4];
};

inline Choices choose(float magnitude, const float* prices, int symbols) {
  Choices found;
  for (int branch = 0; branch < 4; ++branch) {
    const int quantizer = branch >> 1, parity = branch & 1;
    const float place = (magnitude + quantizer) * 0.5f;
    int k = parity + 2 * static_cast<int>((std::max(place, static_cast<float>(parity)) - parity) * 0.5f);
    found.cost[branch] = NEVER;
    for (int i = 0; i < 2; ++i, k += 2) {
      const float error = magnitude - (k ? static_cast<float>(2 * k - quantizer) : 0.0f);
      const float cost = error * error + prices[quantizer * symbols + std::min(k, symbols - 1)];
      if (cost < found.cost[branch]) {
        found.cost[branch] = cost;
        found.symbol[branch] = static_cast<int16_t>(k);
      }
    }
  }
  return found;
}

void quantize_block(const Run& run, int begin, int end) {
  const int count = end - begin;
  std::vector<uint8_t> origins(static_cast<size_t>(count) * STATES);
  std::vector<int16_t> symbols(static_cast<size_t>(count) * 4);
  for (int i = 0; i < run.inputs; ++i) {
    const size_t row = static_cast<size_t>(i) * run.d2 + begin;
    const float* target = run.target + row;
    float total[STATES];
    std::fill(total, total + STATES, NEVER);
    total[0] = 0;
    for (int j = 0; j < count; ++j) {
      const int width = std::clamp(run.cols[i] + run.rows[begin + j], 0, run.classes - 1);
      const float* prices = run.prices + static_cast<size_t>(width) * 2 * run.symbols;
      const float magnitude = std::min(std::fabs(target[j] / (run.steps[i] * run.scales[begin + j])), 32000.0f);
      const Choices found = choose(magnitude, prices, run.symbols);
      std::memcpy(&symbols[static_cast<size_t>(j) * 4], found.symbol, sizeof found.symbol);
      float next[STATES];
      std::fill(next, next + STATES, NEVER);
      uint8_t* origin = &origins[static_cast<size_t>(j) * STATES];
      for (int state = 0; state < STATES; ++state) {
        for (int parity = 0; parity < 2; ++parity) {
          const float cost = total[state] + found.cost[(state & 1) * 2 + parity];
          const int to = NEXT_STATE[2 * state + parity];
          if (cost < next[to]) {
            next[to] = cost;
            origin[to] = static_cast<uint8_t>(state * 2 + parity);
          }
        }
      }
      const float least = *std::min_element(next, next + STATES);  // so that sums stay small
      for (int state = 0; state < STATES; ++state) total[state] = next[state] - least;
    }
    int state = static_cast<int>(std::min_element(total, total + STATES) - total);
    int16_t* levels = run.levels + row;
    float* errors = run.errors + row;
    const float* feedback = run.feedback + static_cast<size_t>(i) * run.inputs;
    for (int j = count; j-- > 0;) {
      const int origin = origins[static_cast<size_t>(j) * STATES + state];
      state = origin >> 1;
      const int quantizer = state & 1, k = symbols[static_cast<size_t>(j) * 4 + quantizer * 2 + (origin & 1)];
      const int level = k ? 2 * k - quantizer : 0;
      levels[j] = static_cast<int16_t>(target[j] < 0 ? -level : level);
      errors[j] = (target[j] - levels[j] * (run.steps[i] * run.scales[begin + j])) / feedback[i];
    }
    for (int later = i + 1; later < run.inputs; ++later) {
      float* changed = run.target + static_cast<size_t>(later) * run.d2 + begin;
      const float factor = feedback[later];
      for (int j = 0; j < count; ++j) changed[j] -= factor * errors[j];
    }
  }
}

}  // namespace
}  // namespace cospadi

using namespace cospadi;

EXPORT int cospadi_quantize(float* target, const float* feedback, const float* steps, const float* scales,
                            const int16_t* cols, const int16_t* rows, const float* prices, int classes, int symbols,
                            int16_t* levels, float* errors, int inputs, int d2, int block_rows, int threads) try {
  const Run run{target,  feedback, steps,  scales, cols,   rows, prices,
                classes, symbols,  levels, errors, inputs, d2};
  parallel((d2 + block_rows - 1) / block_rows, threads, [&](int block) {
    quantize_block(run, block * block_rows, std::min(d2, (block + 1) * block_rows));
  });
  return OK;
} catch (const std::bad_alloc&) {
  return OUT_OF_MEMORY;
}
