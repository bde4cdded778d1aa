"""Dictionary by MOD, codes by hard thresholding pursuit, sparsity reached step by step.

An iteration is matrix products and passes over S; no loop runs over atoms or columns. With G = D^T D and B = D^T A:

1. Support: a gradient step from S along R = B - G S, then the n largest entries of the whole matrix stay (iterative
   hard thresholding, Blumensath and Davies 2009). How many of them a column gets is free. The step is twice the best
   one of each column, which leaves the error where it was and lets more entries trade places.
2. Codes: a step of steepest descent on the chosen support (hard thresholding pursuit, Foucart 2011).
3. Dictionary: D = A S^T (S S^T)^-1, the method of optimal directions (Engan, Aase, Husoy 1999). Steps 1 and 2 of the
   next iteration use D carried on along its last change (heavy ball, Polyak 1964), unless the error has just risen.

n falls from all entries to the asked number on a cubic schedule (as in gradual pruning, Zhu and Gupta 2017), from the
truncated SVD, which is the best start there is while n is large. docs/solvers.md has the reasons and measurements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cospadi.solvers.flops import Flops, cholesky, triangular
from cospadi.solvers.orthogonal import directions_flops, leading_directions
from cospadi.solvers.problem import Factorization, Problem, SolverOptions, relative_error
from cospadi.solvers.products import (
    SMALLEST_QUICK,
    bf16_is_fast,
    float32_products,
    rough_products,
    self_product,
    self_product_flops,
)
from cospadi.solvers.support import (
    CACHED_ENTRIES,
    fill_support,
    keep_largest_entries,
    member_portions,
    member_spans,
    row_blocks,
)

DESCENT = 0.6
"""Fraction of the iterations over which the number of nonzeros falls to the target."""
MOMENTUM = 0.95
MOMENTUM_RAMP = 2.0
"""Momentum grows by this, divided by the number of iterations, each iteration since the start or the last rise."""
OVERSHOOT = 2.0
LEAST_CURVATURE = 0.02
"""Smallest p . G p that steps are computed from, in p . p: some 0.5 is usual, less may be rounding of tied atoms."""
RIDGE = 1e-7
"""Added to the diagonal of S S^T once that is scaled to ones."""
UNUSED = 1e-7
"""Norm of a row of S, in the largest one, up to which its atom stays as it is."""
EXACT_FRACTION = 0.05
"""Fraction of the iterations, the last ones, whose products are all in full float32."""

TINY = torch.finfo(torch.float32).tiny


def mod_htp(problem: Problem, k: int, s: float, options: SolverOptions) -> Factorization:
    """min ||A - D S||_F over D (d1, k) and S (k, d2) with s d2 nonzeros anywhere in S.

    Returns the best pair of the last, exact iterations and the start that was given; others' errors are rough.

    Computed in float32, in which errors below 1e-3 are known roughly or come out as zero. Deterministic without a
    seed. k may exceed d1 and d2. Memory: A, and three matrices of the size of S. Where d1 > d2 all of it happens in the
    space of A's columns, which the best D lies in: A is then d2 x d2.
    Of several members each gets a multiple of four nonzeros where s d2 is one, so that 14-bit values fill bytes.
    `options.start` replaces the truncated SVD; the schedule then begins at its number of nonzeros, and it counts as a
    pair seen if it has no more than each member may have.
    """
    target = problem.target.float()
    scale = target.abs().max().clamp(min=TINY)
    directions = leading_directions(problem.target, min(target.shape)).float()
    basis = directions if target.shape[0] > target.shape[1] else None
    if basis is not None:
        target = basis.T @ target
    columns = (target.T / scale).contiguous()  # a column of A a row: (d2, d1)
    norm = float(torch.linalg.vector_norm(columns, dtype=torch.float64))
    d2, d1 = columns.shape
    nonzeros = round(s * d2)
    if options.start is None:
        atoms, codes = _start(columns, directions if basis is None else torch.eye(d1).to(columns), k)
    else:
        atoms, codes = _given(options.start, basis, scale)
    dense = d2 * min(k, d1) if options.start is None else max(nonzeros, int(codes.count_nonzero()))
    rows = max(1, CACHED_ENTRIES[columns.device.type] // max(k, d1))
    blocks = row_blocks(slice(0, d2), rows)
    members = problem.members or (d2,)
    portions: list[int] | None = None  # each member's nonzeros, fixed once the schedule has come down
    quick = torch.bfloat16 if min(d1, d2) >= SMALLEST_QUICK and bf16_is_fast(columns.device) else torch.float32

    best, best_error, best_portions = (atoms, codes.clone()), float("inf"), [nonzeros]
    if options.start is not None:
        best_portions = member_portions(codes, nonzeros, members, blocks)
        counts = [int(codes[member].count_nonzero()) for member in member_spans(members)]
        if all(count <= portion for count, portion in zip(counts, best_portions, strict=True)):
            best_error = relative_error(columns, codes @ atoms)
    correlations = torch.empty_like(codes)
    previous, momentum = atoms, 0.0
    errors: list[float] = []
    settled = stopping = False
    for iteration in range(1, options.iterations + 1):
        n = _scheduled(iteration / options.iterations, dense, nonzeros)
        exact = stopping or iteration > options.iterations * (1 - EXACT_FRACTION)
        with float32_products("highest" if exact else rough_products(columns.device)):
            lead = _unit_rows(atoms.lerp(previous, -momentum))
            lead_t = lead.T.contiguous()
            coherence = self_product(lead_t)
            coherence.diagonal().zero_()  # G less its unit diagonal, so that low precision touches small numbers only
            if not exact:
                coherence = coherence.to(quick)
            for block in blocks:
                torch.mm(columns[block], lead_t, out=correlations[block])
                _gradient_step(codes[block], correlations[block], coherence)
            if n > nonzeros:
                keep_largest_entries(codes, n, blocks)
            else:
                portions = portions or member_portions(codes, n, members, blocks)
                for member, portion in zip(member_spans(members), portions, strict=True):
                    keep_largest_entries(codes, portion, row_blocks(member, rows))
            for block in blocks:
                _fit_codes(codes[block], correlations[block], coherence)
            previous = atoms
            atoms, distance = _fit_dictionary(self_product(codes), codes.T @ columns, lead, norm)
        norms = torch.linalg.vector_norm(atoms, dim=1)  # zero where an atom has a twin that does all the work
        atoms = torch.where(norms[:, None] > 0, atoms / norms.clamp(min=TINY)[:, None], lead)
        codes *= norms
        error = distance / norm if norm > 0 else 0.0

        was_settled, settled = settled, n == nonzeros
        if exact and portions and error < best_error:  # errors of other iterations are known to three digits only
            best, best_error, best_portions = (atoms, best[1].copy_(codes)), error, portions
        last = errors[-1] if errors else float("inf")
        momentum = 0.0 if settled and error > last else min(MOMENTUM, momentum + MOMENTUM_RAMP / options.iterations)
        errors.append(error)
        if options.on_iteration:
            options.on_iteration(iteration, error)
        stalled = was_settled and options.tolerance > 0 and error > (1 - options.tolerance) * last
        if settled and (error == 0.0 or stalled):
            if exact:
                break
            stopping = True
    atoms, codes = best
    support = codes != 0
    for member, portion in zip(member_spans(members), best_portions, strict=True):
        fill_support(support[member], portion)
    dictionary = atoms.T if basis is None else basis @ atoms.T
    dictionary, coefficients = dictionary.to(problem.target), (codes * scale).T.to(problem.target)
    return Factorization(dictionary.contiguous(), coefficients.contiguous(), support.T.contiguous(), errors)


def flops(d1: int, d2: int, k: int, s: float, options: SolverOptions) -> Flops:
    """Of `mod_htp`, whose quick products count as exact ones do.

    An iteration, of d1 no more than d2: D^T A and S A^T, four products of S and G, D^T D and S S^T; a Cholesky factor
    and two triangular solves. A tall A is first turned into d2 x d2, and D turned back in the end.
    """
    start = directions_flops(d1, d2, min(d1, d2))
    if d1 > d2:
        start += Flops(2.0 * d1 * d2**2 + 2.0 * d1 * d2 * k)
        d1 = d2
    start += Flops(2.0 * d1 * k * d2)
    if k > d1:  # Gram of the atoms, LU factors of it and their solves
        start += Flops(2.0 * d1**2 * k, 2 * cholesky(d1) + 2 * triangular(d1, d2))
    products = 4.0 * d1 * k * d2 + 8.0 * k**2 * d2 + self_product_flops(d1, k) + self_product_flops(d2, k)
    iteration = Flops(products, cholesky(k) + 2 * triangular(k, d1))
    return start + iteration * options.iterations


def _scheduled(progress: float, dense: int, nonzeros: int) -> int:
    """Nonzeros at a progress in (0, 1]: falls from `dense` to `nonzeros` as a cubic over DESCENT, then stays."""
    return nonzeros + round(max(0, dense - nonzeros) * max(0.0, 1 - progress / DESCENT) ** 3)


def _start(columns: Tensor, directions: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """D^T (k, d1): the leading left singular vectors of A, and S^T (d2, k): A over them.

    Atoms beyond d1 are columns of A, evenly spaced; S is then the smallest one that meets A.

    Args:
        columns: A^T (d2, d1). directions: all left singular vectors of A (d1, d1).
    """
    d2, d1 = columns.shape
    if k <= d1:
        return directions[:, :k].T.contiguous(), columns @ directions[:, :k]
    more = columns[torch.arange(k - d1, device=columns.device) * d2 // (k - d1)] + TINY
    atoms = torch.cat([directions.T, _unit_rows(more)])
    gram = atoms.T.double() @ atoms.double()  # D D^T, which contains I
    codes: Tensor = torch.linalg.solve(gram, columns.T.double()).T @ atoms.T.double()
    return atoms, codes.float()


def _given(start: Factorization, basis: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor]:
    """D^T with unit rows and S^T of a solution, for A / scale, in the basis (d1, d2) of A's columns if there is one."""
    assert start.dictionary is not None
    dictionary, coefficients = start.dictionary.float(), start.coefficients.float()
    if basis is not None:
        dictionary = basis.T @ dictionary
    norms = torch.linalg.vector_norm(dictionary, dim=0)
    return _unit_rows(dictionary.T).contiguous(), (coefficients.T * norms / scale).contiguous()


def _gradient_step(codes: Tensor, correlations: Tensor, coherence: Tensor) -> None:
    """S + OVERSHOOT t R in place, R = B - G S, with t the best step of each column (here: row)."""
    residual = correlations - codes
    residual -= _product(codes, coherence)
    codes.addcmul_(residual, _best_step(residual, coherence), value=OVERSHOOT)


def _fit_codes(codes: Tensor, correlations: Tensor, coherence: Tensor) -> None:
    """A step of steepest descent in place towards G S = B on the support of S, of the best length for each column."""
    support = (codes != 0).to(codes.dtype)
    residual = correlations - codes
    residual.sub_(_product(codes, coherence)).mul_(support)
    codes.addcmul_(residual, _best_step(residual, coherence))


def _best_step(residual: Tensor, coherence: Tensor) -> Tensor:
    """r . r / (r . G r) of each row r (rows, 1); where r . G r is lost in rounding, a shorter one."""
    squared = torch.linalg.vecdot(residual, residual)
    curvature = squared + torch.linalg.vecdot(residual, _product(residual, coherence))
    step: Tensor = squared / torch.maximum(curvature, LEAST_CURVATURE * squared).clamp(min=TINY)
    return step[:, None]


def _product(rows: Tensor, coherence: Tensor) -> Tensor:
    """Rows times G - I, computed in the precision of the latter."""
    product: Tensor = (rows.to(coherence.dtype) @ coherence).to(rows.dtype)
    return product


def _fit_dictionary(outer: Tensor, cross: Tensor, unused: Tensor, norm: float) -> tuple[Tensor, float]:
    """D^T = (S S^T)^-1 S A^T, and ||A - D S||.

    Args:
        outer: S S^T (k, k). cross: S A^T (k, d1). norm: ||A||.
        unused: the atoms (k, d1) that stay where S has an empty row, or next to one.
    """
    size = outer.diagonal().sqrt()
    used = size > UNUSED * size.max()
    size = torch.where(used, size, torch.ones_like(size))
    scaled = outer / size / size[:, None]
    scaled.diagonal().fill_(1 + RIDGE)
    factor, failed = torch.linalg.cholesky_ex(scaled)
    cross = cross / size[:, None]
    if failed.item():  # atoms that are tied, to the precision of the product: the pseudo-inverse, above its noise
        values, vectors = torch.linalg.eigh(scaled.double())
        noise = max(100 * RIDGE * float(values[-1]), -2 * float(values[0]))
        roots = torch.where(values > noise, values.rsqrt(), torch.zeros_like(values))[:, None]
        half = roots * (vectors.T @ cross.double())
        solution = (vectors @ (roots * half)).to(cross.dtype)
    else:  # from the right, where rows of D^T lie as the triangular solver wants them
        half = torch.linalg.solve_triangular(factor.mT, cross.T, upper=True, left=False)
        solution = torch.linalg.solve_triangular(factor, half, upper=False, left=False).T
    gained = _energy(half) + RIDGE * _energy(solution)
    atoms = torch.where(used[:, None], solution / size[:, None], unused)
    return atoms, max(norm**2 - gained, 0.0) ** 0.5


def _energy(matrix: Tensor) -> float:
    """||M||_F^2, rows in their own precision and their sum in float64."""
    return float(torch.linalg.vecdot(matrix, matrix).sum(dtype=torch.float64))


def _unit_rows(matrix: Tensor) -> Tensor:
    unit: Tensor = matrix / torch.linalg.vector_norm(matrix, dim=1, keepdim=True).clamp(min=TINY)
    return unit
