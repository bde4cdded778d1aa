"""The layer and the op against float64 products, under the compiler, and with gradients."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forms import write_mixed
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoModelForCausalLM

from cospadi import CompressedLinear
from cospadi.format import packing
from cospadi.format.codecs import CODECS, codec_of_bits
from cospadi.format.form import Form
from cospadi.runtime import op
from cospadi.runtime.layer import Runtime, set_runtime

LOW_RANK = Form("stored", "full", "bf16")


def make_layer(
    d1: int = 24, d2: int = 19, k: int = 13, bits: int = 14, bias: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[CompressedLinear, torch.Tensor, torch.Tensor]:
    """A layer with random factors, and its D (d1, k) and S (k, d2) in float64."""
    generator = torch.Generator().manual_seed(d1 + d2 + k)
    support = torch.rand(d2, k, generator=generator) < 0.4
    support[0], support[1] = False, True
    values = torch.randn(int(support.sum()), generator=generator)
    layer = CompressedLinear(d1, d2, k, len(values), Form("stored", "mask", codec_of_bits(bits)), bias, dtype)
    with torch.no_grad():
        layer.dictionary.copy_(torch.randn(k, d1, generator=generator))
        if layer.bias is not None:
            layer.bias.copy_(torch.randn(d2, generator=generator))
    layer.support.copy_(packing.pack_support(support))
    layer.values.copy_(packing.pack_values(values, bits))
    stored = packing.unpack_values(layer.values, len(values), bits)
    codes = packing.unpack_coefficients(layer.support, stored, k).double().T
    return layer, layer.dictionary.detach().double().T, codes


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize("bits", [14, 16])
@pytest.mark.parametrize("runtime", ["auto", "packed", "unpacked", "dense"])
@pytest.mark.parametrize("shape", [(1, 24), (2, 5, 24), (0, 24)])
def test_output_is_that_of_the_product(
    dtype: torch.dtype, tolerance: float, bits: int, runtime: Runtime, shape: tuple[int, ...]
) -> None:
    layer, dictionary, codes = make_layer(bits=bits, dtype=dtype)
    layer.set_runtime(runtime)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    expected = x.double() @ dictionary @ codes + layer.bias.double()
    y = layer(x)
    assert y.dtype == dtype
    assert y.shape == expected.shape
    assert (y.double() - expected).norm() <= tolerance * expected.norm()


def test_non_contiguous_input() -> None:
    layer, _, _ = make_layer()
    x = torch.randn(24, 6).T
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("runtime", ["unpacked", "dense"])
def test_what_a_runtime_keeps_is_made_once_and_dropped_when_the_layer_moves(runtime: Runtime) -> None:
    layer, _, _ = make_layer()
    x = torch.randn(3, 24)
    layer.set_runtime(runtime)
    first = layer(x)
    kept = layer._kept
    assert kept is not None
    layer(x)
    assert layer._kept is kept
    layer.double()
    assert layer._kept is None
    torch.testing.assert_close(layer(x.double()).float(), first, rtol=1e-5, atol=1e-5)
    layer.set_runtime("packed")
    layer(x)
    assert layer._kept is None


@pytest.mark.parametrize("chosen", ["unpacked", "dense"])
def test_without_a_dictionary_the_model_tells_what_to_keep_before_it_runs(chosen: Runtime) -> None:
    """A compiler could not make it."""
    support = torch.rand(19, 24) < 0.6
    layer = CompressedLinear(24, 19, 24, int(support.sum()), Form("identity", "mask", "f14"))
    assert layer.support is not None
    layer.support.copy_(packing.pack_support(support))
    layer.codes.copy_(layer.form.codec.encode(torch.randn(layer.nnz)))
    model = torch.nn.Sequential(torch.nn.Linear(24, 24), layer).requires_grad_(False)
    set_runtime(model, chosen)
    kept = layer._kept
    assert kept is not None
    torch.testing.assert_close(kept[1], layer.coefficients())
    x = torch.randn(3, 24)
    found = torch.compile(model, backend="eager")(x)
    torch.testing.assert_close(found, model[0](x) @ kept[1].T)
    assert layer._kept is kept


def test_without_a_kernel_coefficients_are_kept_unless_packed_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, dictionary, codes = make_layer(bias=False)
    x = torch.randn(3, 24)
    monkeypatch.setattr(op, "has_kernel", lambda *_: False)
    for runtime, kept in (("auto", True), ("packed", False)):
        layer.set_runtime(runtime)
        torch.testing.assert_close(layer(x).double(), x.double() @ dictionary @ codes, rtol=1e-4, atol=1e-4)
        assert (layer._kept is not None) == kept


def test_loaded_values_are_counted_anew() -> None:
    layer, _, _ = make_layer()
    other, dictionary, codes = make_layer(bias=False)
    with torch.no_grad():
        other.support.copy_(packing.pack_support(packing.unpack_support(other.support, 13).flip(0)))
    layer(torch.randn(2, 24))
    state = other.state_dict() | {"bias": torch.zeros(19)}
    layer.load_state_dict(state)
    x = torch.randn(2, 24)
    torch.testing.assert_close(layer(x), other(x))
    assert not torch.allclose(layer(x).double(), x.double() @ dictionary @ codes)


def test_torch_compile_takes_it_whole() -> None:
    layer, _, _ = make_layer()
    x = torch.randn(4, 24)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_a_generation_loop_compiles_whole(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    """Masks, levels and dictionaries in one model: without a graph break, once for the prompt and once for a token."""
    shared = dict.fromkeys(("q_proj", "k_proj", "v_proj"), Form("stored", "mask", "f14"))
    others = {"o_proj": Form("identity", "mask", "f14"), "gate_proj": Form("identity", "full", "ec")}
    others |= {"up_proj": Form("identity", "full", "int4g64"), "down_proj": LOW_RANK}
    write_mixed((shared | others).get, make_llama(num_hidden_layers=1), tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    how = {"max_new_tokens": 6, "cache_implementation": "static", "do_sample": False, "pad_token_id": 0}
    prompt = torch.tensor([[7, 3, 11, 250]])
    expected = model.generate(prompt, eos_token_id=None, **how)
    counter = CompileCounter()
    model.forward = torch.compile(model.forward, fullgraph=True, backend=counter)
    assert torch.equal(model.generate(prompt, eos_token_id=None, **how), expected)
    assert counter.frame_count == 2


def test_torch_export_takes_it() -> None:
    layer, _, _ = make_layer()
    x = torch.randn(4, 24)
    exported = torch.export.export(layer, (x,))
    assert any("sparse_matmul" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), layer(x))


def test_op_passes_torch_checks() -> None:
    layer, _, _ = make_layer()
    z = torch.randn(4, 13, requires_grad=True)
    values = torch.randn(layer.nnz, requires_grad=True)
    torch.library.opcheck(
        torch.ops.cospadi.sparse_matmul.default, (z, layer.support, values, None, 19, 13, "mask", None, None)
    )
    packed = (layer.support, layer.values, layer.column_offsets(), 19, 13, "mask", "f14", None)
    torch.library.opcheck(torch.ops.cospadi.sparse_matmul.default, (z, *packed))
    full = torch.randn(19, 13, requires_grad=True)
    torch.library.opcheck(torch.ops.cospadi.sparse_matmul.default, (z, None, full, None, 19, 13, "full", None, None))
    stream = CODECS["f14"].encode(full.detach())
    torch.library.opcheck(torch.ops.cospadi.sparse_matmul.default, (z, None, stream, None, 19, 13, "full", "f14", None))


def test_gradients_reach_dictionary_values_and_input() -> None:
    layer, dictionary, codes = make_layer()
    layer.unpack_values()
    x = torch.randn(5, 24, requires_grad=True)
    weights = torch.randn(5, 19)
    (layer(x) * weights).sum().backward()

    d = dictionary.clone().requires_grad_()
    s = codes.clone().requires_grad_()
    x64 = x.detach().double().requires_grad_()
    ((x64 @ d @ s + layer.bias.detach().double()) * weights.double()).sum().backward()
    torch.testing.assert_close(layer.dictionary.grad.double(), d.grad.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-4)
    support = packing.unpack_support(layer.support, 13)
    torch.testing.assert_close(layer.values.grad.double(), s.grad.T[support], rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_input_of_a_packed_layer() -> None:
    layer, dictionary, codes = make_layer()
    x = torch.randn(5, 24, requires_grad=True)
    layer(x).sum().backward()
    expected = torch.ones(5, 19, dtype=torch.float64) @ (dictionary @ codes).T
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-4, atol=1e-4)


def test_trained_values_are_saved_packed() -> None:
    layer, _, _ = make_layer()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    parameter = layer.unpack_values()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    with torch.no_grad():
        parameter.mul_(2)
    fresh, _, _ = make_layer()
    fresh.load_state_dict(layer.state_dict())
    x = torch.randn(2, 24)
    torch.testing.assert_close(fresh(x), layer(x), rtol=1e-2, atol=1e-2)
    layer.load_state_dict(before)
    assert torch.equal(layer.state_dict()["values"], before["values"])


def test_dense_weight() -> None:
    layer, dictionary, codes = make_layer()
    torch.testing.assert_close(layer.dense_weight(torch.float64), (dictionary @ codes).T)


def test_low_rank_layer() -> None:
    layer = CompressedLinear(12, 9, 4, 0, LOW_RANK, bias=True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    x = torch.randn(3, 12)
    expected = nn_linear(x, layer.dense_weight(torch.float64), layer.bias)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


def nn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    assert bias is not None
    return x.double() @ weight.T + bias.detach().double()


def test_a_wrong_width_is_refused_by_every_path() -> None:
    layer, _, _ = make_layer(dtype=torch.bfloat16, bias=False)
    for runtime in ("packed", "unpacked", "dense"):
        layer.set_runtime(runtime)
        for width in (1, 23, 25, 48, 240):
            with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                layer(torch.randn(1, width).bfloat16())
    for width in (1, 12, 26, 130):
        with pytest.raises(ValueError, match="do not belong to 13 atoms"):
            op.sparse_matmul(torch.randn(1, width), layer.support, layer.values, None, 19, 13, "mask", "f14")


def test_what_is_written_to_a_layer_counts() -> None:
    layer, _, _ = make_layer(bias=False)
    other, dictionary, _ = make_layer(bias=False)
    x = torch.randn(3, 24)
    for runtime in ("auto", "unpacked", "dense"):
        layer.set_runtime(runtime)
        with torch.no_grad():
            layer.dictionary.copy_(other.dictionary)
            expected = layer(x)
            layer.dictionary.mul_(2)
            torch.testing.assert_close(layer(x), 2 * expected)
            layer.dictionary.mul_(0.5)
            flipped = packing.pack_support(packing.unpack_support(layer.support, 13).flip(1))
            layer.support.copy_(flipped)
            dense = layer.coefficients().double()
            torch.testing.assert_close(layer(x).double(), x.double() @ dictionary @ dense.T, rtol=1e-4, atol=1e-4)
            layer.support.copy_(other.support)


def test_a_dictionary_that_learns_is_not_multiplied_into_a_kept_weight() -> None:
    layer, _, _ = make_layer()
    layer.set_runtime("dense")
    layer(torch.randn(2, 24)).sum().backward()
    assert layer.dictionary.grad is not None
    assert layer.dictionary.grad.abs().sum() > 0


def test_a_change_of_dtype_leaves_stored_values_alone() -> None:
    layer, _, _ = make_layer(bits=16)
    with torch.no_grad():
        layer.values[0], layer.values[1] = 1e5, 1e-6
    values = layer.values.clone()
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        layer.to(dtype)
        assert layer.dictionary.dtype == dtype
        assert torch.equal(layer.values, values)


def test_a_layer_on_the_meta_device_tells_shapes() -> None:
    layer, _, _ = make_layer()
    layer(torch.randn(1, 24))
    for runtime in ("auto", "dense", "unpacked"):
        layer = layer.to("meta")
        layer.set_runtime(runtime)
        assert layer(torch.empty(2, 24, device="meta")).shape == (2, 19)


def test_memory_made_anew_is_counted_anew() -> None:
    layer, _, _ = make_layer(bias=False)
    layer(torch.randn(1, 24))
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(2, 24)
    expected = layer(x)
    layer.to_empty(device="cpu")
    layer.load_state_dict(state)
    torch.testing.assert_close(layer(x), expected)


def test_tracers_see_the_products() -> None:
    layer, _, _ = make_layer(dtype=torch.bfloat16)
    x, other = torch.randn(2, 24).bfloat16(), torch.randn(2, 24).bfloat16()
    with torch.no_grad():
        layer(x)
        traced = torch.jit.trace(layer, (x,))
        torch.testing.assert_close(traced(other), layer(other), rtol=1e-2, atol=1e-2)
        graph = make_fx(layer)(x)
        torch.testing.assert_close(graph(other), layer(other), rtol=1e-2, atol=1e-2)


def test_forward_derivatives_are_not_lost() -> None:
    """The op has none: it says so."""
    layer, _, _ = make_layer(bias=False)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.randn(2, 24), torch.randn(2, 24))
        with pytest.raises((NotImplementedError, RuntimeError), match="forward"):
            layer(dual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_compiler_takes_any_batch(dtype: torch.dtype) -> None:
    layer, _, _ = make_layer(dtype=dtype)
    layer.column_offsets()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (2, 5, 30):
            x = torch.randn(rows, 24).to(dtype)
            torch.testing.assert_close(compiled(x), layer(x), rtol=2e-2, atol=2e-2)
