"""What solvers with an orthonormal dictionary share: where it starts, and which coefficients of a column stay."""

from __future__ import annotations

import torch
from torch import Tensor

from cospadi.solvers.flops import Flops, eigh, qr


def leading_directions(target: Tensor, k: int) -> Tensor:
    """The k leading left singular vectors of A (d1, d2): the leading eigenvectors of A A^T, float (d1, k).

    Computed in float64. Beyond the rank of A the basis is completed; an orthonormal basis of R^d1 has no more than d1
    vectors, so atoms beyond the first d1 are zero.
    """
    (d1, d2), matrix = target.shape, target.double()
    if k <= d2 < d1:
        basis, triangle = torch.linalg.qr(matrix)
        left = basis @ torch.linalg.eigh(triangle @ triangle.T)[1].flip(1)
    else:
        left = torch.linalg.eigh(matrix @ matrix.T)[1].flip(1)
    dictionary = torch.zeros(d1, k, dtype=target.dtype, device=target.device)
    dictionary[:, :d1] = left[:, :k].to(target)
    return dictionary


def directions_flops(d1: int, d2: int, k: int) -> Flops:
    """Of `leading_directions`."""
    if k <= d2 < d1:
        return Flops(2.0 * d2**3 + 2.0 * d1 * d2**2, qr(d1, d2) + eigh(d2))
    return Flops(2.0 * d1**2 * d2, eigh(d1))


def keep_largest(scores: Tensor, s: int) -> Tensor:
    """Support of the s largest scores in each column: (k, d2), not negative -> bool (k, d2), exactly s a column."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(0, scores.topk(s, dim=0, sorted=False).indices, True)
