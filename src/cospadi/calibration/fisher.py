"""How much the loss cares about each output of a projection: the diagonal of its Fisher matrix, on real text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cospadi.errors import UserError
from cospadi.projections import Projection, decoder_blocks

FLOOR = 1e-3
"""Smallest F_j, in means over the projection's outputs: no output is worth nothing."""


def output_fisher(
    model: nn.Module,
    projections: Sequence[Projection],
    sequences: Tensor,
    on_sequence: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """F_j of every output j: the mean over tokens of the squared gradient, at output j, of the summed next-token loss.

    One sequence at a time, and each decoder block is run again on the way back (gradient checkpointing), so that memory
    holds the activations of one block. Parameters get no gradients.

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
    device = next(model.parameters()).device
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            _gradients_to_activations_only(model),
            _blocks_checkpointed(model),
        ):
            for tokens in sequences:
                tokens = tokens[None].to(device)
                logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
                if not logits.requires_grad:
                    raise UserError(
                        f"{type(model).__name__} gives no gradients. Use --allocate output, or --allocate uniform with "
                        "--weight-columns none, which need none"
                    )
                nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").backward()  # type: ignore[no-untyped-call]
                if on_sequence:
                    on_sequence(1)
    finally:
        for handle in handles:
            handle.remove()
    return _filled(fisher, projections, sequences.numel())


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
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    handle = embedding.register_forward_hook(lambda _module, _args, output: output.requires_grad_())
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        handle.remove()
        for parameter in wanted:
            parameter.requires_grad_()


@contextmanager
def _blocks_checkpointed(model: nn.Module) -> Iterator[None]:
    """Decoder blocks keep their inputs only and run again on the way back."""
    blocks = list(decoder_blocks(model)[1])
    own = [vars(block).get("forward") for block in blocks]  # somebody may have wrapped one already
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward
