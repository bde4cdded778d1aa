"""Next-token loss of a causal language model, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LOGITS = 2**24
"""Logits that are in float32 at a time, at most, and at least half as many of a longer row: a batch of all takes
gigabytes where the vocabulary is large, and pieces of less than 32 MB leave holes in glibc's heap, gigabytes as well."""


def total_loss(logits: Tensor, tokens: Tensor) -> float:
    """Negative log-likelihood of every token but the first of each row, in nats, all added up.

    Log-softmax is taken in float32; losses are summed in float64.

    Args:
        logits: (rows, length, vocabulary), any float dtype. tokens: int64 (rows, length), on the same device.
    """
    losses = [
        nn.functional.cross_entropy(predicted.float(), following, reduction="none")
        for predicted, following in _some_at_a_time(logits, tokens)
    ]
    return float(torch.cat(losses).double().sum())


def _some_at_a_time(logits: Tensor, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (n, vocabulary) and the tokens that follow, (n,), of each row a few after another."""
    parts = max(1, -(-logits[0, :-1].numel() // LOGITS))
    for row, following in zip(logits[:, :-1], tokens[:, 1:], strict=True):
        yield from zip(row.tensor_split(parts), following.tensor_split(parts), strict=True)


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


@dataclass(frozen=True)
class ByToken:
    """Two models of one vocabulary on the same windows, token by token; the first token of a window is predicted by
    nobody.

    Attributes:
        windows: int64 (windows, length).
        losses: float32 (2, windows, length - 1), negative log-likelihoods in nats: the model's, the reference's.
        divergences: float32 (windows, length - 1), KL(q || p) in nats, q the next-token distribution of the reference
            and p that of the model.
        likeliest: int64 (2, windows, length - 1), the token that each of them takes for the likeliest.
    """

    windows: Tensor
    losses: Tensor
    divergences: Tensor
    likeliest: Tensor

    @property
    def means(self) -> tuple[float, float, float]:
        """`mean_loss` of the model and of the reference, and the mean divergence."""
        ours, theirs, divergence = (
            float(one.double().sum()) / predicted_tokens(self.windows) for one in (*self.losses, self.divergences)
        )
        return ours, theirs, divergence

    @property
    def differences(self) -> Tensor:
        """What each token costs the model more than the reference, float64 (windows, length - 1), in nats; nothing
        where neither gives it any chance."""
        ours, theirs = self.losses.double()
        return torch.nan_to_num(ours - theirs, 0.0, 1e3, -1e3)


@torch.inference_mode()
def compared(
    model: nn.Module,
    reference: nn.Module,
    windows: Tensor,
    batch_size: int = 4,
    on_batch: Callable[[int], None] | None = None,
) -> ByToken:
    """Two models of one vocabulary on the same windows, int64 (windows, length); logits in the models' dtypes,
    log-softmax in float32.

    Args:
        on_batch: called with the number of windows just done.
    """
    device = next(model.parameters()).device
    shape = (len(windows), windows.shape[1] - 1)
    losses, divergences, likeliest = [], [], []
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size].to(device)
        found = [one(input_ids=batch, use_cache=False).logits for one in (model, reference)]
        for (ours, tokens), (theirs, _) in zip(*(_some_at_a_time(logits, batch) for logits in found), strict=True):
            p, q = (logits.float().log_softmax(-1) for logits in (ours, theirs))
            losses.append(torch.stack([-one.gather(-1, tokens[:, None])[:, 0] for one in (p, q)]).cpu())
            divergences.append((q.exp() * (q - p)).sum(-1).cpu())
            likeliest.append(torch.stack([one.argmax(-1) for one in (p, q)]).cpu())
        if on_batch:
            on_batch(len(batch))
    return ByToken(
        windows,
        torch.cat(losses, 1).view(2, *shape),
        torch.cat(divergences).view(shape),
        torch.cat(likeliest, 1).view(2, *shape),
    )


def predicted_tokens(windows: Tensor) -> int:
    """Tokens of all windows, (windows, length), but the first of each."""
    count, length = windows.shape
    return count * (length - 1)


def perplexity_of(mean: float) -> float:
    """exp of a mean loss in nats; infinite where that is beyond a float."""
    return math.inf if mean >= 700 else math.exp(mean)
