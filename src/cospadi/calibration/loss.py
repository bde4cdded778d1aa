"""Next-token loss of a causal language model, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LOGITS = 2**24
"""Logits that are in float32 at a time, or those of one token: a batch of all takes gigabytes where the vocabulary is
large."""

CACHED = 2**20
"""The same on a CPU, in whose cache they stay."""


def total_loss(logits: Tensor, tokens: Tensor) -> float:
    """Negative log-likelihood of every token but the first of each row, in nats, all added up.

    Log-softmax is taken in float32; losses are summed in float64.

    Args:
        logits: (rows, length, vocabulary), any float dtype. tokens: int64 (rows, length), on the same device.
    """
    following = tokens[:, 1:]
    losses = logits.new_empty(following.shape, dtype=torch.float32)
    for row, some in pieces(logits):
        losses[row, some] = nn.functional.cross_entropy(
            logits[row, some].float(), following[row, some], reduction="none"
        )
    return float(losses.double().sum())


def pieces(logits: Tensor) -> Iterator[tuple[int, slice]]:
    """Rows of logits (rows, length, vocabulary) and some of their predictions at a time, all but the last of each row.

    What comes of a piece is to be written to a place that was there before: small tensors that outlive large ones
    leave holes in glibc's heap.
    """
    rows, length, vocabulary = logits.shape
    most = CACHED if logits.device.type == "cpu" else LOGITS
    parts = max(1, -(-(length - 1) * vocabulary // most))
    step = max(1, -(-(length - 1) // parts))
    for row in range(rows):
        for first in range(0, length - 1, step):
            yield row, slice(first, min(first + step, length - 1))


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
    losses, divergences = torch.empty(2, *shape), torch.empty(shape)
    likeliest = torch.empty(2, *shape, dtype=torch.int64)
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size].to(device)
        found = [one(input_ids=batch, use_cache=False).logits for one in (model, reference)]
        for row, some in pieces(found[0]):
            p, q = (logits[row, some].float().log_softmax(-1) for logits in found)
            place, following = (start + row, some), batch[row, 1:][some, None]
            divergences[place] = (q.exp() * (q - p)).sum(-1).cpu()
            for one, logs in enumerate((p, q)):
                losses[one, *place] = -logs.gather(-1, following)[:, 0].cpu()
                likeliest[one, *place] = logs.argmax(-1).cpu()
        if on_batch:
            on_batch(len(batch))
    return ByToken(windows, losses, divergences, likeliest)


def predicted_tokens(windows: Tensor) -> int:
    """Tokens of all windows, (windows, length), but the first of each."""
    count, length = windows.shape
    return count * (length - 1)


def perplexity_of(mean: float) -> float:
    """exp of a mean loss in nats; infinite where that is beyond a float."""
    return math.inf if mean >= 700 else math.exp(mean)
