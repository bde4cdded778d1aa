"""The Triton kernels against products in float64: in Triton's interpreter, or on a GPU where there is one."""

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
from cospadi.runtime.levels import EQUAL_WIDTHS, Levels, dense, pack_levels

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
@pytest.mark.parametrize("rows", [1, 9, 40, 65])
def test_dtypes_and_widths(dtype: torch.dtype, bits: int, rows: int) -> None:
    """The numbers of rows that have kernels of their own."""
    Case((rows, 77), 9, bits, dtype).check()


FEW, SOME, MANY = (2, torch.float32), (6, torch.bfloat16), (70, torch.float32)
"""Rows, and a dtype of z, for each of the kernels: `decode`, `tiles` and `unpack`."""


@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float32), (3, torch.float32), SOME, MANY])
@pytest.mark.parametrize(("k", "d2"), [(1, 1), (8, 5), (13, 34), (64, 3), (100, 7), (259, 9), (1024, 3)])
def test_shapes(k: int, d2: int, rows: int, dtype: torch.dtype) -> None:
    Case((rows, k), d2, dtype=dtype).check()


@pytest.mark.parametrize(("rows", "dtype"), [FEW, SOME])
@pytest.mark.parametrize(("k", "d2"), [(601, 9), (1300, 5), (1536, 3), (2049, 2)])
def test_columns_of_several_warps_or_programs(
    k: int, d2: int, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: 8)
    assert kernels.few_values(k, d2, 8)[1] > 1
    assert kernels.many_values(k, d2, 6, 8)[3] > 1
    Case((rows, k), d2, dtype=dtype).check()


@pytest.mark.parametrize("bits", [10, 12])
@pytest.mark.parametrize(("rows", "dtype"), [FEW, SOME, MANY])
def test_narrower_values(bits: int, rows: int, dtype: torch.dtype) -> None:
    Case((rows, 90), 9, bits, dtype).check()


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("bits", [14, 16])
@pytest.mark.parametrize(("rows", "dtype"), [FEW, SOME, MANY])
def test_empty_and_full_support(density: float, bits: int, rows: int, dtype: torch.dtype) -> None:
    Case((rows, 530), 6, bits, dtype, density).check()


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64])
@pytest.mark.parametrize(("k", "d2", "bits"), [(77, 5, 14), (512, 4, 14), (600, 3, 10), (600, 3, 16), (0, 3, 12)])
def test_unpacked(dtype: torch.dtype, k: int, d2: int, bits: int) -> None:
    case = Case((1, k), d2, bits)
    found = kernels.unpack(case.support, case.values, case.offsets, k, bits, dtype)
    stored = packing.unpack_values(case.values.cpu(), int(case.offsets[-1]), bits)
    expected = packing.unpack_coefficients(case.support.cpu(), stored, k).to(dtype).to(DEVICE)
    assert (found.dtype, found.shape) == (dtype, (d2, k))
    assert torch.equal(found, expected)


def test_no_nonzero_at_all() -> None:
    case = Case((2, 70), 1)
    assert case.values.numel() == 0
    assert not case.multiply().any()


@pytest.mark.parametrize("shape", [(0, 13), (2, 0, 13), (13,), (2, 3, 13)])
def test_leading_shapes(shape: tuple[int, ...]) -> None:
    Case(shape, 7).check()


@pytest.mark.parametrize(("rows", "dtype"), [(3, torch.float32), (20, torch.float16), MANY])
def test_non_contiguous_input(rows: int, dtype: torch.dtype) -> None:
    case = Case((rows, 45), 18, dtype=dtype)
    contiguous = case.multiply()
    case.z = case.z.T.contiguous().T
    assert torch.equal(case.multiply(), contiguous)
    case.z = torch.stack([case.z, -case.z], dim=1)[:, 0]
    assert torch.equal(case.multiply(), contiguous)
    case.z = torch.stack([case.z, -case.z], dim=-1)[..., 0]
    assert torch.equal(case.multiply(), contiguous)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("rows", [1, 6, 70])
def test_values_beyond_fp16_become_infinite(rows: int) -> None:
    case = Case((rows, 20), 5, dtype=torch.float16)
    case.values = packing.pack_values(torch.full((int(case.offsets[-1]),), 1e5), 14).to(DEVICE)
    case.z = torch.ones_like(case.z)
    y = case.multiply()
    assert torch.isinf(y[:, 1:]).all()
    assert not y[:, 0].any()


@pytest.mark.parametrize(("rows", "dtype"), [FEW, SOME, MANY])
@pytest.mark.parametrize("bits", [14, 16])
@pytest.mark.parametrize("offset", [0, 2, 4])
def test_nothing_after_the_end_of_a_buffer_counts(rows: int, dtype: torch.dtype, bits: int, offset: int) -> None:
    case = Case((rows, 45), 18, bits, dtype, density=0.3)
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

for rows, dtype in ((2, torch.float32), (6, torch.bfloat16), (70, torch.float32)):
    for bits in (14, 16):
        case = Case((rows, 45), 17, bits, dtype, density=1.0)
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
    rows, k, d2 = (data.draw(st.integers(1, most)) for most in (80, 1200, 20))
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
@pytest.mark.parametrize(("bits", "spread"), [(4, 5.0), (6, 16.0), (8, 90.0)])
@pytest.mark.parametrize("rows", [1, 3, 17, 70])
def test_products_of_levels(dtype: torch.dtype, bits: int, spread: float, rows: int) -> None:
    check_levels((rows, 77), 37, bits, spread, dtype)


@pytest.mark.parametrize("bits", EQUAL_WIDTHS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_unpacked_levels(dtype: torch.dtype, bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = (2.0**bits / 3 * torch.randn(21, 300, generator=generator)).round().to(torch.int16)
    outputs, inputs = (0.5 + torch.rand(size, generator=generator) for size in (21, 300))
    levels = Levels(*(part.to(DEVICE) for part in pack_levels(numbers, outputs, inputs, bits)))
    assert len(levels.columns) > 100, "many should lie beside"
    weight, expected = kernels.unpack_levels(levels, dtype), dense(levels).double()
    assert weight.dtype == dtype
    assert (weight.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("rows", [1, 2, 4, 30])
def test_levels_of_rows_longer_than_a_step(rows: int) -> None:
    for bits in EQUAL_WIDTHS:
        check_levels((rows, 1300), 5, bits, 2.0 ** (bits - 2), torch.bfloat16)


@pytest.mark.parametrize("rows", [3, 20])
def test_levels_and_x_of_any_strides(rows: int) -> None:
    numbers = torch.randint(-8, 8, (18, 45), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    packed = pack_levels(numbers, torch.ones(18), torch.ones(45), 4)
    levels = Levels(*(part.to(DEVICE) for part in packed))
    x = torch.randn(rows, 45, device=DEVICE).bfloat16()
    contiguous = kernels.level_matmul(x, levels)
    assert torch.equal(kernels.level_matmul(x.T.contiguous().T, levels), contiguous)
    assert torch.equal(kernels.level_matmul(torch.stack([x, -x], dim=-1)[..., 0], levels), contiguous)


@pytest.mark.parametrize("shape", [(1, 1), (3, 32), (6, 33), (2, 300), (0, 13), (2, 0, 13), (13,), (2, 3, 13)])
@pytest.mark.parametrize("bits", EQUAL_WIDTHS)
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
    """What the op calls in place of the kernel for many rows; no failure of it is remembered after the test."""
    unpack = MagicMock()
    monkeypatch.setattr(op, "_kernels", lambda z: kernels)
    monkeypatch.setattr(kernels.kernels, "unpack", unpack)
    monkeypatch.setattr(kernels, "_failed", set())
    op._warn.cache_clear()
    found: Mock = unpack.__getitem__.return_value
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

def compiles(kernel, config, dtype, both=False, **constants):
    constants |= config.kwargs
    pointers = POINTERS | {name: f"*{dtype}" for name in ("z", "out", "x", "y", "weight")}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    for capability in (80, 90) if both else (90,):
        assert compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]

for rows, spans in ((1, 1), (4, 4)):
    decode = Config({"M": rows, "N": 2, "S": spans}, num_warps=spans)
    compiles(kernels.decode, decode, "bf16", rows == 1, z_atom=1, BITS=14)
compiles(kernels.tiles, Config({"M": 16, "N": 32}, num_stages=1), "bf16", True, z_atom=1, BITS=14)
compiles(kernels.tiles, Config({"M": 64, "N": 32}, num_stages=1), "fp16", BITS=16)
compiles(kernels.unpack, Config({"N": 2}, num_warps=1), "bf16", BITS=14)
compiles(kernels.add_splits, Config({}), "bf16", BLOCK=1024)
half = {"OPERAND": tl.bfloat16, "ROUND": tl.bfloat16}
few = Config({"N": 4, "T": 256}, num_warps=2)
compiles(levels.few, few, "bf16", True, x_column=1, BITS=4, M=1)
compiles(levels.few, few, "bf16", x_column=1, BITS=6, M=4)
compiles(levels.few, few, "fp32", BITS=8, M=2)
many = Config({"M": 16, "N": 32, "T": 64}, num_warps=4, num_stages=2)
compiles(levels.many, many, "bf16", True, x_column=1, BITS=6, **half)
compiles(levels.unpack, Config({"N": 4, "T": 128}), "bf16", BITS=6)
compiles(levels.put_beside, Config({}, num_warps=1), "bf16", BITS=6)
print("done")
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="the other tests compile the kernels")
def test_the_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    """The interpreter takes what the compiler refuses. For Ampere and Hopper, with the assembler that Triton brings."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
