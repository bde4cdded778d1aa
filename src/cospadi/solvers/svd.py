"""Truncated SVD: the best rank-k approximation of A. Whitened, it is SVD-LLM (Wang et al., ICLR 2025)."""

from __future__ import annotations

import torch

from cospadi.solvers.flops import Flops
from cospadi.solvers.flops import svd as svd_flops
from cospadi.solvers.problem import Factorization, Problem, SolverOptions, relative_error


def truncated_svd(problem: Problem, k: int, s: int, options: SolverOptions) -> Factorization:
    """Keep the k largest singular triplets: D = U_k, S = Sigma_k V_k^T (dense; `s` is not used).

    Computed in float64, since one call solves the problem exactly. k may exceed min(d1, d2): the surplus is zero.
    """
    target = problem.target.double()
    left, singular, right = torch.linalg.svd(target, full_matrices=False)
    rank = min(k, singular.numel())
    dictionary = torch.zeros(target.shape[0], k, dtype=target.dtype, device=target.device)
    coefficients = torch.zeros(k, target.shape[1], dtype=target.dtype, device=target.device)
    dictionary[:, :rank] = left[:, :rank]
    coefficients[:rank] = singular[:rank, None] * right[:rank]
    error = relative_error(target, dictionary @ coefficients)
    if options.on_iteration:
        options.on_iteration(1, error)
    dtype = problem.target.dtype
    return Factorization(dictionary.to(dtype), coefficients.to(dtype), errors=[error])


def flops(d1: int, d2: int, k: int, s: float, options: SolverOptions) -> Flops:
    """Of `truncated_svd`: the decomposition, and D S for its error."""
    return Flops(2.0 * d1 * k * d2, svd_flops(d1, d2))
