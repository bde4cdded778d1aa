"""The Triton kernels against products in float64: in Triton's interpreter, or on a GPU where there is one."""

import math
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock, Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.format import packing
from cospadi.runtime import op
from cospadi.runtime import triton as kernels
from cospadi.runtime.levels import Levels, dense, pack_levels

pytest.importorskip("triton", reason="Triton is not installed")
if not torch.cuda.is_available() and not kernels.INTERPRETED:
    pytest.skip("there is no GPU and TRITON_INTERPRET is not 1", allow_module_level=True)

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Of the norm. The interpreter rounds to bf16 by truncation."""


class Case:
    """Random z and S with an empty and a full column, packed, and the product in float64."""

    def __init__(
        self,
        shape: tuple[int, ...],
        d2: int,
        bits: int = 14,
        dtype: torch.dtype = torch.float32,
        density: float = 0.5,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.k, self.bits = shape[-1], bits
        support = torch.rand(d2, self.k, generator=generator) < density
        support[:1], support[1:2] = False, True
        nnz = int(support.sum())
        values = packing.pack_values(torch.randn(nnz, generator=generator), bits)
        self.z = torch.randn(shape, generator=generator).to(dtype).to(DEVICE)
        stored = packing.unpack_values(values, nnz, bits)
        mask = packing.pack_support(support)
        coefficients = packing.unpack_coefficients(mask, stored, self.k).double().T.to(DEVICE)
        self.expected = self.z.double() @ coefficients
        self.offsets = torch.nn.functional.pad(support.sum(1).cumsum(0), (1, 0)).to(torch.int32).to(DEVICE)
        self.support, self.values = mask.to(DEVICE), values.to(DEVICE)

    def multiply(self) -> torch.Tensor:
        assert kernels.can_multiply(self.z, self.support, self.values, self.bits)
        return kernels.sparse_matmul(self.z, self.support, self.values, self.offsets, self.k, self.bits)

    def check(self) -> None:
        y = self.multiply()
        assert y.dtype == self.z.dtype
        assert y.shape == self.expected.shape
        assert (y.double() - self.expected).norm() <= TOLERANCE[y.dtype] * self.expected.norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bits", [14, 16])
@pytest.mark.parametrize("rows", [1, 17, 40])
def test_dtypes_and_widths(dtype: torch.dtype, bits: int, rows: int) -> None:
    Case((rows, 77), 21, bits, dtype).check()


@pytest.mark.parametrize("rows", [1, 3, 6, 40])
@pytest.mark.parametrize(("k", "d2"), [(1, 1), (8, 5), (13, 34), (64, 3), (100, 19), (259, 40), (601, 20)])
def test_shapes(k: int, d2: int, rows: int) -> None:
    """The last two are split over programs where rows are few."""
    Case((rows, k), d2).check()


@pytest.mark.parametrize("bits", [10, 12])
@pytest.mark.parametrize("rows", [2, 6])
def test_narrower_values(bits: int, rows: int) -> None:
    Case((rows, 90), 9, bits).check()


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("bits", [14, 16])
def test_empty_and_full_support(density: float, bits: int) -> None:
    Case((2, 70), 6, bits, density=density).check()
    Case((6, 70), 6, bits, density=density).check()


def test_no_nonzero_at_all() -> None:
    case = Case((2, 70), 1)
    assert case.values.numel() == 0
    assert not case.multiply().any()


@pytest.mark.parametrize("shape", [(0, 13), (2, 0, 13), (13,), (2, 3, 13)])
def test_leading_shapes(shape: tuple[int, ...]) -> None:
    Case(shape, 7).check()


@pytest.mark.parametrize("rows", [3, 20])
def test_non_contiguous_input(rows: int) -> None:
    case = Case((rows, 45), 18)
    contiguous = case.multiply()
    case.z = case.z.T.contiguous().T
    assert torch.equal(case.multiply(), contiguous)
    case.z = torch.stack([case.z, -case.z], dim=1)[:, 0]
    assert torch.equal(case.multiply(), contiguous)
    case.z = torch.stack([case.z, -case.z], dim=-1)[..., 0]
    assert torch.equal(case.multiply(), contiguous)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("rows", [1, 6])
def test_values_beyond_fp16_become_infinite(rows: int) -> None:
    case = Case((rows, 20), 5, dtype=torch.float16)
    case.values = packing.pack_values(torch.full((int(case.offsets[-1]),), 1e5), 14).to(DEVICE)
    case.z = torch.ones_like(case.z)
    y = case.multiply()
    assert torch.isinf(y[:, 1:]).all()
    assert not y[:, 0].any()


@pytest.mark.parametrize("rows", [2, 6])
@pytest.mark.parametrize("bits", [14, 16])
@pytest.mark.parametrize("offset", [0, 2, 4])
def test_nothing_after_the_end_of_a_buffer_counts(rows: int, bits: int, offset: int) -> None:
    case = Case((rows, 45), 18, bits, density=0.3)
    clean = case.multiply()
    nnz = int(case.offsets[-1])
    assert bits == 16 or nnz * bits % 8, "the last byte should have unused bits"

    def followed(tensor: torch.Tensor, poison: float, before: int = 0) -> torch.Tensor:
        longer = torch.full((before + tensor.numel() + 64,), poison, dtype=tensor.dtype, device=DEVICE)
        longer[before : before + tensor.numel()] = tensor.flatten()
        return longer[before : before + tensor.numel()].view(tensor.shape)

    if bits == 16:
        case.values = followed(case.values, float("nan"), offset // 2)
    else:
        case.values = followed(case.values, 255, offset)
        case.values[-1] |= 255 << (nnz * bits % 8) & 255
    case.support = followed(case.support, 255)
    case.support[:, -1] |= 255 << (case.k % 8) & 255
    case.offsets = followed(case.offsets, 1 << 20)
    case.z = followed(case.z, float("nan"))
    assert torch.equal(case.multiply(), clean)


GUARDED = """
import ctypes, mmap, sys
import torch
sys.path.insert(0, {tests!r})
from test_triton import Case

def at_the_end_of_memory(tensor):
    size = tensor.numel() * tensor.element_size()
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, room + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + room), mmap.PAGESIZE, 0) == 0
    moved = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel(), offset=room - size)
    return moved.copy_(tensor.flatten()).view(tensor.shape)

for rows in (2, 6):
    for bits in (14, 16):
        case = Case((rows, 45), 17, bits, density=1.0)
        assert case.values.numel() * case.values.element_size() % 4 == 0
        for name in ("z", "support", "values", "offsets"):
            setattr(case, name, at_the_end_of_memory(getattr(case, name)))
        case.check()
print("done")
"""


@pytest.mark.skipif(DEVICE == "cuda" or sys.platform != "linux", reason="needs the interpreter and mprotect")
def test_no_read_beyond_a_buffer_faults() -> None:
    """The page after each buffer cannot be read."""
    code = GUARDED.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_drawn_shapes_and_masks(data: st.DataObject) -> None:
    rows, k, d2 = (data.draw(st.integers(1, most)) for most in (20, 300, 40))
    bits = data.draw(st.sampled_from(kernels.VALUE_BITS))
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    Case((rows, k), d2, bits, dtype, data.draw(st.floats(0, 1)), data.draw(st.integers(0, 99))).check()


def check_levels(shape: tuple[int, ...], d2: int, bits: int, spread: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = (spread * torch.randn(d2, shape[-1], generator=generator)).round().to(torch.int16)
    outputs, inputs = (0.5 + torch.rand(size, generator=generator) for size in (d2, shape[-1]))
    levels = Levels(*(part.to(DEVICE) for part in pack_levels(numbers, outputs, inputs, bits)))
    x = torch.randn(shape, generator=generator).to(dtype).to(DEVICE)
    assert kernels.can_multiply_levels(x, levels)
    y, expected = kernels.level_matmul(x, levels), x.double() @ dense(levels).double().T
    assert y.dtype == dtype
    assert y.shape == expected.shape
    assert (y.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("bits", "spread"), [(4, 2.0), (4, 5.0), (8, 30.0), (8, 90.0)])
@pytest.mark.parametrize("rows", [1, 3, 17, 40])
def test_products_of_levels(dtype: torch.dtype, bits: int, spread: float, rows: int) -> None:
    check_levels((rows, 77), 37, bits, spread, dtype)


@pytest.mark.parametrize("shape", [(1, 1), (3, 32), (6, 33), (2, 300), (0, 13), (2, 0, 13), (13,), (2, 3, 13)])
@pytest.mark.parametrize("bits", [4, 8])
def test_shapes_of_levels(shape: tuple[int, ...], bits: int) -> None:
    check_levels(shape, 35, bits, 5.0, torch.float32)


def test_what_the_kernels_do_not_take() -> None:
    case = Case((2, 13), 5)
    assert not kernels.can_multiply(case.z.double(), case.support, case.values, 14)
    assert not kernels.can_multiply(case.z, case.support, case.values, 16)
    assert not kernels.can_multiply(case.z, case.support, case.values, 0)
    assert not kernels.can_multiply(case.z, case.support.T, case.values, 14)
    assert not kernels.can_multiply(case.z.to("meta"), case.support, case.values, 14)


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """What the op calls in place of a kernel for many rows; no failure of it is remembered after the test."""
    tiles = MagicMock()
    monkeypatch.setattr(op, "_kernels", lambda z: kernels)
    monkeypatch.setattr(kernels.kernels, "tiles", tiles)
    monkeypatch.setattr(kernels, "_failed", set())
    op._warn.cache_clear()
    found: Mock = tiles.__getitem__.return_value
    return found


def multiply_by_the_op(case: Case) -> torch.Tensor:
    return op.sparse_matmul(
        case.z, case.support, case.values, case.offsets, case.support.shape[0], case.k, "mask", f"f{case.bits}"
    )


def test_the_reference_stands_in_for_a_kernel_that_does_not_compile(
    launch: Mock, caplog: pytest.LogCaptureFixture
) -> None:
    launch.side_effect = RuntimeError("PassManager::run failed\nand more")
    case = Case((6, 45), 18)
    for _ in range(2):
        y = multiply_by_the_op(case)
        assert (y.double() - case.expected).norm() <= TOLERANCE[y.dtype] * case.expected.norm()
    assert launch.call_count == 1, "it should not be compiled again"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages[0].endswith("unpacked instead: RuntimeError: PassManager::run failed")
    assert not kernels.can_multiply(case.z, case.support, case.values, 14)
    assert kernels.can_multiply(case.z.half(), case.support, case.values, 14)


def test_want_of_memory_is_no_fault_of_a_kernel(launch: Mock) -> None:
    launch.side_effect = torch.OutOfMemoryError("out of memory")
    case = Case((6, 45), 18)
    with pytest.raises(torch.OutOfMemoryError):
        multiply_by_the_op(case)
    assert kernels.can_multiply(case.z, case.support, case.values, 14)


def test_the_autotuner_passes_over_what_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = Mock(side_effect=[[0.5, 0.4, 0.6], RuntimeError("PassManager::run failed"), torch.OutOfMemoryError()])
    monkeypatch.setattr(kernels.kernels.triton.testing, "do_bench", timed)
    assert kernels.kernels._quantiles(Mock(), (0.5, 0.2, 0.8)) == [0.5, 0.4, 0.6]
    assert kernels.kernels._quantiles(Mock(), (0.5, 0.2, 0.8)) == [math.inf] * 3
    with pytest.raises(torch.OutOfMemoryError):
        kernels.kernels._quantiles(Mock(), (0.5, 0.2, 0.8))


COMPILED = """
import triton.language as tl
from triton import Config, compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cospadi.runtime import triton_kernels as kernels
from cospadi.runtime import triton_levels as levels

POINTERS = {
    "support": "*u8", "values": "*u8", "offsets": "*i32", "partial": "*fp32",
    "packed": "*u8", "outputs": "*fp32", "inputs": "*fp32", "columns": "*i32", "rest": "*fp32",
}

def compiles(kernel, config, dtype, **constants):
    constants |= config.kwargs
    pointers = POINTERS | {name: f"*{dtype}" for name in ("z", "out", "x", "y")}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    for capability in (80, 90):
        assert compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]

tile_configs = {config.kwargs["M"]: config for config in reversed(kernels.TILE_CONFIGS)}  # the first of each
compiles(kernels.decode.fn, kernels.DECODE_CONFIGS[0], "bf16", M=2, BITS=14, ROUND=tl.bfloat16)
for rows in (16, 64, 128):
    compiles(kernels.tiles.fn, tile_configs[rows], "bf16", z_atom=1, BITS=14, OPERAND=tl.bfloat16, ROUND=tl.bfloat16)
compiles(kernels.tiles.fn, tile_configs[64], "fp16", z_atom=1, BITS=16, OPERAND=tl.float16, ROUND=tl.float16)
compiles(kernels.tiles.fn, tile_configs[64], "fp32", z_atom=1, BITS=14, OPERAND=tl.float32, ROUND=tl.float32)
compiles(kernels.add_splits, Config({}), "bf16", BLOCK=1024)
for bits in (4, 8):
    compiles(levels.few.fn, levels.FEW_CONFIGS[0], "bf16", M=2, BITS=bits)
    for config in (levels.MANY_CONFIGS[0], levels.MANY_CONFIGS[5]):
        compiles(levels.many.fn, config, "bf16", x_column=1, BITS=bits, OPERAND=tl.bfloat16, ROUND=tl.bfloat16)
full = {"OPERAND": tl.float32, "ROUND": tl.float32}
compiles(levels.many.fn, levels.MANY_CONFIGS[0], "fp32", x_column=1, BITS=4, **full)
print("done")
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="the other tests compile the kernels")
def test_the_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    """The interpreter takes what the compiler refuses. For Ampere and Hopper, with the assembler that Triton brings."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
