"""Orthonormal dictionaries by Procrustes updates: the factorization of COMPOT (arXiv 2602.15200).

With orthonormal atoms both halves of an alternation have closed forms: the best s coefficients of a column are the s
largest of D^T a, and the best dictionary for given codes is the orthonormal matrix nearest to A S^T. So the error
cannot rise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cospadi.solvers.flops import Flops, svd
from cospadi.solvers.orthogonal import directions_flops, keep_largest, leading_directions
from cospadi.solvers.problem import Factorization, Problem, SolverOptions, relative_error


def procrustes(problem: Problem, k: int, s: int, options: SolverOptions) -> Factorization:
    """Alternate dictionary update and sparse coding (exactly s atoms a column), and return the best pair seen.

    Starts from the k leading left singular vectors of A, coded once. The method is meant for k <= d1; atoms beyond the
    first d1 are zero, and no column uses them unless s > d1.
    """
    target = problem.target
    dictionary = leading_directions(problem.target, k)
    coefficients, support = code(target, dictionary, s)
    best: Factorization | None = None
    errors: list[float] = []
    for iteration in range(1, options.iterations + 1):
        dictionary = update_orthonormal(target, coefficients)
        coefficients, support = code(target, dictionary, s)
        error = relative_error(target, dictionary @ coefficients)
        if best is None or error < min(errors):
            best = Factorization(dictionary, coefficients, support)
        errors.append(error)
        if options.on_iteration:
            options.on_iteration(iteration, error)
        if error == 0.0 or (iteration > 1 and options.tolerance > 0 and error > (1 - options.tolerance) * errors[-2]):
            break
    assert best is not None
    return Factorization(best.dictionary, best.coefficients, best.support, errors)


def code(target: Tensor, dictionary: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """The best codes over orthonormal (or zero) atoms: the s largest of D^T a for each column a of A.

    Returns:
        S (k, d2) and its boolean support (k, d2), exactly s a column.
    """
    correlations = dictionary.T @ target
    support = keep_largest(correlations.abs(), s)
    return correlations * support, support


def update_orthonormal(target: Tensor, coefficients: Tensor) -> Tensor:
    """The orthogonal Procrustes problem (Schoenemann 1966): min ||A - D S||_F over D^T D = I, for k <= d1.

    The minimiser is D = U V^T of the thin SVD U Sigma V^T of A S^T (d1, k), in float64. Of k > d1 atoms the first d1
    are updated and the others, which carry no coefficients, are zero.
    """
    d1, atoms = target.shape[0], min(coefficients.shape[0], target.shape[0])
    left, _, right = torch.linalg.svd(target.double() @ coefficients[:atoms].double().T, full_matrices=False)
    dictionary = torch.zeros(d1, coefficients.shape[0], dtype=target.dtype, device=target.device)
    dictionary[:, :atoms] = (left @ right).to(target)
    return dictionary


def flops(d1: int, d2: int, k: int, s: float, options: SolverOptions) -> Flops:
    """Of `procrustes`: D^T A; then in each iteration A S^T, its SVD and U V^T of k' = min(k, d1) atoms, D^T A, D S."""
    atoms = min(k, d1)
    iteration = Flops(2.0 * d1 * atoms * d2 + 2.0 * d1 * atoms**2 + 4.0 * d1 * k * d2, svd(d1, atoms))
    return directions_flops(d1, d2, k) + Flops(2.0 * d1 * k * d2) + iteration * options.iterations
