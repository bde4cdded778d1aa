"""The calibration text on its way through the model, block by block.

`learn_calls` finds out what each block is called with beside the hidden states. `walk` is the loop over the blocks: one
at a time is in memory, and the hidden states of all batches, a `Flow`, go from block to block. It serves plain Gram
matrices (`grams`), those of a model that is compressed so far (`paired_grams`), gradients (`gradients.py`) and
solving.

Errors of the projections before it change a projection's input from X to X'. Asking for ||X W - X' D S|| small, where
plain calibration asks for ||X W - X D S||, lets every projection make up for the errors before it (the idea of
asymmetric calibration in quantization, GPTAQ, arXiv 2504.02692). With G = X'^T X' and C = X'^T X,

    ||X W - X' D S||^2 = ||L (W' - D S)||^2 + const,    L^T L = G,  W' = G^-1 C W:

the same problem for a corrected weight W', which is damped here: (G + a I)^-1 (C + a I) W. W' needs fewer
tokens than the metric of what is left.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cospadi.calibration.grams import adding_grams, gram_block, zero_gram
from cospadi.calibration.spill import Spill, Spilled
from cospadi.errors import UserError
from cospadi.model.blocks import Blocks
from cospadi.model.projections import read_by_linear

DAMPING = 1e-2
"""Pull of W' towards W, in mean diagonals of G."""


SAME = 1e-3
"""By how much logits of a walk may differ from the model's own, relative in norm."""


MASK = 1e4
"""From where on a logit stands for what must not be."""


class _Reached(Exception):
    """Ends a forward pass where its result is known."""


@dataclass(frozen=True)
class Calls:
    """What blocks are called with beside the hidden states, and what they give beside them.

    Attributes:
        given: number of sequences in a batch -> (args, kwargs) of each block.
        rest: what follows the hidden states in a block's output; None where it gives a bare tensor.
    """

    given: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]]
    rest: list[tuple[Any, ...] | None]


@dataclass
class Flow:
    """Hidden states before a block, a tensor (sequences, tokens, width) a batch, kept in a spill."""

    spill: Spill
    device: torch.device
    items: list[Spilled]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, batch: int) -> Tensor:
        return self.spill.get(self.items[batch], self.device)

    def __setitem__(self, batch: int, hidden: Tensor) -> None:
        self.spill.drop(self.items[batch])
        self.items[batch] = self.spill.put(hidden)

    def copy(self, batches: int | None = None) -> Flow:
        """The same hidden states again, of the first batches or of all."""
        return Flow(self.spill, self.device, [self.spill.put(self[batch]) for batch in range(len(self))[:batches]])

    def close(self) -> None:
        """Forget them."""
        for item in self.items:
            self.spill.drop(item)


@dataclass
class Stream:
    """A text on its way through the model, or through what replacement weights make of it.

    Attributes:
        flow: its hidden states before a block.
        weights: full layer name -> replacement weight (d2, d1); those of a block leave when it is passed.
        block: index of the block that it stands before.
    """

    flow: Flow
    weights: dict[str, Tensor] = field(default_factory=dict)
    block: int = 0

    def inside(self, name: str) -> dict[str, Tensor]:
        """Replacement weights in the block of that name, by their names there."""
        return in_block(name, self.weights.items())

    def advance(self, block: nn.Module, name: str, index: int, calls: Calls) -> None:
        """Carry it through a block of that name and index, whose replacement weights leave."""
        here = self.inside(name)
        advance(block, index, calls, self.flow, here)
        for inner in here:
            del self.weights[f"{name}.{inner}"]
        self.block = index + 1


def walk(blocks: Blocks, indices: Iterable[int]) -> Iterator[tuple[int, nn.Module]]:
    """The loop over the decoder blocks, of which one at a time is in memory.

    Args:
        indices: of the blocks, in the order of the walk.

    Yields:
        Index and block, whose weights are there until the next one is asked for, or until `Blocks.release`.
    """
    for index in indices:
        with blocks.loaded(index) as block:
            yield index, block


@torch.no_grad()
def learn_calls(blocks: Blocks, texts: Sequence[tuple[Tensor, int]], spill: Spill) -> Calls | None:
    """Run the first two batches of each size through the whole model and look at how the blocks are called; then carry
    one batch of the last size through the blocks one by one, which must give the same logits.

    Args:
        texts: token sequences, int64 (sequences, tokens), all of one length, each with the batch size it is run in.

    Returns:
        None where a block is given more than what the block before it gives and what is the same for every text, or
        where logits differ.
    """
    given: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
    rest: list[tuple[Any, ...] | None] = []
    compared: set[int] = set()
    for sequences, batch_size in texts:
        for batch in torch.split(sequences, batch_size):
            count = len(batch)
            if count in compared:
                continue
            seen, outputs = blocks_called(blocks.model, blocks.modules, batch.to(blocks.device), stop=False)
            check_not_nan(_first(outputs[-1]))
            if len(seen) != len(blocks) or seen[0][0].ndim != 3 or len(seen[0][0]) != count:
                return None
            follow = zip(outputs, seen[1:], strict=False)
            if not all(torch.equal(_first(output), right[0]) for output, right in follow):
                return None
            rest = [_rest(output) for output in outputs]
            arguments = [(args, kwargs) for _, args, kwargs in seen]
            if count not in given:
                given[count] = arguments
            elif _same(given[count], arguments):
                compared.add(count)
            else:  # the blocks are told something about the tokens
                return None
    calls = Calls(given, rest)
    return calls if _walks_as_it_runs(blocks, calls, texts[-1][0][: texts[-1][1]], spill) else None


def _walks_as_it_runs(blocks: Blocks, calls: Calls, batch: Tensor, spill: Spill) -> bool:
    """Whether one batch gives the same logits block by block as in the model's own forward pass, to rounding."""
    flow = embed(blocks, batch, len(batch), spill)
    for index, block in walk(blocks, range(len(blocks))):
        advance(block, index, calls, flow, {})
    found = logits(blocks, calls, flow[0], batch)
    flow.close()
    expected = blocks.model(input_ids=batch.to(blocks.device), use_cache=False).logits
    return relative_difference(found, expected) <= SAME


def check_not_nan(output: Tensor) -> None:
    """Refuse a model that computes what is no number.

    Raises:
        UserError: NaN is among it.
    """
    if output.isnan().any():
        raise UserError("the model computes NaN from the first tokens on. Its weights or its config.json are damaged")


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Of two tensors, in norm, over entries that are no masks (as large as their dtype has, or infinite); infinity
    where these are not in the same places, or one has NaN."""
    if found.isnan().any() or expected.isnan().any():
        return math.inf
    plain = expected.abs() < MASK
    if not torch.equal(plain, found.abs() < MASK):
        return math.inf
    found, expected = found[plain].double(), expected[plain].double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


@torch.no_grad()
def pass_seconds(blocks: Blocks, sequences: Tensor, batch_size: int) -> float:
    """Seconds of a plain forward pass of a text through the dense model: of its first two batches, less what reading
    weights took, scaled to all. To be called when the model has run before."""
    some = sequences[: 2 * batch_size]
    start, reading = _now(blocks.device), blocks.seconds_reading
    for batch in torch.split(some, batch_size):
        blocks.model(input_ids=batch.to(blocks.device), use_cache=False)
    took = _now(blocks.device) - start - (blocks.seconds_reading - reading)
    return took * len(sequences) / len(some)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _same(left: Any, right: Any) -> bool:
    """Whether two calls' arguments are equal, tensors by their values."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.shape == right.shape and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    return left is right or (type(left) is type(right) and not isinstance(left, Tensor) and bool(left == right))


def blocks_called(
    model: nn.Module, blocks: Sequence[nn.Module], tokens: Tensor, stop: bool
) -> tuple[list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]], list[Any]]:
    """What some blocks are called with, (hidden states, other args, kwargs), and their outputs; `stop` at the first."""
    seen: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []
    outputs: list[Any] = []

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        hidden = args[0] if args else rest.pop("hidden_states")
        seen.append((hidden, args[1:], rest))
        if stop:
            raise _Reached

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs.append(output)

    handles = [block.register_forward_pre_hook(before, with_kwargs=True, prepend=True) for block in blocks]
    handles += [block.register_forward_hook(after) for block in blocks]
    try:
        with suppress(_Reached):
            model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen, outputs


@torch.no_grad()
def embed(blocks: Blocks, sequences: Tensor, batch_size: int, spill: Spill) -> Flow:
    """The hidden states of a text before the first block."""
    items = []
    with blocks.passed_by():
        for batch in torch.split(sequences, batch_size):
            seen, _ = blocks_called(blocks.model, blocks.modules[:1], batch.to(blocks.device), stop=True)
            items.append(spill.put(seen[0][0]))
    return Flow(spill, blocks.device, items)


def call(block: Callable[..., Any], index: int, calls: Calls, hidden: Tensor) -> Tensor:
    """What a block, the one of that index, makes of hidden states."""
    args, kwargs = calls.given[len(hidden)][index]
    return _first(block(hidden, *args, **kwargs))


@torch.no_grad()
def advance(block: nn.Module, index: int, calls: Calls, flow: Flow, replacement: Mapping[str, Tensor]) -> None:
    """Carry hidden states through a block, in place of those before it.

    Args:
        replacement: names in the block -> replacement weights (d2, d1).
    """
    with replaced_weights(block, replacement):
        for batch in range(len(flow)):
            flow[batch] = call(block, index, calls, flow[batch])


def logits(blocks: Blocks, calls: Calls, hidden: Tensor, tokens: Tensor) -> Tensor:
    """What the model makes of hidden states after its last block, whose tokens were `tokens`, both of one batch."""

    def giving(rest: tuple[Any, ...] | None) -> Callable[..., Any]:
        return lambda *_args, **_kwargs: hidden if rest is None else (hidden, *rest)

    with blocks.passed_by(), replaced_forwards(blocks.modules, [giving(rest) for rest in calls.rest]):
        output: Tensor = blocks.model(input_ids=tokens.to(blocks.device), use_cache=False).logits
    return output


@contextmanager
def replaced_forwards(modules: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Other `forward`s for some modules inside this block, one each."""
    own = [vars(module).get("forward") for module in modules]  # somebody may have wrapped one already
    for module, forward in zip(modules, forwards, strict=True):
        module.forward = forward
    try:
        yield
    finally:
        for module, before in zip(modules, own, strict=True):
            del module.forward
            if before is not None:
                module.forward = before


@torch.no_grad()
def grams(
    block: nn.Module,
    index: int,
    calls: Calls,
    flow: Flow,
    readers: Mapping[str, nn.Module],
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """G = X^T X of the inputs of some modules of a block, through which the flow is carried.

    Args:
        readers: full module names -> linear layers of the block, one for each distinct input.
        on_batch: called with the number of sequences just done.

    Returns:
        name -> float64 (d1, d1), all zeros where a module never ran.

    Raises:
        UserError: a non-finite activation; the message names the module.
    """
    with adding_grams(readers) as sums:
        for batch in range(len(flow)):
            hidden = flow[batch]
            flow[batch] = call(block, index, calls, hidden)
            if on_batch:
                on_batch(len(hidden))
    return sums


@torch.no_grad()
def paired_grams(
    block: nn.Module,
    index: int,
    calls: Calls,
    dense: Flow,
    compressed: Flow,
    replacement: Mapping[str, Tensor],
    readers: Mapping[str, nn.Module],
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """G = X'^T X' and C = X'^T X of the inputs of some modules of a block.

    Args:
        dense, compressed: a text in the dense model and in the one that is compressed so far, before the block; of the
            second as many batches are looked at as the first has.
        replacement: names in the block -> weights of what is already compressed.
        readers: names in the block -> linear layers, one for each distinct input.

    Returns:
        name -> float64 (d1, d1) each. C is None where tokens of X and X' do not correspond: behind a router.

    Raises:
        UserError: a non-finite activation; the message names the module.
    """
    sums: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name, module in readers.items():
        sums[name] = zero_gram(module), zero_gram(module)
    for batch in range(len(dense)):
        before, hidden = dense[batch], compressed[batch]
        wanted = _inputs(block, readers, before, *calls.given[len(before)][index])
        with replaced_weights(block, replacement):
            given = _inputs(block, readers, hidden, *calls.given[len(hidden)][index])
        for name, (gram, cross) in sums.items():
            x, y = wanted.get(name), given.get(name)
            if y is not None:
                gram += gram_block(y, y, name)
            if cross is not None and (x is not None or y is not None):
                tokens = hidden.shape[0] * hidden.shape[1]
                if x is not None and y is not None and x.shape == y.shape and x.numel() == tokens * x.shape[-1]:
                    cross += gram_block(y, x, name)
                else:
                    sums[name] = gram, None
    return sums


def corrected(weight: Tensor, gram: Tensor, cross: Tensor | None) -> Tensor:
    """W' = (G + a I)^-1 (C + a I) W for W (d1, d2), in float64, with a = DAMPING mean diagonals of G."""
    weight = weight.double()
    shift = DAMPING * float(gram.diagonal().mean())
    if cross is None or shift == 0:
        return weight
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky(gram + shift * identity)
    return torch.cholesky_solve((cross + shift * identity) @ weight, factor)


@contextmanager
def replaced_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Replacement weights (d2, d1) for some linear layers of a module, by name, inside this block."""
    layers = {name: module.get_submodule(name) for name in weights}
    kept = {name: layer.weight.data for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.weight.data = weights[name]
        yield
    finally:
        for name, layer in layers.items():
            layer.weight.data = kept[name]


def _inputs(
    block: nn.Module, readers: Mapping[str, nn.Module], hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """What some modules of a block read in one pass."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def before(_module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            found[name] = read_by_linear(inputs, named).detach()
            if len(found) == len(readers):
                raise _Reached

        return before

    handles = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in readers.items()]
    try:
        with suppress(_Reached):
            block(hidden, *args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _first(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden


def _rest(output: Any) -> tuple[Any, ...] | None:
    """What a block gives beside hidden states, without tensors (attention weights, which nobody may read)."""
    if not isinstance(output, tuple):
        return None
    return tuple(None if isinstance(value, Tensor) else value for value in output[1:])


def in_block(name: str, weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Those of some weights whose layer lies in a block, by their names there."""
    return {layer.removeprefix(f"{name}."): weight for layer, weight in weights if layer.startswith(f"{name}.")}
