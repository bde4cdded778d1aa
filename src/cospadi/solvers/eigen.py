"""Dictionary of eigenvectors, coded once and refitted once: the factorization of ROCKET (arXiv 2602.11008)."""

from __future__ import annotations

import torch

from cospadi.solvers.flops import Flops, triangular
from cospadi.solvers.least_squares import refit_dictionary, refit_flops
from cospadi.solvers.orthogonal import directions_flops, keep_largest, leading_directions
from cospadi.solvers.problem import Factorization, Problem, SolverOptions, relative_error


def eigen(problem: Problem, k: int, s: int, options: SolverOptions) -> Factorization:
    """Code A over the k leading eigenvectors u_i of A A^T, then refit the dictionary by least squares. No iterations.

    A column keeps the s coefficients c_i = u_i^T a with the largest sqrt(|c_i| * |c_i| ||L^-1 u_i||), the geometric
    mean of what they weigh in the whitened metric and in the weights. Atoms beyond the first d1 are zero, and no
    column uses them unless s > d1.

    Where this differs from the authors' code: every column keeps exactly s (theirs gives 0.5 % of all coefficients to
    the largest |c_i| ||L^-1 u_i|| of any column), and the refit has no ridge and always stands.
    """
    target = problem.target
    dictionary = leading_directions(problem.target, k)
    coefficients = dictionary.T @ target
    scores = coefficients.abs()
    if problem.unwhiten:
        size = torch.linalg.vector_norm(problem.unwhiten(dictionary), dim=0).sqrt()  # scale-free: only ranks matter
        scores = scores * (size / size.max()).to(scores)[:, None]
    support = keep_largest(scores, s)
    dictionary, coefficients = refit_dictionary(target, dictionary, coefficients * support)
    error = relative_error(target, dictionary @ coefficients)
    if options.on_iteration:
        options.on_iteration(1, error)
    return Factorization(dictionary, coefficients, support, [error])


def flops(d1: int, d2: int, k: int, s: float, options: SolverOptions) -> Flops:
    """Of `eigen`: the eigenvectors, L^-1 of them, D^T A, the refit, D S."""
    solved = Flops(4.0 * d1 * k * d2, triangular(d1, k)) + refit_flops(d1, d2, k)
    return directions_flops(d1, d2, k) + solved
