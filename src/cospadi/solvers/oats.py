"""OATS (Zhang and Papyan, ICLR 2025): W near a sparse plus a low-rank matrix, by alternating thresholding.

Inputs are scaled by the roots of their second moments: A = diag(G)^1/2 W. In turn, the best matrix of rank r is taken
of what the sparse one leaves of A, and the largest entries of each output of what the low-rank one leaves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cospadi.errors import UserError
from cospadi.solvers.flops import Flops
from cospadi.solvers.gram import gram_error, gram_error_flops
from cospadi.solvers.orthogonal import directions_flops, leading_directions
from cospadi.solvers.problem import MetricProblem, SolverOptions
from cospadi.solvers.support import largest_of_each, member_spans

RANK_RATIO = 0.25
"""Of the bytes that remain after the mask, those of the low-rank part: the paper's share of the parameters."""
VALUE_BITS = 14
FACTOR_BYTES = 2


@dataclass(frozen=True)
class SparseLowRank:
    """W near S + L; each member's L has factors of its own.

    Attributes:
        coefficients: S, float32 (d1, d2), zero outside the support; not rounded to 14 bits.
        support: bool (d1, d2), the entries of S that are stored.
        factors: of each member, bf16 (d1, r) and (r, d2) of the member; their product is its L.
        nbytes: a mask of a bit an entry, 14 bits a stored entry and 2 bytes an entry of the factors, each of these
            rounded up to whole bytes for each member.
        errors: ||diag(G)^1/2 (W - S - L)|| in that of W after each iteration, before L is rounded; then
            ||X (W - S - L)|| in ||X W||.
    """

    coefficients: Tensor
    support: Tensor
    factors: tuple[tuple[Tensor, Tensor], ...]
    nbytes: int
    errors: list[float]

    @property
    def low_rank(self) -> Tensor:
        """L, float32 (d1, d2)."""
        return torch.cat([left.float() @ right.float() for left, right in self.factors], dim=1)

    @property
    def weight(self) -> Tensor:
        """S + L, float32 (d1, d2)."""
        return self.coefficients + self.low_rank

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of each member's L."""
        return tuple(len(right) for _, right in self.factors)


def oats(problem: MetricProblem, nbytes: int, options: SolverOptions) -> SparseLowRank:
    """Fill a number of bytes, shared between members by their sizes, with S and L.

    `options.iterations` alternations; the paper has 80. Each output of a projection has the same number of entries in
    S, but for a remainder: the outputs whose next entry is largest have one more. Inputs that were always zero get
    zeros. `outputs` is not used; without G, G = I. Computed in float32, leading directions in float64. Memory: six
    matrices of the size of W, and three of a projection in float64.

    Raises:
        UserError: the bytes are fewer than those of the mask.
    """
    weight = problem.weight.float()
    d1, total = len(weight), sum(problem.members)
    moments = torch.ones(d1).to(weight) if problem.gram is None else problem.gram.diagonal().float()
    roots = moments.clamp(min=0).sqrt()[:, None]
    inverse = torch.where(roots > 0, 1 / roots, 0)
    target = weight * roots
    sparse = torch.zeros_like(target)
    support = torch.zeros_like(target, dtype=torch.bool)
    spans = member_spans(problem.members)
    fits = [sizes(d1, width, nbytes * width // total) for width in problem.members]
    energy = float(torch.linalg.vector_norm(target, dtype=torch.float64)) ** 2
    errors: list[float] = []
    factors: list[tuple[Tensor, Tensor]] = []
    for iteration in range(1, options.iterations + 1):
        missed, factors = 0.0, []
        for member, (nonzeros, rank) in zip(spans, fits, strict=True):
            left, right = _leading_factors(target[:, member] - sparse[:, member], rank)
            rest = target[:, member] - left @ right
            support[:, member] = largest_of_each(rest.abs(), nonzeros)
            sparse[:, member] = rest * support[:, member]
            missed += float(torch.linalg.vector_norm(rest - sparse[:, member], dtype=torch.float64)) ** 2
            factors.append(((left * inverse).bfloat16(), right.bfloat16()))
        errors.append(math.sqrt(missed / energy if energy > 0 else missed))
        if options.on_iteration:
            options.on_iteration(iteration, errors[-1])
    used = sum(counted_bytes(d1, width, *fit) for width, fit in zip(problem.members, fits, strict=True))
    solution = SparseLowRank(sparse * inverse, support, tuple(factors), used, errors)
    errors.append(gram_error(problem, solution.weight))
    return solution


def sizes(d1: int, d2: int, nbytes: int) -> tuple[int, int]:
    """Nonzeros of S and the rank of L that fill some bytes, for one projection (d1, d2).

    Raises:
        UserError: the bytes are fewer than those of the mask.
    """
    rest = nbytes - _mask_bytes(d1, d2)
    if rest < 0:
        raise UserError(f"{nbytes} bytes do not hold the mask of a {d1} x {d2} matrix. Give at least {nbytes - rest}")
    of_rank = FACTOR_BYTES * (d1 + d2)
    rank = min(int(RANK_RATIO * rest / of_rank), d1, d2)
    return min(d1 * d2, (rest - rank * of_rank) * 8 // VALUE_BITS), rank


def counted_bytes(d1: int, d2: int, nonzeros: int, rank: int) -> int:
    """What S and L of one projection take."""
    return _mask_bytes(d1, d2) + -(-nonzeros * VALUE_BITS // 8) + FACTOR_BYTES * rank * (d1 + d2)


def flops(d1: int, d2: int, nbytes: int, options: SolverOptions) -> Flops:
    """Of `oats` for one projection: leading directions and two products of rank r an iteration."""
    rank = sizes(d1, d2, nbytes)[1]
    small, large = min(d1, d2), max(d1, d2)
    iteration = directions_flops(small, large, rank) + Flops(4.0 * d1 * d2 * rank)
    return iteration * options.iterations + Flops(2.0 * d1 * d2 * rank + gram_error_flops(d1, d2))


def _leading_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a rank: (d1, rank) and (rank, d2), one of them orthonormal."""
    if matrix.shape[0] <= matrix.shape[1]:
        left = leading_directions(matrix, rank)
        return left, left.T @ matrix
    right = leading_directions(matrix.T, rank)
    return matrix @ right, right.T


def _mask_bytes(d1: int, d2: int) -> int:
    return -(-d1 * d2 // 8)
