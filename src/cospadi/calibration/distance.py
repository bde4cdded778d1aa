"""How far a model's predictions are from those of another, of which the likeliest tokens are kept.

Of the other's next-token distribution p its `top` likeliest tokens are known, and the probability of all others
together. The divergence of q from it is that of the two distributions over these tokens and "any other",

    sum over the tokens of p_i ln(p_i / q_i) + p_rest ln(p_rest / q_rest),

which is at most KL(p || q), and is that where all tokens are kept. It is 0 for equal predictions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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
    """Of logits (..., length, vocabulary)."""
    logs = logits[..., :-1, :].float().log_softmax(-1)
    found, tokens = logs.topk(min(top, logits.shape[-1]), dim=-1)
    return Predictions(tokens.to(torch.int32), found.to(torch.float16))


def the_text_itself(tokens: Tensor) -> Predictions:
    """Of tokens (..., length): each is certain, so that the divergence is the loss on the text."""
    following = tokens[..., 1:, None].to(torch.int32)
    return Predictions(following, torch.zeros(following.shape, dtype=torch.float16))


def divergence(logits: Tensor, kept: Predictions) -> Tensor:
    """In nats, (..., length - 1), of each prediction of logits (..., length, vocabulary)."""
    logits = logits[..., :-1, :].float()
    theirs = kept.logs.float()
    ours = logits.gather(-1, kept.tokens.long()) - logits.logsumexp(-1, keepdim=True)
    p, q = theirs.exp(), ours.exp()
    found = (p * (theirs - ours)).sum(-1)
    if p.shape[-1] == logits.shape[-1]:
        return found
    rest = (1 - p.sum(-1)).clamp(min=0)
    left = (1 - q.sum(-1)).clamp(min=LEAST)
    others: Tensor = torch.special.xlogy(rest, rest) - rest * left.log()
    return found + others
