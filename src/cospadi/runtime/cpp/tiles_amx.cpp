// Many rows with 32 outputs that were unpacked, in the registers of AMX: a tile's half is one of them for 32 inputs.
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "avx512.h"
#include "kernels.h"
#include "tiles.h"

namespace cospadi {
namespace {

constexpr int LANES = 16, LINE = 64;

// Registers, which GCC wants as digits: 0 to 3 have the sums of each half and batch, 4 and 5 the rows of each batch, 6
// and 7 each half of the tile.
constexpr int OF_ROWS = 6, USED = 8;

struct alignas(LINE) Shapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

bool has_amx() {
  unsigned a, b, c, d;
  constexpr unsigned BF16_TILES = 1u << 22, TILES = 1u << 24, SAVED = 1u << 27;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & SAVED)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (BF16_TILES | TILES)) != (BF16_TILES | TILES)) return false;
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr uint32_t STATES = 3u << 17;  // of tiles and their shapes, which the system keeps for each thread
  if ((low & STATES) != STATES) return false;
  constexpr int ASK = 0x1023, DATA = 18;  // arch_prctl's ARCH_REQ_XCOMP_PERM, for all threads
  return syscall(SYS_arch_prctl, ASK, DATA) == 0;
}

bool supported() { return avx512_kernels.supported() && has_amx(); }

// Says what the registers hold, for as long as it lives.
class Configured {
 public:
  explicit Configured(int rows) {
    Shapes shapes;
    for (int one = 0; one < USED; ++one) {
      shapes.bytes[one] = LINE;
      shapes.rows[one] = static_cast<uint8_t>(one < OF_ROWS ? rows : LANES);
    }
    _tile_loadconfig(&shapes);
  }
  ~Configured() { _tile_release(); }
  Configured(const Configured&) = delete;
  Configured& operator=(const Configured&) = delete;
};

// Fetches, for each 32 inputs, a part of what is ahead.
class Fetch {
 public:
  Fetch(Ahead ahead, int width)
      : bytes_(ahead.bytes), lines_(static_cast<int>((ahead.count * ATOMS / width + LINE - 1) / LINE)) {}
  void operator()() {
    for (int line = 0; line < lines_; ++line, bytes_ += LINE) {
      _mm_prefetch(reinterpret_cast<const char*>(bytes_), _MM_HINT_T1);
    }
  }

 private:
  const uint8_t* bytes_;
  int lines_;
};

constexpr size_t SUMS = TILE * sizeof(float), X = ATOMS * sizeof(uint16_t);  // from a row to the next

void multiply_tile_amx(const uint16_t* tile, size_t stride, int width, const uint16_t* x, int rows, float* sums,
                       Ahead ahead) {
  const Configured configured(rows);
  Fetch fetch(ahead, width);
  _tile_loadd(0, sums, SUMS);
  _tile_loadd(1, sums + LANES, SUMS);
  for (int i = 0; i < width; i += ATOMS, x += static_cast<size_t>(rows) * ATOMS) {
    fetch();
    _tile_loadd(4, x, X);
    _tile_loadd(6, tile + i, stride * sizeof(uint16_t));
    _tile_loadd(7, tile + LANES * stride + i, stride * sizeof(uint16_t));
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  _tile_stored(0, sums, SUMS);
  _tile_stored(1, sums + LANES, SUMS);
}

void multiply_tile_twice_amx(const uint16_t* tile, size_t stride, int width, const uint16_t* x, size_t second,
                             float* sums, Ahead ahead) {
  const Configured configured(TWICE_ROWS);
  Fetch fetch(ahead, width);
  float* more = sums + TWICE_ROWS * TILE;
  _tile_loadd(0, sums, SUMS);
  _tile_loadd(1, sums + LANES, SUMS);
  _tile_loadd(2, more, SUMS);
  _tile_loadd(3, more + LANES, SUMS);
  for (int i = 0; i < width; i += ATOMS, x += TWICE_ROWS * ATOMS) {
    fetch();
    _tile_loadd(6, tile + i, stride * sizeof(uint16_t));
    _tile_loadd(4, x, X);
    _tile_loadd(5, x + second, X);
    _tile_loadd(7, tile + LANES * stride + i, stride * sizeof(uint16_t));
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, SUMS);
  _tile_stored(1, sums + LANES, SUMS);
  _tile_stored(2, more, SUMS);
  _tile_stored(3, more + LANES, SUMS);
}

}  // namespace

const Kernels& amx_kernels() {
  static const Kernels found = [] {
    Kernels kernels = avx512_kernels;
    kernels.name = "amx";
    kernels.supported = supported;
    kernels.multiply_tile = multiply_tile_amx;
    kernels.multiply_tile_twice = multiply_tile_twice_amx;
    return kernels;
  }();
  return found;
}

}  // namespace cospadi
