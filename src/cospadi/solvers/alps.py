"""ALPS (Meng, Behdin, Wang and Mazumder, NeurIPS 2024): ADMM finds the support, conjugate gradients the values.

The problem of a layer, min ||X (W - S)||^2 with n nonzeros in S, in inputs scaled so that the damped Gram H has a unit
diagonal. ADMM goes back and forth between B, the best dense matrix near S, and S, the n largest entries of B + V / rho:

    B = W + (H + rho I)^-1 (rho (S - W) - V),  S = largest(B + V / rho),  V = V + rho (B - S)

and rho grows with the number of entries that change places, until none does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cospadi.solvers.flops import Flops, cholesky, eigh
from cospadi.solvers.gram import damped, gram_error, gram_error_flops, live_inputs
from cospadi.solvers.magnitude import magnitude
from cospadi.solvers.problem import Factorization, MetricProblem, SolverOptions
from cospadi.solvers.products import self_product, self_product_flops
from cospadi.solvers.support import (
    BLOCK_ENTRIES,
    even_portions,
    fill_support,
    keep_largest_entries,
    member_spans,
    row_blocks,
)

RHO = 0.1
RHO_RANGE = (1e-6, 1e6)
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""rho grows by the factor beside the first of these fractions of n that more entries than it have changed places."""
FALL = 5.0
"""rho is divided by this, until a change of places beyond 0.5 % of n has shown that it is not too small to matter."""
CHECK = 3
"""Iterations between two looks at the support."""
SETTLED = 0.0003
LATE = 30
"""From this iteration on, the support is done when less than the fraction SETTLED of n changes places."""
CG_ITERATIONS = 10

TINY = torch.finfo(torch.float32).tiny


def alps(problem: MetricProblem, nonzeros: int, options: SolverOptions) -> Factorization:
    """min ||X (W - S)||_F, with a damping of 1 % of G's mean diagonal, over S with the given number of nonzeros.

    As published, every projection of a group has the same density; they share a rho. `options.iterations` bounds those
    of ADMM, 300 in the authors' code; most layers need fewer. Errors are those of B, which tends to S, and the last one
    that of S. Inputs that were always zero get zeros, which may be stored. `outputs` is not used. Without G the largest
    entries are the solution.
    Computed in float32 from the eigenvectors of H in float64. Memory: five matrices of the size of G in float64, four
    of the size of W.

    Raises:
        UserError: G has values that are not finite.
    """
    if problem.gram is None:
        return magnitude(problem, nonzeros, options)
    d1 = len(problem.weight)
    hessian = damped(problem.gram)
    scale = hessian.diagonal().sqrt()
    hessian = hessian / scale / scale[:, None]
    values, vectors = torch.linalg.eigh(hessian)
    values, hessian, scale = values.clamp(min=0), hessian.float(), scale.float()
    scaled = problem.weight.float() * (scale * live_inputs(problem.gram))[:, None]
    target = scaled.T.contiguous()  # an output in a row
    energy = sum(_energy(target[block], target[block] @ hessian) for block in _blocks(target))
    spans, portions = member_spans(problem.members), even_portions(nonzeros, problem.members, d1)

    def keep(matrix: Tensor) -> None:
        for member, portion in zip(spans, portions, strict=True):
            keep_largest_entries(matrix, portion, _blocks(matrix, member))

    codes, dual = target.clone(), torch.zeros_like(target)
    keep(codes)
    kept = codes != 0
    rho, inverse, moved = RHO, None, False
    errors: list[float] = []
    for iteration in range(1, (options.iterations if nonzeros < target.numel() else 0) + 1):
        if inverse is None:
            inverse = self_product((vectors * (values + rho).rsqrt()).T.float().contiguous())
        missed = 0.0
        for block in _blocks(target):
            pull = (codes[block] - target[block]).mul_(rho).sub_(dual[block])
            step = pull @ inverse  # B - W
            missed += _energy(step, pull - rho * step)  # H step = pull - rho step
            dual[block] = dual[block].div_(rho).add_(step).add_(target[block])
        codes.copy_(dual)
        keep(codes)
        dual.sub_(codes).mul_(rho)
        errors.append((max(0.0, missed) / max(energy, TINY)) ** 0.5)
        if options.on_iteration:
            options.on_iteration(iteration, errors[-1])
        if iteration % CHECK:
            continue
        changed = int((kept != (codes != 0)).sum())
        kept = codes != 0
        moved = moved or changed > GROWTH[1][0] * nonzeros
        if (moved and not changed) or (iteration > LATE and changed < SETTLED * nonzeros):
            break
        if moved:
            rho *= next(factor for fraction, factor in GROWTH if changed > fraction * nonzeros)
        else:
            rho /= FALL
            if changed:
                codes.copy_(target)
                keep(codes)
                dual.zero_()
        rho, inverse = min(max(rho, RHO_RANGE[0]), RHO_RANGE[1]), None
    support = codes != 0
    for block in _blocks(target):
        _solve_on_support(codes[block], target[block], support[block], hessian)
    for member, portion in zip(spans, portions, strict=True):
        fill_support(support[member], portion)
    coefficients = (codes.T / scale[:, None]).contiguous()
    errors.append(gram_error(problem, coefficients))
    return Factorization(None, coefficients, support.T.contiguous(), errors)


def flops(d1: int, d2: int, nonzeros: int, options: SolverOptions) -> Flops:
    """Of `alps` with all of its iterations, and a new rho as often as it can be."""
    inverses = 1 + (options.iterations - 1) // CHECK
    products = 2.0 * d1**2 * d2 * (1 + options.iterations + 1 + CG_ITERATIONS)
    products += inverses * self_product_flops(d1, d1) + gram_error_flops(d1, d2)
    return Flops(products, eigh(d1) + cholesky(d1))


def _solve_on_support(codes: Tensor, target: Tensor, support: Tensor, hessian: Tensor) -> None:
    """Conjugate gradients towards H S = H W on the support, in place; the unit diagonal of H is its preconditioner.

    Args:
        codes: S^T (rows, d1), zero outside the support. target: W^T (rows, d1). support: bool (rows, d1).
    """
    residual = ((target - codes) @ hessian).mul_(support)
    direction = residual.clone()
    squared = torch.linalg.vecdot(residual, residual)
    for _ in range(CG_ITERATIONS):
        image = (direction @ hessian).mul_(support)
        step = squared / torch.linalg.vecdot(direction, image).clamp(min=TINY)
        codes.addcmul_(direction, step[:, None])
        residual.addcmul_(image, step[:, None], value=-1)
        before, squared = squared, torch.linalg.vecdot(residual, residual)
        direction.mul_((squared / before.clamp(min=TINY))[:, None]).add_(residual)


def _blocks(rows: Tensor, span: slice | None = None) -> list[slice]:
    """All rows of a matrix, or those of a span, in pieces."""
    return row_blocks(span or slice(0, len(rows)), max(1, BLOCK_ENTRIES // rows.shape[1]))


def _energy(rows: Tensor, images: Tensor) -> float:
    """<M, N>, summed in float64."""
    return float(torch.linalg.vecdot(rows, images).sum(dtype=torch.float64))
