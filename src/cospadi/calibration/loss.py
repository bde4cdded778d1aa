"""Next-token loss of a causal language model, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


def total_loss(logits: Tensor, tokens: Tensor) -> float:
    """Negative log-likelihood of every token but the first of each row, in nats, all added up.

    Log-softmax is taken in float32; losses are summed in float64.

    Args:
        logits: (rows, length, vocabulary), any float dtype. tokens: int64 (rows, length), on the same device.
    """
    predicted = logits[:, :-1].float()
    losses = nn.functional.cross_entropy(predicted.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return float(losses.double().sum())


@torch.inference_mode()
def mean_loss(
    model: nn.Module,
    windows: Tensor,
    batch_size: int = 4,
    on_batch: Callable[[int], None] | None = None,
) -> float:
    """Mean negative log-likelihood, in nats, of every token but the first of each window, int64 (windows, length).

    Logits are taken in the model's dtype.

    Args:
        on_batch: called with the number of windows just done.
    """
    device = next(model.parameters()).device
    total = 0.0
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size].to(device)
        total += total_loss(model(input_ids=batch, use_cache=False).logits, batch)
        if on_batch:
            on_batch(len(batch))
    return total / predicted_tokens(windows)


@torch.inference_mode()
def compared(
    model: nn.Module,
    reference: nn.Module,
    windows: Tensor,
    batch_size: int = 4,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[float, float, float]:
    """Two models of one vocabulary on the same windows, int64 (windows, length), logits in their dtypes.

    Args:
        on_batch: called with the number of windows just done.

    Returns:
        `mean_loss` of each; and KL(q || p), q the next-token distribution of the reference and p that of the model, in
        nats, the mean over the same tokens, log-softmax in float32.
    """
    device = next(model.parameters()).device
    losses, divergence = [0.0, 0.0], 0.0
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size].to(device)
        found = [one(input_ids=batch, use_cache=False).logits for one in (model, reference)]
        losses = [loss + total_loss(logits, batch) for loss, logits in zip(losses, found, strict=True)]
        for ours, theirs in zip(*found, strict=True):
            p, q = ours[:-1].float().log_softmax(-1), theirs[:-1].float().log_softmax(-1)
            divergence += float((q.exp() * (q - p)).sum(-1).sum(dtype=torch.float64))
        if on_batch:
            on_batch(len(batch))
    tokens = predicted_tokens(windows)
    return losses[0] / tokens, losses[1] / tokens, divergence / tokens


def predicted_tokens(windows: Tensor) -> int:
    """Tokens of all windows, (windows, length), but the first of each."""
    count, length = windows.shape
    return count * (length - 1)


def perplexity_of(mean: float) -> float:
    """exp of a mean loss in nats; infinite where that is beyond a float."""
    return math.inf if mean >= 700 else math.exp(mean)
