"""How much the loss cares about each output of a projection: the diagonal of its Fisher matrix, on real text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cospadi.calibration.spill import Spill
from cospadi.calibration.walk import Calls, advance, call, embed, logits, replaced_forwards, replaced_weights, walk
from cospadi.errors import UserError
from cospadi.model.blocks import Blocks
from cospadi.model.projections import Projection, decoder_blocks

FLOOR = 1e-3
"""Smallest F_j, in means over the projection's outputs: no output is worth nothing."""


def output_fisher(
    model: nn.Module,
    projections: Sequence[Projection],
    sequences: Tensor,
    on_sequence: Callable[[float], None] | None = None,
) -> dict[str, Tensor]:
    """F_j of every output j: the mean over tokens of the squared gradient, at output j, of the summed next-token loss.

    One sequence at a time, and each decoder block is run again on the way back (gradient checkpointing), so that memory
    holds the whole model and the activations of one block. Parameters get no gradients.

    Args:
        sequences: int64 (sequences, tokens).
        on_sequence: called with 1 after each sequence.

    Returns:
        name -> float64 (d2,), floored at FLOOR of its mean. A projection that no token reached (an expert) gets the
        mean of its kind.

    Raises:
        UserError: a gradient that is not finite; the message names the projection.
    """
    fisher: dict[str, Tensor] = {}
    device = next(model.parameters()).device
    modules = list(decoder_blocks(model)[1])
    forwards = [partial(checkpoint, block.forward, use_reentrant=False) for block in modules]  # keep their inputs only
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        _squared_gradients(model, projections, fisher),
        _gradients_to_activations_only(model),
        replaced_forwards(modules, forwards),
    ):
        for tokens in sequences:
            tokens = tokens[None].to(device)
            summed_loss(model, model(input_ids=tokens, use_cache=False).logits, tokens).backward()  # type: ignore[no-untyped-call]
            if on_sequence:
                on_sequence(1)
    return _filled(fisher, projections, sequences.numel())


def output_fisher_by_blocks(
    blocks: Blocks,
    calls: Calls,
    projections: Sequence[Projection],
    sequences: Tensor,
    spill: Spill,
    replacement: Callable[[int], Mapping[str, Tensor]] = lambda _index: {},
    on_sequence: Callable[[float], None] | None = None,
) -> dict[str, Tensor]:
    """`output_fisher` with one block in memory at a time: forward, keeping the inputs of every block, then back.

    Args:
        calls: how blocks are called with one sequence.
        spill: keeps the inputs of all blocks.
        replacement: block index -> names in the block -> replacement weights (d2, d1).
        on_sequence: called with fractions that add up to the number of sequences.
    """
    fisher: dict[str, Tensor] = {}
    step = len(sequences) / (2 * len(blocks))
    inputs = [embed(blocks, sequences, 1, spill)]
    for index, block in walk(blocks, calls, range(len(blocks))):
        inputs.append(inputs[-1].copy())
        advance(block, index, calls, inputs[-1], replacement(index))
        if on_sequence:
            on_sequence(step)
    gradients = inputs.pop()
    with torch.inference_mode(False), torch.enable_grad():
        for batch, tokens in enumerate(sequences):
            hidden = gradients[batch].requires_grad_()
            tokens = tokens[None].to(blocks.device)
            summed_loss(blocks.model, logits(blocks, calls, hidden, tokens), tokens).backward()  # type: ignore[no-untyped-call]
            assert hidden.grad is not None
            gradients[batch] = hidden.grad
        for index, block in walk(blocks, calls, reversed(range(len(blocks)))):
            before = inputs.pop()
            with replaced_weights(block, replacement(index)):
                of_block = [p for p in projections if p.block == index]
                with _squared_gradients(blocks.model, of_block, fisher), _no_parameter_gradients(block):
                    for batch in range(len(before)):
                        hidden = before[batch].requires_grad_()
                        call(block, index, calls, hidden).backward(gradients[batch])  # type: ignore[no-untyped-call]
                        assert hidden.grad is not None
                        gradients[batch] = hidden.grad
            before.close()
            if on_sequence:
                on_sequence(step)
    gradients.close()
    return _filled(fisher, projections, sequences.numel())


def summed_loss(model: nn.Module, predicted: Tensor, tokens: Tensor) -> Tensor:
    """Next-token loss of one sequence, (1, tokens), summed over its tokens."""
    if not predicted.requires_grad:
        raise UserError(
            f"{type(model).__name__} gives no gradients. Use --allocate output, or --allocate uniform with "
            "--weight-columns none, which need none"
        )
    return nn.functional.cross_entropy(predicted[0, :-1].float(), tokens[0, 1:], reduction="sum")


@contextmanager
def _squared_gradients(
    model: nn.Module, projections: Sequence[Projection], fisher: dict[str, Tensor]
) -> Iterator[None]:
    """Inside this block, squared gradients at the projections' outputs are added up over tokens."""

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def add(gradient: Tensor) -> None:
            fisher[name] += gradient.detach().flatten(0, -2).double().square().sum(0)

        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(add)  # type: ignore[no-untyped-call]

        return hook

    handles = []
    for projection in projections:
        module = model.get_submodule(projection.name)
        assert isinstance(module, nn.Linear)
        fisher[projection.name] = torch.zeros(projection.d2, dtype=torch.float64, device=module.weight.device)
        handles.append(module.register_forward_hook(watch(projection.name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _filled(fisher: dict[str, Tensor], projections: Sequence[Projection], tokens: int) -> dict[str, Tensor]:
    """Means over tokens, floored; what was never reached takes the mean of its kind, or 1."""
    means: dict[str, list[float]] = {}
    for p in projections:
        fisher[p.name] = fisher[p.name] / tokens
        mean = float(fisher[p.name].mean())
        if not torch.isfinite(fisher[p.name]).all():
            raise UserError(
                f"the gradient at the output of {p.name} is not finite on the calibration text. "
                "Load the model in bf16 or float32, or use --allocate output --weight-columns none, which need none"
            )
        if mean > 0:
            means.setdefault(p.kind, []).append(mean)
    for p in projections:
        mean = float(fisher[p.name].mean())
        if mean == 0:
            of_kind = means.get(p.kind, [1.0])
            fisher[p.name] += sum(of_kind) / len(of_kind)
        else:
            fisher[p.name].clamp_(min=FLOOR * mean)
    return fisher


@contextmanager
def _gradients_to_activations_only(model: nn.Module) -> Iterator[None]:
    """Parameters need no gradient inside this block; what the embedding gives does, so that activations get theirs."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    handle = embedding.register_forward_hook(lambda _module, _args, output: output.requires_grad_())
    try:
        with _no_parameter_gradients(model):
            yield
    finally:
        handle.remove()


@contextmanager
def _no_parameter_gradients(module: nn.Module) -> Iterator[None]:
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_()
