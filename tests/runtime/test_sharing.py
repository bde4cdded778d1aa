"""Layers that share a dictionary and an input multiply once, and nothing stale is ever used."""

from __future__ import annotations

import copy
import io
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_layer import LOW_RANK, make_layer
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import cospadi
from cospadi.model.projections import Projection, shared_inputs
from cospadi.runtime import layer as linear
from cospadi.runtime.layer import CompressedLinear, reuse_products

LAYERS = {
    "sparse": lambda d2: make_layer(d2=d2)[0],
    "low-rank": lambda d2: CompressedLinear(24, d2, 13, 0, LOW_RANK, bias=True),
}


class Parent(nn.Module):
    """Three layers with one dictionary, and what may happen between their calls."""

    def __init__(self, layout: str = "sparse", reuse: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (LAYERS[layout](d2) for d2 in (19, 20, 21))
        if layout == "low-rank":
            for parameter in self.parameters():
                nn.init.normal_(parameter)
        shared = "left" if layout == "low-rank" else "dictionary"
        for layer in (self.b, self.c):
            setattr(layer, shared, getattr(self.a, shared))
        if reuse:
            reuse_products(self, [self.a, self.b, self.c], "a")

    def forward(self, x: Tensor, between: Callable[[Tensor], Any] = lambda x: None) -> Tensor:
        a = self.a(x)
        between(x)
        return torch.cat([a, self.b(x), self.c(x)], dim=-1)


class Products(TorchDispatchMode):
    """Counts products with factors of these shapes (k, d1), whatever operation they end up in."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.shapes, self.count = shapes, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.linear.default:  # whole in inference mode
            self.count += tuple(args[1].shape) in self.shapes
        if func is torch.ops.aten.mm.default:
            self.count += tuple(args[1].shape[::-1]) in self.shapes
        return func(*args, **(kwargs or {}))


@contextmanager
def products(expected: int) -> Iterator[None]:
    with Products((13, 24)) as counter:
        yield
    assert counter.count == expected
    assert not linear._open_groups.product


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 24, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("layout", LAYERS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_one_product_and_the_same_output(layout: str, mode: Any, x: Tensor) -> None:
    with mode():
        plain = Parent(layout, reuse=False)
        with products(3):
            expected = plain(x)
        with products(1):
            assert torch.equal(Parent(layout)(x), expected)


def test_layers_alone_and_without_a_group_multiply_each_time(x: Tensor) -> None:
    parent = Parent()
    with products(3):
        for layer in (parent.a, parent.b, parent.c):
            layer(x)
    lone = make_layer()[0]
    assert lone.group is None
    assert not lone._forward_hooks


def test_input_changed_in_place_between_layers_is_multiplied_again(x: Tensor) -> None:
    expected = Parent(reuse=False)(x.clone(), lambda x: x.add_(1))
    with torch.no_grad(), products(2):
        assert torch.equal(Parent()(x, lambda x: x.add_(1)), expected)


def test_input_changed_in_place_between_calls_is_multiplied_again() -> None:
    with torch.inference_mode():
        x, parent, plain = torch.randn(5, 24), Parent(), Parent(reuse=False)
        assert x.is_inference()
        for _ in range(3):
            assert torch.equal(parent(x), plain(x))
            x.mul_(-0.5)


def test_another_mode_between_layers_is_multiplied_again(x: Tensor) -> None:
    parent, plain = Parent(), Parent(reuse=False)

    class Mixed(nn.Module):
        def __init__(self, inner: Parent) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> list[Tensor]:
            with torch.no_grad():
                first = self.inner.a(x)
            with torch.autocast("cpu", torch.bfloat16):
                second = self.inner.b(x)
            return [first, second, self.inner.c(x)]

    with products(3):
        wanted = Mixed(plain)(x)
    mixed = Mixed(parent)
    reuse_products(mixed, [parent.a, parent.b, parent.c], "a")
    with products(3):
        found = mixed(x)
    for one, two in zip(found, wanted, strict=True):
        assert torch.equal(one, two)
        assert one.dtype == two.dtype
        assert one.requires_grad == two.requires_grad


def test_another_dictionary_or_input_is_multiplied_again(x: Tensor) -> None:
    parent, plain = Parent(), Parent(reuse=False)
    for module in (parent, plain):
        module.c.dictionary = nn.Parameter(module.a.dictionary.detach() * 2)
    expected = plain(x)
    with products(2):
        assert torch.equal(parent(x), expected)
    with products(4):  # the same numbers in another tensor, which takes the place of the first
        assert torch.equal(parent(x, lambda x: parent.a(x.clone())), expected)


def test_exceptions_and_reentrancy_leave_nothing_open(x: Tensor) -> None:
    parent, plain = Parent(), Parent(reuse=False)

    def stop(x: Tensor) -> None:
        raise RuntimeError("between")

    with pytest.raises(RuntimeError, match="between"):
        parent(x, stop)
    assert not linear._open_groups.product
    inner: list[Tensor] = []
    expected = plain(x)
    found = parent(x, lambda x: inner.append(parent(x + 1)))
    assert torch.equal(found, expected)
    assert torch.equal(inner[0], plain(x + 1))
    other = Parent("low-rank")
    assert torch.equal(parent(x, lambda x: inner.append(other(x))), expected)
    assert torch.equal(inner[1], Parent("low-rank", reuse=False)(x))
    assert not linear._open_groups.product


def test_copies_and_pickles_keep_the_mechanism_to_themselves(x: Tensor) -> None:
    parent = Parent()
    expected = parent(x)
    buffer = io.BytesIO()
    torch.save(parent, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(parent), torch.load(buffer, weights_only=False)):
        assert twin.a.dictionary is twin.c.dictionary
        assert twin.a.dictionary is not parent.a.dictionary
        with products(1):
            assert torch.equal(twin(x), expected)
        with torch.no_grad():
            twin.a.dictionary.zero_()
        assert twin(x).norm() < expected.norm()
        assert torch.equal(parent(x), expected)


def test_shapes_are_told_without_numbers(x: Tensor) -> None:
    assert Parent().to("meta")(x.to("meta")).shape == (5, 60)


def test_threads_do_not_meet() -> None:
    parent, plain = Parent(), Parent(reuse=False)
    barrier = threading.Barrier(4, timeout=60)
    inputs = [torch.randn(5, 24, generator=torch.Generator().manual_seed(n)) for n in range(3)] + [torch.zeros(5, 24)]
    found: dict[int, bool] = {}

    def work(n: int) -> None:
        with torch.no_grad():
            expected = plain(inputs[n])
            found[n] = all(
                torch.allclose(parent(inputs[n], lambda x: barrier.wait() and None), expected, rtol=1e-4, atol=1e-5)
                for _ in range(20)  # not to the bit: threads of a product may be fewer while others run
            )

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), True)


@pytest.mark.parametrize("layout", LAYERS)
@pytest.mark.parametrize("through", ["plain", "checkpoint", "reentrant checkpoint"])
def test_gradients_are_those_without_reuse(layout: str, through: str, x: Tensor) -> None:
    gradients = []
    for reuse in (False, True):
        parent, leaf = Parent(layout, reuse), x.clone().requires_grad_()
        y = parent(leaf) if through == "plain" else checkpoint(parent, leaf, use_reentrant=through.startswith("re"))
        y.square().sum().backward()
        gradients.append([leaf.grad, *(p.grad for p in parent.parameters())])
    assert not linear._open_groups.product
    for without, reused in zip(*gradients, strict=True):
        assert (without is None) == (reused is None)
        if without is not None:
            torch.testing.assert_close(reused, without, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYERS)
@pytest.mark.parametrize("training", [False, True])
def test_compiled_code_has_one_product(layout: str, training: bool, x: Tensor) -> None:
    parent = Parent(layout)
    graphs: list[Counter[tuple[int, ...]]] = []

    def look(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        nodes = [n for n in graph.graph.nodes if n.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)]
        graphs.append(Counter(tuple(node.args[-1].meta["val"].shape) for node in nodes))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(parent, fullgraph=True, backend=aot_autograd(fw_compiler=look))
    with torch.set_grad_enabled(training):
        found = compiled(x)
    torch.testing.assert_close(found, Parent(layout, reuse=False)(x))
    assert graphs[0][24, 13] == 1
    assert not linear._open_groups.product


def test_blocks_compiled_one_by_one_share_their_code(
    make_llama: Callable[..., Path], quick: dict[str, Any], prompt: Tensor, tmp_path: Path
) -> None:
    cospadi.compress(make_llama(num_hidden_layers=4), quick | {"solver": "ksvd"}, tmp_path / "out")
    model = cospadi.load(tmp_path / "out", device="cpu")
    with torch.no_grad():
        expected = model(input_ids=prompt, use_cache=False).logits
        torch._dynamo.reset()
        counter = CompileCounter()
        for block in model.model.layers:
            block.compile(backend=counter, fullgraph=True)
        found = model(input_ids=prompt, use_cache=False).logits
    torch.testing.assert_close(found, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("share", ["none", "input", "layers:2", "input,layers:2"])
@pytest.mark.parametrize("solver", ["ksvd", "svd-llm"])
def test_products_of_a_whole_model(
    share: str, solver: str, dense_folder: Path, quick: dict[str, Any], prompt: Tensor, tmp_path: Path
) -> None:
    """In each of two blocks 7 projections read 4 different tensors."""
    cospadi.compress(dense_folder, quick | {"solver": solver, "share": share}, tmp_path / "out")
    model = cospadi.load(tmp_path / "out", device="cpu")
    factors = {id(p): p for n, p in model.named_parameters() if n.endswith((".dictionary", ".left"))}
    shapes = {tuple(factor.shape) for factor in factors.values()}
    assert len({id(p) for p in factors.values()}) == {"none": 14, "input": 8, "layers:2": 7, "input,layers:2": 4}[share]

    with torch.inference_mode(), Products(*shapes) as counter:
        found = model(input_ids=prompt, use_cache=False).logits
    assert counter.count == (8 if "input" in share else 14)
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    with torch.inference_mode(), Products(*shapes) as counter:
        assert torch.equal(model(input_ids=prompt, use_cache=False).logits, found)
    assert counter.count == 14


def test_what_did_not_run_is_left_out_but_for_experts_and_inputs_that_changed_are_not_shared() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.idle = (nn.Linear(4, 4) for _ in range(4))
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            self.other_experts = nn.ModuleList([nn.Linear(4, 4)])  # none of which runs

        def forward(self, x: Tensor) -> Tensor:
            first = self.a(x), self.b(input=x)
            x.add_(1)
            return self.c(x) + self.experts[1](x.clone()) + sum(first)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.blocks = nn.Embedding(9, 4), nn.ModuleList([Block()])

        def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
            return self.blocks[0](self.embed(input_ids))

    kinds = ["a", "b", "c", "idle", "experts.0", "experts.1", "other_experts.0"]
    owner = shared_inputs(Model(), [Projection(f"blocks.0.{kind}", 0, kind, 4, 4) for kind in kinds])
    ran = ["a", "b", "c", "experts.0", "experts.1"]
    assert owner == {f"blocks.0.{kind}": f"blocks.0.{'a' if kind == 'b' else kind}" for kind in ran}
