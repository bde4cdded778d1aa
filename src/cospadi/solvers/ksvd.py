"""K-SVD (Aharon, Elad, Bruckstein 2006), the paper's solver: OMP and a dictionary update in turn, T times.

Three updates (paper, appendix A.3): `power`, an atom at a time by 8 power iterations from the current atom, which
cannot raise the error; `pca`, an atom at a time by its exact leading singular vector; `mod` (Engan, Aase, Husoy 1999),
all atoms at once by least squares.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cospadi.solvers.flops import Flops, eigh
from cospadi.solvers.least_squares import refit_dictionary, refit_flops
from cospadi.solvers.omp import omp, omp_flops, scatter_codes
from cospadi.solvers.problem import Factorization, Problem, SolverOptions

POWER_ITERATIONS = 8


def ksvd(problem: Problem, k: int, s: int, options: SolverOptions) -> Factorization:
    """Alternate sparse coding (exactly s atoms a column) and dictionary update, and return the best pair seen.

    Starts from a random choice of columns of A, normalised (columns repeat, perturbed by noise, where k > d2).
    """
    target = problem.target
    dictionary = initial_dictionary(target, k, options.seed)
    scale = torch.linalg.vector_norm(target, dtype=torch.float64).clamp(min=torch.finfo(torch.float64).tiny)
    best: Factorization | None = None
    errors: list[float] = []
    for iteration in range(1, options.iterations + 1):
        codes = omp(dictionary.T @ dictionary, dictionary.T @ target, s, options.memory_bytes)
        coefficients, support = scatter_codes(*codes, k)
        if options.update == "mod":
            dictionary, coefficients = update_mod(target, dictionary, coefficients)
        else:
            dictionary, coefficients = update_atoms(target, dictionary, coefficients, support, options.update)
        residual = target - dictionary @ coefficients
        error = float(torch.linalg.vector_norm(residual, dtype=torch.float64) / scale)
        if best is None or error < min(errors):
            best = Factorization(dictionary, coefficients, support)
        errors.append(error)
        if options.on_iteration:
            options.on_iteration(iteration, error)
        if error == 0.0 or (iteration > 1 and options.tolerance > 0 and error > (1 - options.tolerance) * errors[-2]):
            break
    assert best is not None
    return Factorization(best.dictionary, best.coefficients, best.support, errors)


def initial_dictionary(target: Tensor, k: int, seed: int) -> Tensor:
    """k randomly chosen columns of A (d1, d2), normalised: (d1, k). Zero columns are replaced by random directions."""
    d1, d2 = target.shape
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(d2, generator=generator) for _ in range(-(-k // d2))])[:k]
    noise = torch.randn(d1, k, generator=generator, dtype=torch.float64).to(target)
    atoms = _normalise(target[:, order.to(target.device)])
    repeated = torch.arange(k, device=target.device) >= d2
    atoms = torch.where(repeated, _normalise(atoms + 0.1 * _normalise(noise)), atoms)
    return torch.where(atoms.square().sum(0) > 0, atoms, _normalise(noise))


def update_atoms(
    target: Tensor, dictionary: Tensor, coefficients: Tensor, support: Tensor, method: str
) -> tuple[Tensor, Tensor]:
    """One K-SVD sweep: each atom in turn, with the coefficients on its support, is refitted to what the rest leaves.

    Args:
        target: A (d1, d2). dictionary: D (d1, k). coefficients: S (k, d2). support: bool (k, d2).
        method: "power" or "pca".
    Returns:
        The new D (unit columns) and S; neither argument is changed, the support stays.
    """
    dictionary, coefficients = dictionary.clone(), coefficients.clone()
    # Rows are columns of A, so that picking an atom's columns copies whole rows.
    residual = (target - dictionary @ coefficients).T.contiguous()
    replaced = torch.zeros(target.shape[1], dtype=torch.bool, device=target.device)
    tiny = torch.finfo(target.dtype).tiny
    used = support.sum(1).tolist()
    for atom, columns in enumerate(torch.split(support.nonzero()[:, 1], used)):
        if used[atom] == 0:
            dictionary[:, atom] = _worst_column(target, residual, replaced)
            continue
        error = residual[columns].addr_(coefficients[atom, columns], dictionary[:, atom])  # without this atom
        direction = dictionary[:, atom]
        if method == "pca":
            direction = _leading_direction(error)
        else:
            for _ in range(POWER_ITERATIONS):
                direction = torch.mv(error.T, torch.mv(error, direction))
                direction = direction / torch.linalg.vector_norm(direction).clamp(min=tiny)
        if not torch.linalg.vector_norm(direction) > 0:  # nothing is left for this atom to do
            residual[columns] = error
            coefficients[atom, columns] = 0
            continue
        weights = torch.mv(error, direction)
        dictionary[:, atom] = direction
        coefficients[atom, columns] = weights
        residual[columns] = error.addr_(weights, direction, alpha=-1)
    return dictionary, coefficients


def _leading_direction(error: Tensor) -> Tensor:
    """Leading right singular vector of (n, d1), by the smaller of its two Gram matrices."""
    if error.shape[0] >= error.shape[1]:
        direction: Tensor = torch.linalg.eigh(error.T @ error)[1][:, -1]
        return direction
    leading = torch.linalg.eigh(error @ error.T)[1][:, -1]
    return _normalise(torch.mv(error.T, leading)[:, None])[:, 0]


def update_mod(target: Tensor, dictionary: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Method of optimal directions: least squares with S fixed; unused atoms become the worst-represented columns."""
    dictionary, coefficients = refit_dictionary(target, dictionary, coefficients)
    residual = (target - dictionary @ coefficients).T
    for atom, column in zip(_unused(coefficients), _worst_columns(residual), strict=False):
        dictionary[:, atom] = _normalise(target[:, column : column + 1])[:, 0]
    return dictionary, coefficients


def _unused(coefficients: Tensor) -> list[int]:
    unused: list[int] = (coefficients == 0).all(1).nonzero()[:, 0].tolist()
    return unused


def _worst_columns(residual: Tensor) -> Iterator[int]:
    """Columns by falling residual norm; residual is (d2, d1)."""
    yield from residual.square().sum(1).argsort(descending=True, stable=True).tolist()


def _worst_column(target: Tensor, residual: Tensor, replaced: Tensor) -> Tensor:
    """The worst-represented column of A that no other atom took in this sweep, normalised; marks it in `replaced`."""
    badness = residual.square().sum(1).masked_fill(replaced, -1.0)
    column = int(badness.argmax())
    replaced[column] = True
    return _normalise(target[:, column : column + 1])[:, 0]


def _normalise(columns: Tensor) -> Tensor:
    """Unit columns; zero columns stay zero."""
    norms = torch.linalg.vector_norm(columns, dim=0, keepdim=True)
    return torch.where(norms > 0, columns / norms.clamp(min=torch.finfo(columns.dtype).tiny), columns)


def flops(d1: int, d2: int, k: int, s: float, options: SolverOptions) -> Flops:
    """Of `ksvd`, in each iteration: D^T D and D^T A, OMP, the dictionary update, D S.

    An update atom by atom begins with D S, and passes over its n = s d2 / k columns twice a power iteration and three
    times more, or takes their Gram and its eigenvectors; the number of columns is taken as the same for all atoms.
    """
    coding = Flops(2.0 * d1 * k**2 + 4.0 * d1 * k * d2) + omp_flops(d2, k, round(s))
    columns, apart = s * d2 / k, Flops(2.0 * d1 * k * d2)
    if options.update == "mod":
        update = refit_flops(d1, d2, k) + apart
    elif options.update == "power":
        update = apart + Flops(2.0 * d1 * columns * (2 * POWER_ITERATIONS + 3)) * k
    else:
        small, large = min(columns, d1), max(columns, d1)
        update = apart + Flops(2.0 * small**2 * large + 6.0 * d1 * columns, eigh(round(small))) * k
    return (coding + update) * options.iterations
