"""Batched orthogonal matching pursuit: exactly s atoms a column, all columns of a batch one atom at a time together.

Pati, Rezaiifar, Krishnaprasad (1993); in Gram form after Rubinstein, Zibulevsky, Elad (2008). Instead of a Cholesky
factor each column keeps the orthonormalised chosen atoms q_1 .. q_i in two forms: T, whose row m holds q_m in terms
of the chosen atoms, and P, whose row m holds D^T q_m. A step is then a look-up in P, one batched matrix-vector product
with T and one dense matrix product with the Gram, and no triangular solve.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cospadi.solvers.flops import Flops

MAX_BATCH = 8192
"""Columns coded together at most (the paper's batch)."""


def omp(gram: Tensor, correlations: Tensor, s: int, memory_bytes: int = 256 * 2**20) -> tuple[Tensor, Tensor]:
    """Sparse codes of many columns over one dictionary.

    Args:
        gram: D^T D, float (k, k).
        correlations: D^T A, float (k, d2).
        s: atoms a column, 1 <= s <= k.
        memory_bytes: working memory a batch may take; beyond rounding the result does not depend on it.

    Returns:
        support: int64 (d2, s), the chosen atoms in the order of choice, s different ones in each row.
        coefficients: float (d2, s), least squares on that support. Where the remaining atoms depend linearly on the
            chosen ones, or the residual is zero, the support is filled up with coefficients 0.
    """
    k, d2 = correlations.shape
    column_bytes = gram.element_size() * (s * s + s * k + 8 * k)
    batch = max(1, min(MAX_BATCH, memory_bytes // column_bytes))
    support = torch.empty(d2, s, dtype=torch.int64, device=gram.device)
    coefficients = torch.empty(d2, s, dtype=gram.dtype, device=gram.device)
    for start in range(0, d2, batch):
        rows = slice(start, start + batch)
        support[rows], coefficients[rows] = _omp_batch(gram, correlations[:, rows].T.contiguous(), s)
    return support, coefficients


def omp_flops(d2: int, k: int, s: int) -> Flops:
    """Of `omp`: a column's product with the Gram and one with T an atom, and once more of each to refine."""
    return Flops(2.0 * (s + 1) * k**2 * d2 + 2.0 / 3.0 * s**3 * d2 + 6.0 * s**2 * d2)


def scatter_codes(support: Tensor, coefficients: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Codes as (d2, s) indices and values -> S (k, d2) and its boolean support (k, d2)."""
    d2 = support.shape[0]
    dense = torch.zeros(d2, k, dtype=coefficients.dtype, device=coefficients.device).scatter_(1, support, coefficients)
    mask = torch.zeros(d2, k, dtype=torch.bool, device=support.device).scatter_(1, support, True)
    return dense.T.contiguous(), mask.T.contiguous()


def _omp_batch(gram: Tensor, target: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """One batch; `target` is (D^T A)^T, float (n, k)."""
    n, k = target.shape
    diagonal = gram.diagonal()
    # An atom whose part outside the chosen span is below this depends on them, as far as rounding can tell.
    dependent = 16 * torch.finfo(gram.dtype).eps
    rows = torch.arange(n, device=gram.device)
    support = torch.zeros(n, s, dtype=torch.int64, device=gram.device)
    basis = torch.zeros(n, s, s, dtype=gram.dtype, device=gram.device)  # T
    spread = torch.empty(n, s, k, dtype=gram.dtype, device=gram.device)  # P
    projections = torch.zeros(n, s, dtype=gram.dtype, device=gram.device)  # of the column on the orthonormal atoms
    correlation = target.clone()  # of every atom with the residual
    weights = torch.zeros(n, k, dtype=gram.dtype, device=gram.device)
    product = torch.empty(n, k, dtype=gram.dtype, device=gram.device)
    chosen = torch.zeros(n, k, dtype=torch.bool, device=gram.device)

    for i in range(s):
        atom = correlation.abs().masked_fill_(chosen, -1.0).argmax(1)
        support[:, i] = atom
        chosen[rows, atom] = True
        inner = spread[:, :i].gather(2, atom[:, None, None].expand(n, i, 1)).squeeze(2)  # of the new atom with each q
        outside = diagonal[atom] - inner.square().sum(1)  # squared norm of what is new in the atom
        usable = outside > dependent * diagonal[atom]
        scale = torch.where(usable, outside, torch.inf).rsqrt()
        basis[:, i, :i] = _times_lower(inner, basis) * -scale[:, None]
        basis[:, i, i] = scale
        weights.scatter_(1, support[:, : i + 1], basis[:, i, : i + 1])
        torch.mm(weights, gram, out=product)
        spread[:, i] = product
        projections[:, i] = correlation[rows, atom] * scale
        correlation.addcmul_(product, projections[:, i, None], value=-1)

    coefficients = (projections.unsqueeze(1) @ basis).squeeze(1)
    # One step of iterative refinement with T^T T, the inverse Gram of the support.
    weights.scatter_(1, support, coefficients)
    residual = (target - weights @ gram).gather(1, support)
    coefficients += (basis.mT @ (basis @ residual.unsqueeze(2))).squeeze(2)
    return support, coefficients


def _times_lower(rows: Tensor, lower: Tensor) -> Tensor:
    """v^T T for the leading i x i part of lower triangular T: rows (n, i), lower (n, s, s) -> (n, i), zeros skipped."""
    i, block = rows.shape[1], max(16, lower.shape[1] // 8)
    result = torch.zeros_like(rows)
    for start in range(0, i, block):
        end = min(start + block, i)
        result[:, :end] += (rows[:, None, start:end] @ lower[:, start:end, :end]).squeeze(1)
    return result
