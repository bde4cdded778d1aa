"""The best dictionary for given codes."""

from __future__ import annotations

import torch
from torch import Tensor

from cospadi.solvers.flops import Flops, eigh


def refit_dictionary(target: Tensor, dictionary: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """min ||A - D S||_F over D: D = A S^T (S S^T)^-1 (Engan, Aase, Husoy 1999), then unit atoms, S scaled to match.

    Solved in float64 by the pseudo-inverse of S S^T, which is singular where atoms are unused or tied; an unused atom
    stays as it was.

    Args:
        target: A (d1, d2). dictionary: D (d1, k). coefficients: S (k, d2).
    """
    codes = coefficients.double()
    updated = target.double() @ codes.T @ torch.linalg.pinv(codes @ codes.T, hermitian=True)
    norms = torch.linalg.vector_norm(updated, dim=0) * (codes != 0).any(1)
    dictionary = torch.where(norms > 0, updated / norms.clamp(min=torch.finfo(norms.dtype).tiny), dictionary.double())
    return dictionary.to(target), (codes * norms[:, None]).to(target)


def refit_flops(d1: int, d2: int, k: int) -> Flops:
    """Of `refit_dictionary`: A S^T, S S^T, its pseudo-inverse, and their product."""
    return Flops(2.0 * d1 * k * d2 + 2.0 * k**2 * d2 + 2.0 * d1 * k**2, eigh(k) + 2.0 * k**3)
