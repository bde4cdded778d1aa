"""How far a model's predictions are from those of another, of which the likeliest tokens are kept.

Of the other's next-token distribution p its `top` likeliest tokens are known, and the probability of all others
together. The divergence of q from it is that of the two distributions over these tokens and "any other",

    sum over the tokens of p_i ln(p_i / q_i) + p_rest ln(p_rest / q_rest),

which is at most KL(p || q), and is that where all tokens are kept. It is 0 for equal predictions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cospadi.calibration.loss import pieces

LEAST = 1e-9
"""Least probability of all other tokens, so that its logarithm is a number."""


class Predictions(NamedTuple):
    """What is kept of the predictions for every token but the first.

    Attributes:
        tokens: int32 (..., length - 1, top), the likeliest next tokens.
        logs: float16, ln of their probabilities.
    """

    tokens: Tensor
    logs: Tensor


def likeliest(logits: Tensor, top: int) -> Predictions:
    """Of logits (rows, length, vocabulary)."""
    rows, length, vocabulary = logits.shape
    shape = (rows, length - 1, min(top, vocabulary))
    tokens, logs = logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=torch.float16)
    for place in pieces(logits):
        part = logits[place].float()
        found, tokens[place] = part.topk(shape[-1], dim=-1)
        logs[place] = found - part.logsumexp(-1, keepdim=True)
    return Predictions(tokens, logs)


def the_text_itself(tokens: Tensor) -> Predictions:
    """Of tokens (..., length): each is certain, so that the divergence is the loss on the text."""
    following = tokens[..., 1:, None].to(torch.int32)
    return Predictions(following, torch.zeros(following.shape, dtype=torch.float16))


def divergence(logits: Tensor, kept: Predictions) -> Tensor:
    """In nats, float32 (rows, length - 1), of each prediction of logits (rows, length, vocabulary)."""
    found: Tensor = _Divergence.apply(logits, *kept)  # type: ignore[no-untyped-call]
    return found


class _Divergence(torch.autograd.Function):
    """With the gradient written down, so that nothing in float32 is as large as the logits: of softmax q and with Q the
    sum of the kept q_i, and P of their p_i,

        d / d logit_j = q_j (P - p_rest Q / (1 - Q)) + (p_rest q_j / (1 - Q) - p_j, if j is one of the kept).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, logs: Tensor) -> Tensor:
        found = logits.new_empty(tokens.shape[:-1], dtype=torch.float32)
        total = torch.empty_like(found)
        for place in pieces(logits):
            part = logits[place].float()
            total[place] = part.logsumexp(-1)
            theirs = logs[place].float()
            ours = part.gather(-1, tokens[place].long()) - total[place][:, None]
            found[place] = (theirs.exp() * (theirs - ours)).sum(-1)
            rest, left = _others(theirs, ours, logits.shape[-1])
            found[place] += torch.special.xlogy(rest, rest) - rest * left.log()
        ctx.save_for_backward(logits, tokens, logs, total)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, tokens, logs, total = ctx.saved_tensors
        gradient = torch.zeros_like(logits)
        for place in pieces(logits):
            part = logits[place].float().sub_(total[place][:, None])
            kept, theirs = tokens[place].long(), logs[place].float()
            ours = part.gather(-1, kept)
            p, q = theirs.exp(), ours.exp()
            rest, left = _others(theirs, ours, logits.shape[-1])
            ratio = torch.where(left > LEAST, rest / left, 0.0)
            part.exp_().mul_((grad[place] * (p.sum(-1) - ratio * q.sum(-1)))[:, None])
            part.scatter_add_(-1, kept, grad[place][:, None] * (ratio[:, None] * q - p))
            gradient[place] = part
        return gradient, None, None


def _others(theirs: Tensor, ours: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Probability of all tokens that are not kept, by the other model and by ours: 0 and 1 where there are none."""
    if theirs.shape[-1] == vocabulary:
        return torch.zeros_like(theirs[:, 0]), torch.ones_like(ours[:, 0])
    return (1 - theirs.exp().sum(-1)).clamp(min=0), (1 - ours.exp().sum(-1)).clamp(min=LEAST)
