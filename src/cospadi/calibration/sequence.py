"""Calibration in sequence: what a projection reads in the compressed model, against what it read in the dense one.

Errors of the projections before it change a projection's input from X to X'. Asking for ||X W - X' D S|| small, where
plain calibration asks for ||X W - X D S||, lets every projection make up for the errors before it (the idea of
asymmetric calibration in quantization, GPTAQ, arXiv 2504.02692). With G = X'^T X' and C = X'^T X,

    ||X W - X' D S||^2 = ||L (W' - D S)||^2 + const,    L^T L = G,  W' = G^-1 C W:

the same problem for a corrected weight W', which is damped here: (G + a I)^-1 (C + a I) W. The text runs through one
block at a time, once with the dense weights and once with those that are already compressed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cospadi.calibration.gram import gram_block

DAMPING = 1e-2
"""Pull of W' towards W, in mean diagonals of G."""


class _Reached(Exception):
    """Ends a forward pass where its result is known."""


@dataclass
class Flow:
    """The text on its way through the model.

    Attributes:
        dense, compressed: hidden states before the current block, a tensor (sequences, tokens, width) a batch.
        calls: number of sequences -> what each block is called with beside the hidden states: (args, kwargs).
    """

    dense: list[Tensor]
    compressed: list[Tensor]
    calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]]


@torch.no_grad()
def start(model: nn.Module, blocks: Sequence[nn.Module], sequences: Tensor, batch_size: int) -> Flow | None:
    """The hidden states before the first block; None where a block is given more than what the block before it
    gives and what is the same for every text."""
    device = next(model.parameters()).device
    hidden: list[Tensor] = []
    calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
    compared: set[int] = set()
    for batch in torch.split(sequences, batch_size):
        count = len(batch)
        whole = count not in compared  # the first two batches of a size go all the way
        seen, outputs = _run(model, blocks if whole else blocks[:1], batch.to(device), stop=not whole)
        first = seen[0][0]
        if first.ndim != 3 or first.shape[0] != count:
            return None
        hidden.append(first)
        if whole:
            follow = zip(outputs, seen[1:], strict=False)
            if len(seen) != len(blocks) or not all(torch.equal(left, right[0]) for left, right in follow):
                return None
            given = [(args, kwargs) for _, args, kwargs in seen]
            if count not in calls:
                calls[count] = given
            elif _same(calls[count], given):
                compared.add(count)
            else:  # the blocks are told something about the tokens
                return None
    return Flow(hidden, list(hidden), calls)


def _same(left: Any, right: Any) -> bool:
    """Whether two calls' arguments are equal, tensors by their values."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.shape == right.shape and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    return left is right or (type(left) is type(right) and not isinstance(left, Tensor) and bool(left == right))


def _run(
    model: nn.Module, blocks: Sequence[nn.Module], tokens: Tensor, stop: bool
) -> tuple[list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]], list[Tensor]]:
    """What some blocks are called with, (hidden states, other args, kwargs), and their outputs; `stop` at the first."""
    seen: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []
    outputs: list[Tensor] = []

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        hidden = args[0] if args else rest.pop("hidden_states")
        seen.append((hidden, args[1:], rest))
        if stop:
            raise _Reached

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs.append(_first(output))

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(after) for block in blocks]
    try:
        with suppress(_Reached):
            model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen, outputs


@torch.no_grad()
def grams(
    block: nn.Module,
    index: int,
    flow: Flow,
    stand_ins: Mapping[str, Tensor],
    readers: Mapping[str, nn.Module],
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """G = X'^T X' and C = X'^T X of the inputs of some modules of a block.

    Args:
        index: the block's.
        stand_ins: names in the block -> weights of what is already compressed.
        readers: names in the block -> linear layers, one for each distinct input.
        on_batch: called with 1 after each batch.

    Returns:
        name -> float64 (d1, d1) each. C is None where tokens of X and X' do not correspond: behind a router.

    Raises:
        UserError: a non-finite activation; the message names the module.
    """
    sums: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name, module in readers.items():
        assert isinstance(module, nn.Linear)
        zero = torch.zeros(module.in_features, module.in_features, dtype=torch.float64, device=module.weight.device)
        sums[name] = zero, zero.clone()
    for dense, compressed in zip(flow.dense, flow.compressed, strict=True):
        args, kwargs = flow.calls[len(dense)][index]
        wanted = _inputs(block, readers, dense, args, kwargs)
        with other_weights(block, stand_ins):
            given = _inputs(block, readers, compressed, args, kwargs)
        for name, (gram, cross) in sums.items():
            x, y = wanted.get(name), given.get(name)
            if y is not None:
                gram += gram_block(y, y, name)
            if cross is not None and (x is not None or y is not None):
                tokens = dense.shape[0] * dense.shape[1]
                if x is not None and y is not None and x.shape == y.shape and x.numel() == tokens * x.shape[-1]:
                    cross += gram_block(y, x, name)
                else:
                    sums[name] = gram, None
        if on_batch:
            on_batch(1)
    return sums


@torch.no_grad()
def advance(block: nn.Module, index: int, flow: Flow, stand_ins: Mapping[str, Tensor]) -> None:
    """Carry the hidden states through a block, in place of those before it."""
    for batch, dense in enumerate(flow.dense):
        args, kwargs = flow.calls[len(dense)][index]
        flow.dense[batch] = _first(block(dense, *args, **kwargs))
        with other_weights(block, stand_ins):
            flow.compressed[batch] = _first(block(flow.compressed[batch], *args, **kwargs))


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
def other_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Other weights for some linear layers of a module, by name, inside this block."""
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
        def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name] = inputs[0].detach()
            if len(found) == len(readers):
                raise _Reached

        return before

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in readers.items()]
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
