"""The default solver: the dictionary is the identity, and S is W with n entries left, refitted in the loss's metric.

min tr(Gamma (W - S)^T G (W - S)) over S with n nonzeros anywhere, by hard thresholding pursuit (Foucart 2011): a step
of steepest descent, the n largest entries stay, conjugate gradients on these. G and Gamma are scaled to unit diagonals
first, so that the largest entries are those that are dearest alone (optimal brain damage, LeCun 1990; with Gamma = I
the rule of Wanda), and the descent that follows lets the rest make up for what went (optimal brain surgeon, Hassibi
1993). n falls from all entries to the asked number on a cubic schedule (as in gradual pruning, Zhu and Gupta 2017).

All of it is matrix products with the scaled G and Gamma. docs/solvers.md has the reasons and measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cospadi.solvers.flops import Flops
from cospadi.solvers.problem import Factorization, MetricProblem, SolverOptions
from cospadi.solvers.products import SMALLEST_QUICK, bf16_is_fast, float32_products
from cospadi.solvers.support import (
    CACHED_ENTRIES,
    fill_support,
    keep_largest_entries,
    member_portions,
    member_spans,
    row_blocks,
)

DESCENT = 0.8
"""Fraction of the iterations over which the number of nonzeros falls to the target."""
UNTIED = 0.4
"""Fraction of the iterations in which only Gamma's diagonal counts."""
STEPS = 5
"""Conjugate gradient steps of columns on their support in an iteration."""
LAST_STEPS = 12
"""The same after the last iteration, in full float32."""
TIED_STEPS = 2
"""Where Gamma ties columns: steps in an iteration along what STEPS of the columns alone lead to."""
LAST_TIED_STEPS = 4
"""The same after the last iteration."""
LEADING = 8
"""Directions of G and Gamma that stay in float32: what all tokens share can be most of G, and rounding it to bf16 would
drown the rest."""
ROUNDS = 4
"""Of subspace iteration, which finds them."""
COLUMNS = 2048
"""Columns that are taken at once where Gamma is diagonal."""
FLAT = 1e-6
"""Curvature, in that of one entry alone, which is not told from none: a singular G has directions without an error."""

TINY = torch.finfo(torch.float32).tiny


def htp(problem: MetricProblem, nonzeros: int, options: SolverOptions) -> Factorization:
    """S near W with so many nonzeros, for an error tr(Gamma (W - S)^T G (W - S)).

    Columns that no Gamma ties are problems of their own once the support is chosen. A block of Gamma is taken at a
    time, with step lengths of its own; where Gamma is diagonal, some columns at a time, each with its own. Gamma's
    diagonal is all that counts at first, when much is still there. Inputs and outputs that never moved (zeros on the
    diagonals) count as little as float32 can tell. Of several members each gets a multiple of four nonzeros where the
    sum is one.

    Deterministic. Memory: three matrices of the size of W, three of a block of at most 2048 columns (seven where Gamma
    ties them), and G and a block of Gamma, in bf16 too.
    """
    metric = _Metric.of(problem)
    target = problem.weight.float().T * metric.inputs * metric.outputs[:, None]  # a column of W a row: (d2, d1)
    scale = target.abs().max().clamp(min=TINY)
    target = (target / scale).contiguous()
    d2, d1 = target.shape
    rows = max(1, CACHED_ENTRIES[target.device.type] // d1)
    blocks, members = row_blocks(slice(0, d2), rows), problem.members or (d2,)
    codes, residual = target.clone(), torch.zeros_like(target)  # the residual is minus half the gradient: H(W - S)
    norm = torch.zeros((), dtype=torch.float64, device=target.device)
    for part in metric.parts:
        norm += part.total(target[part.span], part.apply(target[part.span], exact=False))
    portions = [nonzeros]
    errors: list[float] = []
    for iteration in range(1, options.iterations + 1):
        n = scheduled(iteration / options.iterations / DESCENT, target.numel(), nonzeros)
        last = iteration == options.iterations
        parts = metric.untied if iteration <= UNTIED * options.iterations and not last else metric.parts
        if iteration > 1:
            for part in parts:
                _step(part, codes[part.span], residual[part.span])
        if n > nonzeros:
            keep_largest_entries(codes, n, blocks)
        else:
            portions = member_portions(codes, n, members, blocks)
            for member, portion in zip(member_spans(members), portions, strict=True):
                keep_largest_entries(codes, portion, row_blocks(member, rows))
        left = torch.zeros((), dtype=torch.float64, device=target.device)
        for part in parts:
            wanted, found = target[part.span], codes[part.span]
            residual[part.span] = part.apply(wanted - found, exact=last)
            _descend(part, found, residual[part.span], last)
            left += part.total(wanted - found, residual[part.span])
        errors.append(float(left.clamp(min=0) / norm.clamp(min=TINY)) ** 0.5)
        if options.on_iteration:
            options.on_iteration(iteration, errors[-1])
    support = codes != 0
    for member, portion in zip(member_spans(members), portions, strict=True):
        fill_support(support[member], portion)
    coefficients = (codes * scale / metric.outputs[:, None] / metric.inputs).T
    return Factorization(None, coefficients.contiguous(), support.T.contiguous(), errors)


def scheduled(progress: float, dense: int, nonzeros: int) -> int:
    """Entries that may stay: from all of them at 0 to the asked number at 1 and after it, fewer go the later it is."""
    left = max(0.0, 1 - progress)
    return max(nonzeros, round(nonzeros + (dense - nonzeros) * left**3))


def _step(part: _Part, codes: Tensor, residual: Tensor) -> None:
    """A step of steepest descent from S, on the support and off it, in place."""
    squared = part.dot(residual, residual)
    moved = part.apply(residual, exact=False)
    codes.addcmul_(residual, _length(squared, part.dot(residual, moved), squared))


def _descend(part: _Part, codes: Tensor, residual: Tensor, last: bool) -> None:
    """Conjugate gradients on the support of S, in place; the residual goes along, off the support too.

    Where columns are tied a direction is what they would do if they were not, made conjugate to the one before
    (preconditioned by G (x) I, which changes with the number of steps: flexible, Notay 2000).
    """
    support = (codes != 0).to(codes.dtype)
    if part.gamma is None:
        _descend_alone(part, codes, residual, support, LAST_STEPS if last else STEPS, last)
        return
    before: tuple[Tensor, ...] = ()
    for _ in range(LAST_TIED_STEPS if last else TIED_STEPS):
        direction = torch.zeros_like(codes)
        _descend_alone(part, direction, residual * support, support, STEPS, last)
        if before:
            other, moved, curvature, squared = before
            direction.addcmul_(other, _length(part.dot(direction, moved), curvature, squared), value=-1)
        moved = part.apply(direction, last)
        before = direction, moved, part.dot(direction, moved), part.dot(direction, direction)
        length = _length(part.dot(direction, residual), *before[2:])
        codes.addcmul_(direction, length)
        residual.addcmul_(moved, length, value=-1)


def _descend_alone(part: _Part, codes: Tensor, residual: Tensor, support: Tensor, steps: int, exact: bool) -> None:
    """The same as if no columns were tied: each on its own."""
    direction = residual * support
    slope = squared = _columns(direction, direction)  # of the gradient; of the direction, as if both were exact
    for step in range(steps):
        along = part.read(direction, exact)
        length = _length(slope, _columns(direction, along), squared)
        codes.addcmul_(direction, length)
        residual.addcmul_(along, length, value=-1)
        if step + 1 < steps:
            gradient = torch.mul(residual, support, out=along)
            before, slope = slope, _columns(gradient, gradient)
            turn = slope / before.clamp(min=TINY)
            direction = torch.addcmul(gradient, direction, turn, out=direction)
            squared = slope + turn.square() * squared


def _length(slope: Tensor, curvature: Tensor, squared: Tensor) -> Tensor:
    """Of the step that lowers the error most along a direction of that norm; 0 where it is flat, as far as rounding
    lets one see."""
    return torch.where(curvature > FLAT * squared, slope / curvature.clamp(min=TINY), 0.0)


def _columns(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of the columns, (columns, 1)."""
    products: Tensor = torch.linalg.vecdot(left, right)
    return products[:, None]


@dataclass(frozen=True)
class _Part:
    """H(E) = G E Gamma with unit diagonals, for some columns of E that no other column is tied to.

    E holds a column a row, (columns, d1).

    Attributes:
        span: which columns.
        gram: of G, or None for I. gamma: the same of Gamma.
    """

    span: slice
    gram: _Gram | None
    gamma: _Gram | None

    def read(self, error: Tensor, exact: bool) -> Tensor:
        """G E, in bf16 products unless `exact`."""
        return error.clone() if self.gram is None else self.gram.behind(error, exact)

    def apply(self, error: Tensor, exact: bool) -> Tensor:
        """G E Gamma, in the same way."""
        error = self.read(error, exact)
        return error if self.gamma is None else self.gamma.before(error, exact)

    def dot(self, left: Tensor, right: Tensor) -> Tensor:
        """Inner products of the columns (columns, 1), or of the matrices where columns are tied, (1, 1)."""
        products = _columns(left, right)
        return products if self.gamma is None else products.sum().view(1, 1)

    def total(self, left: Tensor, right: Tensor) -> Tensor:
        """Inner product of the matrices, float64."""
        return self.dot(left, right).sum(dtype=torch.float64)


@dataclass(frozen=True)
class _Metric:
    """An error's, with unit diagonals.

    Attributes:
        inputs, outputs: roots of the diagonals of G and Gamma, (d1,) and (d2,).
        parts: columns of W that are tied to each other. untied: the same columns as if none were.
    """

    inputs: Tensor
    outputs: Tensor
    parts: list[_Part]
    untied: list[_Part]

    @classmethod
    def of(cls, problem: MetricProblem) -> _Metric:
        weight = problem.weight
        d1, d2 = weight.shape
        inputs = torch.ones(d1, device=weight.device) if problem.gram is None else _roots(problem.gram.diagonal())
        quick = min(d1, d2) >= SMALLEST_QUICK and bf16_is_fast(weight.device)
        gram = None if problem.gram is None else _Gram.of(problem.gram, inputs, quick)
        gammas = problem.outputs or (torch.ones(d2, device=weight.device),)
        outputs = _roots(torch.cat([gamma if gamma.ndim == 1 else gamma.diagonal() for gamma in gammas]))
        parts: list[_Part] = []
        untied: list[_Part] = []
        for span, gamma in zip(member_spans([len(gamma) for gamma in gammas]), gammas, strict=True):
            alone = [_Part(some, gram, None) for some in row_blocks(span, COLUMNS)]
            untied += alone
            tied = gamma.ndim == 2
            parts += [_Part(span, gram, _Gram.of(gamma, outputs[span], quick))] if tied else alone
        return cls(inputs, outputs, parts, untied)


def _roots(diagonal: Tensor) -> Tensor:
    """Roots of a diagonal, none of them 0."""
    diagonal = diagonal.float()
    return diagonal.clamp(min=float(diagonal.mean()) * 1e-12 + TINY).sqrt()


@dataclass(frozen=True)
class _Quick:
    """A Gram matrix as quick products take it: B T B^T + diag(diagonal) + rest.

    Attributes:
        basis, weighed: B and B T, float32 (d, LEADING): what lies in the leading directions.
        diagonal: (d,) of what is left. rest: bf16 (d, d), the same less its diagonal.
    """

    basis: Tensor
    weighed: Tensor
    diagonal: Tensor
    rest: Tensor


@dataclass(frozen=True)
class _Gram:
    """A Gram matrix with a unit diagonal.

    Attributes:
        exact: float32 (d, d), less the unit diagonal. quick: None where products are exact anyway.
    """

    exact: Tensor
    quick: _Quick | None

    @classmethod
    def of(cls, matrix: Tensor, roots: Tensor, quick: bool) -> _Gram:
        """Of one with these roots of its diagonal."""
        exact = matrix.float() / roots / roots[:, None]
        exact.diagonal().zero_()
        if not quick:
            return cls(exact, None)
        basis = torch.randn(len(exact), LEADING, generator=torch.Generator().manual_seed(0)).to(exact.device)
        with float32_products("highest"):
            for _ in range(ROUNDS):
                basis = torch.linalg.qr(basis + exact @ basis)[0]
            weighed = basis @ (basis.T @ (basis + exact @ basis))
            rest = exact - basis @ weighed.T
        diagonal = 1 + rest.diagonal()
        rest.diagonal().zero_()
        return cls(exact, _Quick(basis, weighed, diagonal, rest.bfloat16()))

    def behind(self, error: Tensor, exact: bool) -> Tensor:
        """E times it."""
        with float32_products("highest"):
            quick = self.quick
            if exact or quick is None:
                return torch.addmm(error, error, self.exact)
            product = (error.bfloat16() @ quick.rest).float().addcmul_(error, quick.diagonal)
            return product.addmm_(error @ quick.basis, quick.weighed.T)

    def before(self, error: Tensor, exact: bool) -> Tensor:
        """It times E."""
        with float32_products("highest"):
            quick = self.quick
            if exact or quick is None:
                return torch.addmm(error, self.exact, error)
            product = (quick.rest @ error.bfloat16()).float().addcmul_(error, quick.diagonal[:, None])
            return product.addmm_(quick.basis, quick.weighed.T @ error)


def flops(d1: int, d2: int, nonzeros: int, options: SolverOptions, widths: Sequence[int] = ()) -> Flops:
    """Of `htp`, whose quick products count as exact ones do, without their leading directions.

    Args:
        widths: outputs of each block of Gamma; none where it is diagonal.
    """
    iterations = options.iterations
    steps = STEPS * (iterations - 1) + LAST_STEPS  # products with G in these, with Gamma none
    tied = 0
    if widths:
        untied = min(int(UNTIED * iterations), iterations - 1)
        tied = TIED_STEPS * (iterations - 1 - untied) + LAST_TIED_STEPS
        steps = STEPS * (untied + tied) + tied
        tied += 2 * (iterations - untied) + 1 - (untied == 0)  # with steps of descent, residuals, and W's own
    return Flops(2.0 * d1 * (d1 * d2 * (2 * iterations + steps) + sum(width**2 for width in widths) * tied))
