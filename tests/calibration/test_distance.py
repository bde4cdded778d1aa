"""The divergence of predictions of which the likeliest are kept, against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cospadi.calibration.distance import divergence, likeliest, the_text_itself


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(2 * torch.randn(3, 9, 50, generator=generator) for _ in range(2))  # type: ignore[return-value]


def exact(ours: Tensor, theirs: Tensor) -> Tensor:
    p, q = (part[:, :-1].double().log_softmax(-1) for part in (theirs, ours))
    return functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)


def test_with_all_tokens_it_is_the_divergence(logits: tuple[Tensor, Tensor]) -> None:
    ours, theirs = logits
    found = divergence(ours, likeliest(theirs, 100))
    assert found.shape == (3, 8)
    torch.testing.assert_close(found.double(), exact(ours, theirs), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("top", [1, 8, 49])
def test_with_some_it_is_that_of_these_and_the_rest(top: int, logits: tuple[Tensor, Tensor]) -> None:
    ours, theirs = logits
    kept = likeliest(theirs, top)
    p, q = (part[:, :-1].double().softmax(-1) for part in (theirs, ours))
    order = p.argsort(-1, descending=True)
    p, q = (
        torch.cat([one.gather(-1, order)[..., :top], one.gather(-1, order)[..., top:].sum(-1, keepdim=True)], -1)
        for one in (p, q)
    )
    wanted = functional.kl_div(q.log(), p, reduction="none").sum(-1)
    found = divergence(ours, kept)
    torch.testing.assert_close(found.double(), wanted, rtol=5e-3, atol=2e-3)
    assert (found <= exact(ours, theirs) + 5e-3).all()
    assert (divergence(theirs, kept).abs() < 2e-3).all()


def test_its_gradient_is_the_divergences(logits: tuple[Tensor, Tensor]) -> None:
    ours, theirs = logits
    gradients = []
    for found in (lambda one: divergence(one, likeliest(theirs, 50)), lambda one: exact(one, theirs)):
        leaf = ours.clone().requires_grad_()
        found(leaf).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-2, atol=1e-3)


def test_of_the_text_itself_it_is_the_loss(logits: tuple[Tensor, Tensor]) -> None:
    ours, _ = logits
    tokens = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    wanted = functional.cross_entropy(ours[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert float(divergence(ours, the_text_itself(tokens)).mean()) == pytest.approx(float(wanted), rel=1e-5)
