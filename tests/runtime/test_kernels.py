"""The CPU kernels at every level of instructions against float64 products, and at the ends of their buffers."""

import ctypes
import mmap
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cospadi import native
from cospadi.errors import UserError
from cospadi.format import packing
from cospadi.runtime import cpu, op
from cospadi.runtime.levels import pack_levels

SOURCES = Path(cpu.__file__).parent / "cpp"

pytestmark = pytest.mark.skipif(not cpu.AVAILABLE, reason="the CPU kernels were not built: no C++ compiler here")

LEVELS = list(native.levels())
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Error allowed in y, as a share of the sum of absolute products: rounding of the result, mostly."""


def stored(support: Tensor, bits: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mask, values and offsets of random coefficients on a support (d2, k), and S (k, d2) in float64."""
    values = torch.randn(int(support.sum()), generator=torch.Generator().manual_seed(seed))
    mask, packed = packing.pack_support(support), packing.pack_values(values, bits)
    dense = packing.unpack_coefficients(mask, packing.unpack_values(packed, len(values), bits), support.shape[1])
    return mask, packed, packing.column_offsets(mask), dense.double().T


def random_support(d2: int, k: int, density: float, seed: int = 0) -> Tensor:
    support = torch.rand(d2, k, generator=torch.Generator().manual_seed(seed)) < density
    support[0], support[-1] = False, True
    return support


def assert_product(y: Tensor, z: Tensor, coefficients: Tensor) -> None:
    expected, scale = z.double() @ coefficients, z.double().abs() @ coefficients.abs()
    smallest = torch.finfo(y.dtype).smallest_normal  # below it a result has fewer digits
    assert y.shape == expected.shape
    assert ((y.double() - expected).abs() <= TOLERANCE[y.dtype] * scale + smallest).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bits", [16, 14, 12, 10])
@pytest.mark.parametrize(("k", "d2"), [(1, 1), (7, 3), (33, 40), (64, 65), (200, 31), (515, 100)])
def test_products_and_unpacking(level: str, dtype: torch.dtype, bits: int, k: int, d2: int) -> None:
    for density in (0.0, 0.4, 1.0):
        mask, values, offsets, coefficients = stored(random_support(d2, k, density), bits)
        number = native.levels()[level]
        unpacked = cpu.unpack(mask, values, offsets, k, bits, dtype, level=number)
        assert torch.equal(unpacked.double(), coefficients.T.to(dtype).double())
        for rows in (1, 2, 3, 8, 11, 16, 17, 40):
            z = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).to(dtype)
            assert_product(cpu.sparse_matmul(z, mask, values, offsets, k, bits, number), z, coefficients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("k", "d2"), [(1, 1), (7, 3), (33, 40), (64, 65), (515, 100)])
def test_entries_of_a_mask_go_to_a_matrix_and_come_back(k: int, d2: int, threads: int, dtype: torch.dtype) -> None:
    """Against torch's masked_scatter and masked_select."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for density in (0.0, 0.4, 1.0):
        support = random_support(d2, k, density)
        mask = packing.pack_support(support)
        offsets = packing.column_offsets(mask)
        values = torch.randn(int(support.sum()), generator=torch.Generator().manual_seed(k)).to(dtype)
        dense = torch.randn(k, d2, generator=torch.Generator().manual_seed(d2)).to(dtype).T
        there, back = cpu.scatter(mask, values, offsets, k), cpu.gather(mask, dense, offsets)
        assert torch.equal(there, packing.unpack_coefficients(mask, values, k).float())
        assert torch.equal(back, dense[support].float())
        with pytest.raises(ValueError, match="support mask has"):
            cpu.scatter(mask, values[:-1] if len(values) else values.new_ones(1), offsets, k)
        with pytest.raises(ValueError, match="the matrix is"):
            cpu.gather(mask, dense[:-1], offsets)
        with pytest.raises(ValueError, match="the matrix is"):
            cpu.scatter(mask, values, offsets, k + 8)
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(0, 20), (2, 0, 20), (20,), (2, 3, 20), (1, 1, 20)])
def test_leading_shapes(shape: tuple[int, ...]) -> None:
    mask, values, offsets, coefficients = stored(random_support(9, 20, 0.5), 14)
    z = torch.randn(shape)
    assert_product(op.sparse_matmul(z, mask, values, offsets, mask.shape[0], 20, "mask", "f14"), z, coefficients)


def test_rows_that_are_not_contiguous() -> None:
    mask, values, offsets, coefficients = stored(random_support(9, 20, 0.5), 14)
    for z in (torch.randn(20, 3).T, torch.randn(3, 40)[:, ::2], torch.randn(1, 20).expand(30, 20)):
        assert not z.is_contiguous()
        assert_product(op.sparse_matmul(z, mask, values, offsets, mask.shape[0], 20, "mask", "f14"), z, coefficients)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("d1", "k"), [(1, 1), (31, 5), (64, 33), (200, 70), (515, 3)])
def test_dense_products(rows: int, d1: int, k: int) -> None:
    x, matrix = (torch.randn(n, d1, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (rows, k))
    if not cpu.can_multiply_dense(x, matrix):
        pytest.skip("this machine has no kernel for dense products")
    assert_product(cpu.dense_matmul(x, matrix), x, matrix.double().T)
    assert_product(op.dense_matmul(x.T.contiguous().T, matrix), x, matrix.double().T)


def test_dense_products_that_are_watched_are_torchs_own() -> None:
    x, matrix = torch.randn(2, 40).bfloat16(), torch.randn(9, 40).bfloat16().requires_grad_()
    assert op.dense_matmul(x, matrix).requires_grad
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        assert op.dense_matmul(x, matrix).dtype == torch.nn.functional.linear(x, matrix).dtype


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_mask(data: st.DataObject) -> None:
    k, d2 = data.draw(st.integers(1, 140), label="k"), data.draw(st.integers(1, 70), label="d2")
    level = data.draw(st.sampled_from(LEVELS), label="level")
    bits = data.draw(st.sampled_from([10, 12, 14, 16]), label="bits")
    dtype = data.draw(st.sampled_from(list(TOLERANCE)), label="dtype")
    rows = data.draw(st.integers(1, 20), label="rows")
    density, seed = data.draw(st.floats(0, 1), label="density"), data.draw(st.integers(0, 1000), label="seed")
    generator = torch.Generator().manual_seed(seed)
    support = torch.rand(d2, k, generator=generator) < density
    mask, values, offsets, coefficients = stored(support, bits, seed)
    z = torch.randn(rows, k, generator=generator).to(dtype)
    assert_product(cpu.sparse_matmul(z, mask, values, offsets, k, bits, native.levels()[level]), z, coefficients)


@pytest.mark.parametrize("level", LEVELS)
def test_halves_are_converted_as_torch_does(level: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    every = every[every.isfinite()]
    mask, values, offsets, _ = stored(torch.ones(1, 1, dtype=torch.bool), 16)
    values.fill_(1)
    z, number = every.reshape(-1, 1), native.levels()[level]
    y = torch.cat([cpu.sparse_matmul(part, mask, values, offsets, 1, 16, number) for part in z.split(16)])
    assert torch.equal(y, z)
    values.fill_(0.3330078125)  # products that a half has to round, down to its subnormals and past its range
    y = torch.cat([cpu.sparse_matmul(part, mask, values, offsets, 1, 16, number) for part in z.split(16)])
    assert torch.equal(y, (z.float() * values.float()).half())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_infinities_and_nans_stay_what_they_are(dtype: torch.dtype) -> None:
    mask, values, offsets, _ = stored(torch.ones(3, 2, dtype=torch.bool), 16)
    values.fill_(1)
    z = torch.tensor([[float("inf"), 1], [float("nan"), 1], [float("-inf"), 1]]).to(dtype)
    y = op.sparse_matmul(z, mask, values, offsets, mask.shape[0], 2, "mask", "bf16")
    assert torch.equal(y.isnan(), z.isnan().any(1, keepdim=True).expand(3, 3))
    assert (y[0] == float("inf")).all()
    assert (y[2] == float("-inf")).all()


@pytest.mark.parametrize("level", [level for level in LEVELS if level.startswith(("avx512", "amx"))])
@pytest.mark.parametrize("rows", [5, 9, 16, 17, 33, 70, 150])
@pytest.mark.parametrize(("d2", "k"), [(300, 100), (33, 1100)])
def test_rows_that_are_multiplied_with_tiles(level: str, rows: int, d2: int, k: int) -> None:
    """Whole and partial batches, one or two at once, of one tile or of several; masks, and levels with some beside."""
    number, generator = native.levels()[level], torch.Generator().manual_seed(rows)
    z = torch.randn(rows, k, generator=generator).bfloat16()
    mask, values, offsets, coefficients = stored(random_support(d2, k, 0.5), 14)
    y = cpu.sparse_matmul(z, mask, values, offsets, k, 14, number)
    assert_product(y, z, coefficients)
    numbers = (3 * torch.randn(d2, k, generator=generator)).round().to(torch.int16)
    outputs, inputs = (0.5 + torch.rand(size, generator=generator) for size in (d2, k))
    levels = pack_levels(numbers, outputs, inputs, 3 + torch.arange(d2, dtype=torch.int32) % 4)
    weight = (numbers.double() * inputs * outputs[:, None]).T
    y, expected = cpu.level_matmul(z, levels, number), z.double() @ weight
    assert (y.double() - expected).norm() <= 2**-7 * expected.norm()


@pytest.mark.parametrize("rows", [1, 16, 40, 150])
def test_threads_do_not_change_a_bit(rows: int) -> None:
    mask, values, offsets, _ = stored(random_support(200, 100, 0.5), 14)
    level = native.best_level()
    rows = rows if cpu._takes_any_rows(torch.bfloat16, level) else min(rows, cpu.DECODE_ROWS)
    z = torch.randn(rows, 100).bfloat16()
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(cpu.sparse_matmul(z, mask, values, offsets, 100, 14))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_values_that_do_not_match_the_mask_are_refused() -> None:
    mask, values, offsets, _ = stored(random_support(9, 20, 0.5), 14)
    with pytest.raises(ValueError, match="fewer than the support mask"):
        cpu.sparse_matmul(torch.randn(1, 20), mask, values[:-8].clone(), offsets, 20, 14)


def test_an_unknown_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSPADI_CPU", "mmx")
    native.best_level.cache_clear()
    try:
        with pytest.raises(UserError, match="COSPADI_CPU is 'mmx'"):
            native.best_level()
    finally:
        native.best_level.cache_clear()


def test_threads_are_those_of_torch() -> None:
    runtime = native.openmp_runtime()
    if runtime is None:
        pytest.skip("this torch has no OpenMP runtime that starts threads for others")
    script = (
        "import torch, threading, pathlib\n"
        "from cospadi.format import packing\n"
        "from cospadi.runtime import op\n"
        "torch.set_num_threads(2)\n"
        "count = lambda: len(list(pathlib.Path('/proc/self/task').iterdir()))\n"
        "torch.randn(400, 400) @ torch.randn(400, 400); torch.randn(4000, 4000).exp()\n"
        "before = count()\n"
        "support = torch.rand(500, 300) < 0.5\n"
        "mask = packing.pack_support(support); values = packing.pack_values(torch.randn(int(support.sum())), 14)\n"
        "op.sparse_matmul(torch.randn(2, 300), mask, values, None, 500, 300, 'mask', 'f14')\n"
        "print(before, count())\n"
    )
    if not Path("/proc/self/task").exists():
        pytest.skip("threads are counted in /proc")
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, after = map(int, run.stdout.split())
    assert before == after


def at_the_end_of_a_page(tensor: Tensor, keep: list[mmap.mmap]) -> Tensor:
    """A copy of a tensor whose last byte is the last one of a page, before a page that must not be touched."""
    nbytes = tensor.numel() * tensor.element_size()
    room = -(-max(nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    area = mmap.mmap(-1, room + mmap.PAGESIZE)
    keep.append(area)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    protect = ctypes.CDLL(None).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert protect(start + room, mmap.PAGESIZE, 0) == 0
    copy = torch.frombuffer(area, dtype=torch.uint8, count=room)[room - nbytes :].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


@pytest.mark.skipif(sys.platform != "linux", reason="pages are protected through Linux's libc")
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", [14, 16])
def test_no_byte_past_a_buffer_is_read(level: str, bits: int) -> None:
    """A read into the protected page would kill the process."""
    keep: list[mmap.mmap] = []
    number = native.levels()[level]
    for k, d2, density in ((1, 1, 1.0), (7, 5, 0.3), (100, 3, 0.01), (257, 33, 0.5), (515, 64, 1.0)):
        mask, values, offsets, coefficients = stored(random_support(d2, k, density, k), bits)
        mask, values, offsets = (at_the_end_of_a_page(tensor, keep) for tensor in (mask, values, offsets))
        unpacked = cpu.unpack(mask, values, offsets, k, bits, torch.bfloat16, level=number)
        assert torch.equal(unpacked.double(), coefficients.T)
        for dtype, rows in product(TOLERANCE, (3, 17)):
            z = at_the_end_of_a_page(torch.randn(rows, k).to(dtype), keep)
            assert_product(cpu.sparse_matmul(z, mask, values, offsets, k, bits, number), z, coefficients)
        matrix = at_the_end_of_a_page(torch.randn(d2, k).bfloat16(), keep)
        x = at_the_end_of_a_page(torch.randn(3, k).bfloat16(), keep)
        if cpu.can_multiply_dense(x, matrix):
            assert_product(cpu.dense_matmul(x, matrix), x, matrix.double().T)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_under_address_sanitizer(tmp_path: Path) -> None:
    """The same kernels, built with the sanitizer, on exactly sized heap buffers: any stray access ends the program."""
    driver = tmp_path / "driver.cpp"
    driver.write_text(DRIVER)
    flags = ["-std=c++20", "-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{SOURCES}"]
    files, defines = [path for path in SOURCES.glob("*.cpp") if "avx" not in path.name and "amx" not in path.name], []
    if "avx2" in LEVELS:
        files += list(SOURCES.glob("*avx*.cpp"))
        defines = ["-DCOSPADI_X86", "-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mpopcnt"]
    if "avx512" in LEVELS:
        names = ("f", "bw", "vl", "dq", "vbmi", "vbmi2", "bf16")
        defines += [f"-mavx512{name}" for name in names]
        if "amx" in LEVELS:
            files += SOURCES.glob("*amx*.cpp")
            defines += ["-DCOSPADI_AMX", "-mamx-tile", "-mamx-bf16"]
    elif defines:
        pytest.skip("this machine has AVX2 and not AVX-512: the sanitizer's build takes all levels or none")
    program = tmp_path / "driver"
    command = ["g++", *flags, *defines, str(driver), *map(str, files), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in built.stderr and "asan" in built.stderr:
        pytest.skip("the sanitizer's library is not installed here")
    assert built.returncode == 0, built.stderr
    run = subprocess.run([str(program)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == "ok"


DRIVER = r"""
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>
extern "C" {
int cospadi_levels();
const char* cospadi_level_name(int);
int cospadi_level_supported(int);
int cospadi_multiply(const void*, void*, int64_t, int, const uint8_t*, const uint8_t*, size_t, const int32_t*, int, int,
                     int, int, int);
int cospadi_unpack(void*, int, int, int, const uint8_t*, const uint8_t*, size_t, const int32_t*, int, int, int, int,
                   int);
void cospadi_scatter(const float*, float*, const uint8_t*, const int32_t*, int, int, int);
void cospadi_gather(const void*, int, float*, const uint8_t*, const int32_t*, int, int, int);
int cospadi_multiply_levels(const void*, void*, int64_t, int, const uint8_t*, const int32_t*, const int32_t*,
                            const int32_t*, const float*, int, int, const float*, const float*, int, int);
void cospadi_unpack_levels(void*, int, int, int, const uint8_t*, const int32_t*, const int32_t*, const int32_t*,
                           const float*, int, int, int);
int cospadi_rans_decode(const uint8_t*, const int64_t*, int, int, int64_t, int64_t, const int16_t*, const int16_t*,
                        int64_t, int, const uint32_t*, int16_t*, int, int);
}
constexpr int DAMAGED = 3;
// Noise as two blocks of coded levels, with tables of noise: whatever is read is inside of it.
int decode_noise(int level, std::mt19937& random) {
  constexpr int SLOTS = 53 * 2 * 4096;
  std::unique_ptr<uint32_t[]> slots(new uint32_t[SLOTS]);
  for (int i = 0; i < SLOTS; ++i) slots[i] = random() | 1;
  for (int lanes : {1, 4, 16}) {
    for (int d1 : {1, 16, 37}) {
      for (int words = 0; words < 300; words += 1 + words / 4) {
        const int64_t size = 4 * lanes + 2 * words, offsets[3] = {0, size, 2 * size};
        std::unique_ptr<uint8_t[]> stream(new uint8_t[2 * size]);
        std::unique_ptr<int16_t[]> rows(new int16_t[14]), cols(new int16_t[d1]), out(new int16_t[14 * d1]);
        for (int64_t i = 0; i < 2 * size; ++i) stream[i] = random() | 1;
        for (int j = 0; j < 14; ++j) rows[j] = random();
        for (int i = 0; i < d1; ++i) cols[i] = random() % 80 - 20 - rows[3];
        if (cospadi_rans_decode(stream.get(), offsets, 0, 2, 14, d1, rows.get(), cols.get(), 7, lanes, slots.get(),
                                out.get(), 1, level) != DAMAGED) return 6;
      }
    }
  }
  return 0;
}
// Products with levels, of 2 bits to 8 from row to row, and something beside every third output.
int multiply_levels(int level, std::mt19937& random) {
  for (int bits : {2, 5, 8}) {
    for (int d1 : {1, 31, 64, 100, 300, 2080}) {
      for (int d2 : {1, 33}) {
        const int unit = (d1 + 31) / 32 * 4, beside = (d2 + 2) / 3;
        std::unique_ptr<int32_t[]> places(new int32_t[d2 + 1]);
        places[0] = 0;
        for (int j = 0; j < d2; ++j) places[j + 1] = places[j] + 2 + (bits - 2 + j) % 7;
        const int bytes = places[d2] * unit + 64;
        std::unique_ptr<uint8_t[]> packed(new uint8_t[bytes]);
        for (int i = 0; i < bytes; ++i) packed[i] = random() & 0x7F;
        std::unique_ptr<int32_t[]> offsets(new int32_t[d2 + 1]), columns(new int32_t[beside]);
        std::unique_ptr<float[]> rest(new float[beside]), outputs(new float[d2]), inputs(new float[d1]);
        offsets[0] = 0;
        for (int j = 0; j < d2; ++j) {
          if (j % 3 == 0) {
            columns[offsets[j]] = static_cast<int>(random() % d1);
            rest[offsets[j]] = 100;
          }
          offsets[j + 1] = offsets[j] + (j % 3 == 0);
          outputs[j] = 2;
        }
        for (int i = 0; i < d1; ++i) inputs[i] = 0.5;
        std::unique_ptr<float[]> matrix(new float[d2 * d1]);
        const auto unpack = [&](void* to, int dtype) {
          cospadi_unpack_levels(to, dtype, 0, d2, packed.get(), places.get(), offsets.get(), columns.get(), rest.get(),
                                d1, 1, level);
        };
        unpack(matrix.get(), 0);
        std::unique_ptr<uint16_t[]> half_matrix(new uint16_t[d2 * d1]);
        unpack(half_matrix.get(), 1);
        for (int rows : {1, 3, 26}) {
          std::unique_ptr<float[]> x(new float[rows * d1]), y(new float[rows * d2]);
          std::unique_ptr<uint16_t[]> halves(new uint16_t[rows * d1]), half_y(new uint16_t[rows * d2]);
          for (int i = 0; i < rows * d1; ++i) x[i] = static_cast<float>(random() % 7), halves[i] = 0x3F80;
          const auto multiply = [&](const void* from, void* to, int dtype) {
            return cospadi_multiply_levels(from, to, rows, dtype, packed.get(), places.get(), offsets.get(),
                                           columns.get(), rest.get(), d2, d1, outputs.get(), inputs.get(), 1, level);
          };
          if (multiply(x.get(), y.get(), 0)) return 7;
          for (int r = 0; r < rows; ++r) {
            for (int j = 0; j < d2; ++j) {
              double sum = 0, scale = 1e-30;
              for (int i = 0; i < d1; ++i) {
                sum += double(x[r * d1 + i]) * matrix[j * d1 + i];
                scale += std::fabs(double(x[r * d1 + i]) * matrix[j * d1 + i]);
              }
              if (!(std::fabs(y[r * d2 + j] - sum) <= 1e-5 * scale)) return 8;
            }
          }
          for (int dtype : {1, 2}) {
            if (multiply(halves.get(), half_y.get(), dtype)) return 9;
          }
        }
      }
    }
  }
  return 0;
}
int main() {
  std::mt19937 random(1);
  for (int level = 0; level < cospadi_levels(); ++level) {
    if (!cospadi_level_supported(level)) continue;
    if (const int failed = decode_noise(level, random)) return failed;
    if (const int failed = multiply_levels(level, random)) return failed;
    for (int bits : {10, 14, 16}) {
      for (int k : {1, 9, 31, 64, 300}) {
        for (int d2 : {1, 33, 70}) {
          const int row = (k + 7) / 8;
          std::unique_ptr<uint8_t[]> support(new uint8_t[d2 * row]);
          std::unique_ptr<int32_t[]> offsets(new int32_t[d2 + 1]);
          offsets[0] = 0;
          for (int c = 0; c < d2; ++c) {
            offsets[c + 1] = offsets[c];
            for (int byte = 0; byte < row; ++byte) {
              const int used = k - 8 * byte < 8 ? (1 << (k - 8 * byte)) - 1 : 255;
              support[c * row + byte] = c % 7 == 3 ? 0 : random() & used;
              offsets[c + 1] += std::popcount(support[c * row + byte]);
            }
          }
          const size_t size = (static_cast<size_t>(offsets[d2]) * bits + 7) / 8;
          std::unique_ptr<uint8_t[]> values(new uint8_t[size]);
          for (size_t i = 0; i < size; ++i) values[i] = 0x3D;
          std::unique_ptr<float[]> numbers(new float[offsets[d2]]), back(new float[offsets[d2]]);
          std::unique_ptr<float[]> dense(new float[d2 * k]);
          std::unique_ptr<uint16_t[]> halves(new uint16_t[d2 * k]);
          for (int i = 0; i < offsets[d2]; ++i) numbers[i] = static_cast<float>(i);
          for (int i = 0; i < d2 * k; ++i) halves[i] = 0x3F80;
          cospadi_scatter(numbers.get(), dense.get(), support.get(), offsets.get(), d2, k, 1);
          cospadi_gather(dense.get(), 0, back.get(), support.get(), offsets.get(), d2, k, 1);
          if (!std::equal(numbers.get(), numbers.get() + offsets[d2], back.get())) return 10;
          cospadi_gather(halves.get(), 1, back.get(), support.get(), offsets.get(), d2, k, 1);
          if (!std::all_of(back.get(), back.get() + offsets[d2], [](float x) { return x == 1; })) return 11;
          for (int rows : {1, 3, 9}) {
            std::unique_ptr<float[]> z(new float[rows * k]), y(new float[rows * d2]), s(new float[d2 * k]);
            for (int i = 0; i < rows * k; ++i) z[i] = static_cast<float>(random() % 7);
            if (cospadi_multiply(z.get(), y.get(), rows, 0, support.get(), values.get(), size, offsets.get(), d2, k,
                                 bits, 1, level)) return 2;
            if (cospadi_unpack(s.get(), 0, 0, d2, support.get(), values.get(), size, offsets.get(), d2, k, bits, 1,
                               level)) return 3;
            for (int r = 0; r < rows; ++r) {
              for (int c = 0; c < d2; ++c) {
                double sum = 0, scale = 1e-30;
                for (int j = 0; j < k; ++j) {
                  sum += double(z[r * k + j]) * s[c * k + j];
                  scale += std::fabs(double(z[r * k + j]) * s[c * k + j]);
                }
                if (!(std::fabs(y[r * d2 + c] - sum) <= 1e-5 * scale)) return 4;
              }
            }
            std::unique_ptr<uint16_t[]> halves(new uint16_t[rows * k]), out(new uint16_t[rows * d2]);
            for (int i = 0; i < rows * k; ++i) halves[i] = 0x3F80;
            for (int dtype : {1, 2}) {
              if (cospadi_multiply(halves.get(), out.get(), rows, dtype, support.get(), values.get(), size,
                                   offsets.get(), d2, k, bits, 1, level)) return 5;
            }
          }
        }
      }
    }
    std::printf("%s ", cospadi_level_name(level));
  }
  std::puts("ok");
}
"""
