"""The Gram matrix of a layer's inputs: damped so that it can be inverted, and the error that it measures."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cospadi.errors import UserError
from cospadi.solvers.problem import MetricProblem, relative_error
from cospadi.solvers.support import BLOCK_ENTRIES, row_blocks

DAMPING = 0.01
"""Added to the diagonal of G, in the mean of that diagonal: the share that SparseGPT and ALPS take."""


def live_inputs(gram: Tensor) -> Tensor:
    """Which inputs have ever been other than zero: bool (d1,)."""
    return gram.diagonal() > 0


def damped(gram: Tensor) -> Tensor:
    """G + damping I, float64 (d1, d1), positive definite. The damping starts at 1 % of the mean diagonal.

    It grows tenfold until a Cholesky factor exists, which only a Gram that rounding has made indefinite needs. Inputs
    that were always zero do not count in the mean, and get it as their diagonal.

    Raises:
        UserError: G has values that are not finite.
    """
    return _damped_with_factor(gram)[0]


def damped_factor(gram: Tensor) -> Tensor:
    """R, float64 (d1, d1), upper triangular, with R^T R the inverse of the damped G: its Cholesky factor.

    With J the reversal of all inputs and M M^T the Cholesky factors of J G J, R is the inverse of J M J.

    Raises:
        UserError: G has values that are not finite.
    """
    lower = _damped_with_factor(gram.flip(0, 1))[1]
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    factor: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return factor


def _damped_with_factor(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The damped G, and its lower Cholesky factor."""
    if not gram.isfinite().all():
        raise UserError("the Gram matrix of a layer has values that are not finite. Check the weights and the text")
    matrix, live = gram.double(), live_inputs(gram)
    diagonal = matrix.diagonal()
    mean = float(diagonal[live].mean()) if live.any() else 1.0
    diagonal = torch.where(live, diagonal, torch.full_like(diagonal, mean))
    matrix = matrix.clone()
    damping = DAMPING
    while True:
        matrix.diagonal().copy_(diagonal + damping * mean)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed.item():
            return matrix, factor
        damping *= 10


def gram_error(problem: MetricProblem, approximation: Tensor) -> float:
    """||X (W - S)||_F / ||X W||_F with X^T X = G, in the precision of float32 products; 0 for zero X W met exactly."""
    weight, gram = problem.weight, problem.gram
    if gram is None:
        return relative_error(weight, approximation)
    error = scale = 0.0
    for block in row_blocks(slice(0, weight.shape[1]), max(1, BLOCK_ENTRIES // len(weight))):
        columns = weight[:, block]
        scale += _energy(gram, columns)
        error += _energy(gram, columns - approximation[:, block])
    return math.sqrt(error / scale if scale > 0 else error)


def gram_error_flops(d1: int, d2: int) -> float:
    """Products of `gram_error`."""
    return 4.0 * d1**2 * d2


def _energy(gram: Tensor, columns: Tensor) -> float:
    """tr(E^T G E), at least 0."""
    return max(0.0, float((columns * (gram @ columns)).sum(dtype=torch.float64)))
