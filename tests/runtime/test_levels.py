"""Levels in memory: exact however they are packed, products of them at every level of instructions, and the layer."""

from __future__ import annotations

import copy
import mmap
import pickle
import sys
from unittest.mock import Mock

import pytest
import torch
from codes import random_code
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import LEVELS, TOLERANCE, assert_product, at_the_end_of_a_page
from torch import Tensor

from cospadi import CompressedLinear, native
from cospadi.format.codecs.ec import EC
from cospadi.format.form import Form
from cospadi.runtime import cpu, op
from cospadi.runtime.levels import (
    BESIDE_BITS,
    EQUAL_WIDTHS,
    MARGIN,
    WIDTHS,
    Levels,
    all_levels,
    choose_widths,
    dense,
    pack_levels,
    padded,
    read_levels,
    tiled,
)

BUILT = pytest.mark.skipif(not cpu.AVAILABLE, reason="the CPU kernels were not built: no C++ compiler here")
CODED = Form("identity", "full", "ec")


def example(d2: int, d1: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Levels int16 (d2, d1), and steps of outputs and inputs."""
    generator = torch.Generator().manual_seed(seed)
    numbers = (spread * torch.randn(d2, d1, generator=generator)).round().to(torch.int16)
    outputs, inputs = (0.5 + torch.rand(size, generator=generator) for size in (d2, d1))
    return numbers, outputs, inputs


def matrix(numbers: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    return numbers.double() * inputs * outputs[:, None]


def each_width(d2: int, start: int = 0) -> Tensor:
    """Widths of rows, one after another."""
    return WIDTHS[0] + (start + torch.arange(d2, dtype=torch.int32)) % len(WIDTHS)


def fits(numbers: Tensor, bits: Tensor | int) -> Tensor:
    """Which levels so many bits hold: in two's complement, but -128."""
    most = 2.0 ** (torch.as_tensor(bits) - 1)
    return (numbers >= -most) & (numbers < most) & (numbers > -128)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(0, 6), st.floats(0.1, 3000), st.integers(0, 99))
def test_packing_loses_nothing(d2: int, d1: int, start: int, spread: float, seed: int) -> None:
    numbers, outputs, inputs = example(d2, d1, spread, seed)
    for widths in (each_width(d2, start), choose_widths(numbers)[0], *EQUAL_WIDTHS):
        levels = pack_levels(numbers, outputs, inputs, widths)
        total = d2 * widths if isinstance(widths, int) else int(widths.sum())
        assert levels.bits == pytest.approx(total / d2)
        held = tiled(d1) if isinstance(widths, int) else padded(d1)
        assert levels.packed.nbytes == held * total // 8 + MARGIN
        torch.testing.assert_close(dense(levels).double(), matrix(numbers, outputs, inputs), rtol=1e-6, atol=0)
        inside = fits(numbers, widths if isinstance(widths, int) else widths[:, None])
        assert len(levels.rest) == len(levels.columns) == int(levels.offsets[-1]) == int((~inside).sum())


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 300), st.floats(0.1, 100), st.integers(0, 99))
def test_each_row_takes_the_least_memory(d2: int, d1: int, spread: float, seed: int) -> None:
    numbers, _, _ = example(d2, d1, spread, seed)
    widths, counts = choose_widths(numbers)
    each = torch.stack([padded(d1) * bits + BESIDE_BITS * (~fits(numbers, bits)).sum(1) for bits in WIDTHS])
    assert torch.equal(padded(d1) * widths + BESIDE_BITS * counts, each.min(0).values)


@BUILT
@pytest.mark.parametrize("spread", [1.0, 6.0, 90.0])
def test_the_library_packs_as_torch_does(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for d2, d1 in ((1, 1), (5, 33), (70, 64), (8, 300)):
        given = example(d2, d1, spread)
        for widths in (each_width(d2), 4):
            ours = pack_levels(*given, widths)
            with monkeypatch.context() as patched:
                patched.setattr(native, "library", lambda: None)
                plain = pack_levels(*given, widths)
            for one, other in zip(ours, plain, strict=True):
                assert one.dtype == other.dtype
                assert torch.equal(one, other)


@pytest.mark.parametrize("bits", WIDTHS)
def test_levels_lie_as_kernels_expect_them(bits: int) -> None:
    """A stream of bits, the lowest ones first."""
    numbers = torch.arange(64, dtype=torch.int16).remainder(2**bits - 1) - (2 ** (bits - 1) - 1)
    levels = pack_levels(numbers[None], torch.ones(1), torch.ones(64), torch.tensor([bits], dtype=torch.int32))
    stream = sum((int(number) & (2**bits - 1)) << bits * i for i, number in enumerate(numbers))
    assert bytes(levels.packed.tolist()) == stream.to_bytes(8 * bits, "little") + bytes(MARGIN)


@BUILT
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("start", [0, 2, 4])
@pytest.mark.parametrize("spread", [2.0, 20.0])
@pytest.mark.parametrize(("d2", "d1"), [(1, 1), (3, 7), (40, 33), (65, 64), (31, 200), (100, 515), (33, 2100)])
def test_products(level: str, dtype: torch.dtype, start: int, spread: float, d2: int, d1: int) -> None:
    numbers, outputs, inputs = example(d2, d1, spread)
    levels, weight = pack_levels(numbers, outputs, inputs, each_width(d2, start)), matrix(numbers, outputs, inputs)
    for rows in (1, 2, 3, 8, 11, 17, 25, 40):
        x = torch.randn(rows, d1, generator=torch.Generator().manual_seed(rows)).to(dtype)
        assert_product(cpu.level_matmul(x, levels, native.levels()[level]), x, weight.T)


@BUILT
def test_more_rows_than_stay_in_a_cache() -> None:
    numbers, outputs, inputs = example(40, 4100, 2.0)
    x = torch.randn(1100, 4100, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = cpu.level_matmul(x, pack_levels(numbers, outputs, inputs, each_width(40)))
    wanted = x.float() @ matrix(numbers, outputs, inputs).float().T
    assert (y.float() - wanted).norm() < 5e-3 * wanted.norm()
    assert ((y.float() - wanted).norm(dim=1) < 0.01 * wanted.norm(dim=1)).all()


@BUILT
@pytest.mark.parametrize("shape", [(0, 20), (2, 0, 20), (20,), (2, 3, 20), (1, 1, 20)])
def test_leading_shapes(shape: tuple[int, ...]) -> None:
    numbers, outputs, inputs = example(9, 20, 2.0)
    levels = pack_levels(numbers, outputs, inputs, each_width(9))
    x = torch.randn(shape)
    expected = x.double() @ matrix(numbers, outputs, inputs).T
    torch.testing.assert_close(op.level_matmul(x, levels).double(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="20 inputs"):
        op.level_matmul(torch.randn(2, 19), levels)


@BUILT
@pytest.mark.parametrize("rows", [1, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(rows: int, dtype: torch.dtype) -> None:
    levels, x, before = (
        pack_levels(*example(300, 100, 3.0), each_width(300)),
        torch.randn(rows, 100),
        torch.get_num_threads(),
    )
    x = x.to(dtype)
    try:
        torch.set_num_threads(1)
        alone = cpu.level_matmul(x, levels)
        torch.set_num_threads(2)
        assert torch.equal(cpu.level_matmul(x, levels), alone)
    finally:
        torch.set_num_threads(before)


@BUILT
@pytest.mark.skipif(sys.platform != "linux", reason="pages are protected through Linux's libc")
@pytest.mark.parametrize("level", LEVELS)
def test_no_byte_past_a_buffer_is_read(level: str) -> None:
    """A read into the protected page would kill the process."""
    keep: list[mmap.mmap] = []
    for d2, d1 in ((1, 1), (5, 7), (3, 100), (33, 257), (64, 512)):
        numbers, outputs, inputs = example(d2, d1, 20.0)
        for start in range(len(WIDTHS)):
            packed = pack_levels(numbers, outputs, inputs, each_width(d2, start))
            levels = Levels(*(at_the_end_of_a_page(part, keep) if part.numel() else part for part in packed))
            for dtype in TOLERANCE:
                for rows in (3, 40):
                    x = at_the_end_of_a_page(torch.randn(rows, d1).to(dtype), keep)
                    y = cpu.level_matmul(x, levels, native.levels()[level])
                    assert_product(y, x, matrix(numbers, outputs, inputs).T)


@pytest.mark.parametrize(("spread", "least", "most"), [(0.4, 2, 3), (2.0, 3.5, 4), (30.0, 7.5, 8), (300.0, None, None)])
def test_levels_take_the_least_memory_that_nearly_all_fit_in(
    spread: float, least: float | None, most: float | None
) -> None:
    stored = random_code(50, 70, torch.Generator().manual_seed(0), spread=spread)
    levels, expected = read_levels(stored), EC.decode(stored, [50, 70])
    assert isinstance(levels, Levels) == (least is not None)
    if isinstance(levels, Levels) and least is not None and most is not None:
        assert least <= levels.bits <= most
    found = dense(levels) if isinstance(levels, Levels) else levels
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def make_layer(spread: float = 2.0, bias: bool = True, dtype: torch.dtype = torch.float32) -> CompressedLinear:
    """A layer of 30 x 23."""
    generator = torch.Generator().manual_seed(1)
    stored = random_code(23, 30, generator, spread=spread)
    layer = CompressedLinear(30, 23, 30, 0, CODED, bias, dtype, nbytes=len(stored))
    layer.codes.copy_(stored)
    if layer.bias is not None:
        with torch.no_grad():
            layer.bias.copy_(torch.randn(23, generator=generator))
    return layer


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "AVAILABLE", False)


@BUILT
@pytest.mark.parametrize("spread", [2.0, 30.0, 300.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize("shape", [(1, 30), (2, 50, 30), (0, 30), (30,)])
def test_the_layer_multiplies_what_is_stored(
    spread: float, dtype: torch.dtype, tolerance: float, shape: tuple[int, ...]
) -> None:
    layer = make_layer(spread, dtype=dtype)
    assert layer.bias is not None
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    y = layer(x)
    expected = x.double() @ layer.dense_weight(torch.float64).T + layer.bias.double()
    assert y.dtype == dtype
    assert (y.double() - expected).norm() <= tolerance * expected.norm()
    bytes_a_weight = {2.0: 5 / 8, 30.0: 1, 300.0: dtype.itemsize}[spread]
    beside = 4 * (30 + 23 + 24 + 24) + MARGIN if spread < 300 else 0
    kept = sum(tensor.nbytes for tensor in layer.kept_tensors())
    assert kept <= bytes_a_weight * 23 * 32 + beside + 8 * 0.01 * 23 * 30


def test_without_kernels_the_layer_is_the_same(without_kernels: None) -> None:
    layer = make_layer()
    x = torch.randn(4, 30)
    assert layer.bias is not None
    expected = x.double() @ layer.dense_weight(torch.float64).T + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    levels = pack_levels(*example(9, 20, 2.0), each_width(9))
    y = op.level_matmul(torch.ones(2, 20), levels)
    torch.testing.assert_close(y, dense(levels).sum(1).expand(2, -1), rtol=1e-5, atol=1e-5)


@BUILT
def test_gradients_reach_the_input() -> None:
    layer = make_layer()
    x = torch.randn(4, 30, requires_grad=True)
    y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, grad @ layer.dense_weight(), rtol=1e-5, atol=1e-5)


@BUILT
def test_compilers_take_the_layer_whole_once_it_is_prepared() -> None:
    layer, x = make_layer(), torch.randn(4, 30)
    expected = layer(x)
    fresh = copy.deepcopy(layer)
    fresh.set_runtime("auto")
    fresh.prepare(torch.float32)
    kept = fresh.kept_tensors()
    assert [tensor.data_ptr() for tensor in kept] == [tensor.data_ptr() for tensor in fresh.kept_tensors()]
    compiled = torch.compile(fresh, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    exported = torch.export.export(fresh, (x,))
    assert any("level_matmul" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), expected)


@pytest.fixture
def replaced() -> CompressedLinear:
    """A layer that keeps levels in place of their code."""
    layer = make_layer()
    layer.replaces_code = True
    layer.prepare(torch.float32)
    return layer


@BUILT
def test_levels_take_the_place_of_their_code_which_is_made_again(replaced: CompressedLinear) -> None:
    layer, x = make_layer(), torch.randn(4, 30)
    assert [name for name, _ in replaced.named_buffers()] == ["_like"]
    assert len(replaced.kept_tensors()) == len(Levels._fields)
    state = replaced.state_dict()
    assert state.keys() == layer.state_dict().keys()
    assert torch.equal(state["values"], layer.codes)
    for copied in (replaced, copy.deepcopy(replaced), pickle.loads(pickle.dumps(replaced))):
        assert torch.equal(copied(x), layer(x))
        assert torch.equal(copied.codes, layer.codes)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert torch.equal(replaced.dense_weight(dtype), layer.dense_weight(dtype))
    for runtime in ("unpacked", "dense", "packed", "auto"):
        layer.set_runtime(runtime, torch.float32)
        replaced.set_runtime(runtime, torch.float32)
        assert (replaced.values is None) == (runtime != "packed")
        torch.testing.assert_close(replaced(x), layer(x))
    replaced.bfloat16().float()
    assert replaced.values is None
    assert torch.equal(replaced.codes, layer.codes)


@BUILT
def test_a_code_that_levels_stand_for_is_loaded_anew(replaced: CompressedLinear) -> None:
    other, x = make_layer(), torch.randn(4, 30)
    numbers = read_levels(other.codes)
    assert isinstance(numbers, Levels)
    changed = -all_levels(numbers).to(torch.int16)
    other.codes.copy_(EC.put_back(EC.head(other.codes), changed))
    replaced.load_state_dict(other.state_dict())
    assert replaced.values is None
    assert torch.equal(replaced(x), other(x))
    assert torch.equal(replaced.codes, other.codes)
    rest = {name: tensor for name, tensor in other.state_dict().items() if name != "values"}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "values"'):
        replaced.load_state_dict(rest)
    assert replaced.load_state_dict(rest, strict=False).missing_keys == ["values"]
    assert torch.equal(replaced(x), other(x))
    wrong = other.state_dict() | {"values": other.codes[:-1]}
    with pytest.raises(RuntimeError, match="size mismatch"):
        replaced.load_state_dict(wrong)
    assert torch.equal(replaced(x), other(x))


@BUILT
def test_a_compiler_takes_levels_in_place_of_their_code(replaced: CompressedLinear) -> None:
    x = torch.randn(4, 30)
    expected = replaced(x)
    torch.testing.assert_close(torch.compile(replaced, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(replaced, (x,)).module()(x), expected)
    learned = x.clone().requires_grad_()
    torch.compile(replaced, fullgraph=True, backend="aot_eager")(learned).sum().backward()
    assert learned.grad is not None
    torch.testing.assert_close(learned.grad, replaced.dense_weight().sum(0).expand(4, -1))


@BUILT
def test_op_passes_torch_checks() -> None:
    x = torch.randn(3, 20, requires_grad=True)
    levels = pack_levels(*example(9, 20, 5.0), each_width(9))
    torch.library.opcheck(torch.ops.cospadi.level_matmul, (x, list(levels)))


@BUILT
def test_levels_are_read_once_and_anew_when_the_layer_changes() -> None:
    layer, x = make_layer(), torch.randn(2, 30)
    layer(x)
    first = layer.kept_tensors()[0].data_ptr()
    layer(x + 1)
    assert layer.kept_tensors()[0].data_ptr() == first
    other = random_code(23, 30, torch.Generator().manual_seed(2), spread=2.0)
    state = layer.state_dict() | {"values": other}
    changed = CompressedLinear(30, 23, 30, 0, CODED, True, nbytes=len(other))
    changed.load_state_dict(state)
    y = changed(x)
    changed.codes.zero_().add_(other)
    assert torch.equal(changed(x), y)
    codes = layer.codes.clone()
    layer.to("cpu").to(torch.bfloat16)
    assert torch.equal(layer.codes, codes)
    layer(x.bfloat16())
    assert layer.kept_tensors()[0].data_ptr() == first


@BUILT
def test_levels_are_there_for_a_compiler_after_whatever_changed_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, read = make_layer(), Mock(side_effect=read_levels)
    monkeypatch.setattr("cospadi.runtime.layer.read_levels", read)
    layer.prepare(torch.float32)
    state = layer.state_dict()
    for change in (
        lambda: layer.set_runtime("dense", torch.float32),
        lambda: layer.set_runtime("packed", torch.float32),
        lambda: layer.load_state_dict(state),
        lambda: layer.to_empty(device="cpu").load_state_dict(state),
    ):
        change()
        layer.set_runtime("auto", torch.float32)
        assert len(layer.kept_tensors()) == len(Levels._fields)
    calls = read.call_count
    x = torch.randn(2, 30)
    layer(x), layer(x.bfloat16())
    assert read.call_count == calls


@BUILT
def test_numbers_that_are_no_floats_are_refused() -> None:
    with pytest.raises(ValueError, match="a float dtype is needed"):
        make_layer()(torch.ones(2, 30, dtype=torch.int64))
