"""Solvers against scikit-learn, numpy and a plain K-SVD written here."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from sklearn.linear_model import orthogonal_mp_gram

from cospadi.factorization import SOLVERS, Factorization, Problem, SolverOptions
from cospadi.factorization.eigen import eigen
from cospadi.factorization.ksvd import (
    POWER_ITERATIONS,
    _leading_direction,
    initial_dictionary,
    ksvd,
    update_atoms,
    update_mod,
)
from cospadi.factorization.least_squares import refit_dictionary
from cospadi.factorization.omp import omp, scatter_codes
from cospadi.factorization.orthogonal import keep_largest, leading_directions
from cospadi.factorization.procrustes import code, procrustes, update_orthonormal

SPARSE = [name for name, solver in SOLVERS.items() if solver.layout == "sparse-dictionary"]


def random_problem(d1: int, k: int, d2: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dictionary = torch.randn(d1, k, generator=generator, dtype=torch.float64)
    target = torch.randn(d1, d2, generator=generator, dtype=torch.float64)
    return dictionary / dictionary.norm(dim=0), target


@pytest.mark.parametrize(("d1", "k", "d2", "s"), [(20, 12, 30, 5), (20, 40, 25, 9), (33, 50, 17, 1), (16, 16, 9, 16)])
def test_omp_agrees_with_scikit_learn(d1: int, k: int, d2: int, s: int) -> None:
    dictionary, target = random_problem(d1, k, d2, seed=d1 + k)
    gram, correlations = dictionary.T @ dictionary, dictionary.T @ target
    support, coefficients = omp(gram, correlations, s)
    ours, _ = scatter_codes(support, coefficients, k)
    theirs = orthogonal_mp_gram(gram.numpy(), correlations.numpy(), n_nonzero_coefs=s)
    assert np.array_equal(ours.numpy() != 0, theirs != 0)
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-8, atol=1e-10)


def test_omp_does_not_depend_on_the_memory_limit() -> None:
    dictionary, target = random_problem(24, 30, 50, seed=1)
    gram, correlations = dictionary.T @ dictionary, dictionary.T @ target
    whole, small = (omp(gram, correlations, 8, memory_bytes=limit) for limit in (2**30, 1))
    assert torch.equal(whole[0], small[0])
    torch.testing.assert_close(whole[1], small[1], rtol=1e-10, atol=1e-12)


def test_omp_coefficients_are_least_squares_in_float32() -> None:
    dictionary, target = (matrix.float() for matrix in random_problem(64, 48, 20, seed=2))
    support, coefficients = omp(dictionary.T @ dictionary, dictionary.T @ target, 24)
    for column in range(20):
        atoms = dictionary[:, support[column]].double().numpy()
        expected, *_ = np.linalg.lstsq(atoms, target[:, column].double().numpy(), rcond=None)
        np.testing.assert_allclose(coefficients[column].numpy(), expected, rtol=1e-3, atol=1e-4)


def test_omp_fills_the_support_where_atoms_run_out() -> None:
    """Rank 3: after three atoms every other one is dependent; the support still has s different atoms."""
    dictionary, _ = random_problem(3, 10, 1, seed=3)
    target = torch.randn(3, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    support, coefficients = omp(dictionary.T @ dictionary, dictionary.T @ target, 6)
    assert all(len(set(row)) == 6 for row in support.tolist())
    dense, _ = scatter_codes(support, coefficients, 10)
    torch.testing.assert_close(dictionary @ dense, target)
    assert torch.isfinite(coefficients).all()


def test_omp_of_a_zero_column_is_zero() -> None:
    dictionary, target = random_problem(8, 6, 3, seed=5)
    target[:, 1] = 0
    support, coefficients = omp(dictionary.T @ dictionary, dictionary.T @ target, 4)
    assert coefficients[1].abs().max() == 0
    assert len(set(support[1].tolist())) == 4


def plain_ksvd(target: np.ndarray, dictionary: np.ndarray, s: int, iterations: int, exact: bool) -> list[float]:
    """K-SVD as the papers state it, atom by atom, in numpy: OMP by least squares, then rank-1 updates."""
    dictionary = dictionary.copy()
    k, errors = dictionary.shape[1], []
    for _ in range(iterations):
        codes = np.zeros((k, target.shape[1]))
        for column in range(target.shape[1]):
            chosen: list[int] = []
            residual = target[:, column]
            for _ in range(s):
                scores = np.abs(dictionary.T @ residual)
                scores[chosen] = -1
                chosen.append(int(scores.argmax()))
                values, *_ = np.linalg.lstsq(dictionary[:, chosen], target[:, column], rcond=None)
                residual = target[:, column] - dictionary[:, chosen] @ values
            codes[chosen, column] = values
        for atom in range(k):
            columns = np.flatnonzero(codes[atom])
            rest = (
                target[:, columns]
                - dictionary @ codes[:, columns]
                + np.outer(dictionary[:, atom], codes[atom, columns])
            )
            if exact:
                left, _, _ = np.linalg.svd(rest, full_matrices=False)
                direction = left[:, 0]
            else:
                direction = dictionary[:, atom]
                for _ in range(POWER_ITERATIONS):
                    direction = rest @ (rest.T @ direction)
                    direction /= np.linalg.norm(direction)
            dictionary[:, atom] = direction
            codes[atom, columns] = rest.T @ direction
        errors.append(np.linalg.norm(target - dictionary @ codes) / np.linalg.norm(target))
    return errors


@pytest.mark.parametrize("update", ["power", "pca"])
def test_ksvd_agrees_with_a_plain_one(update: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not from columns of A: a column that is an atom leaves rounding noise to choose the rest of its support.
    start, target = random_problem(12, 10, 60, seed=6)
    monkeypatch.setitem(ksvd.__globals__, "initial_dictionary", lambda *_: start)
    expected = plain_ksvd(target.numpy(), start.numpy(), s=3, iterations=4, exact=update == "pca")
    solution = ksvd(Problem(target), 10, 3, SolverOptions(iterations=4, update=update))
    np.testing.assert_allclose(solution.errors, expected, rtol=1e-6)


def test_mod_is_least_squares_for_the_dictionary() -> None:
    dictionary, target = random_problem(12, 8, 40, seed=7)
    codes, _ = scatter_codes(*omp(dictionary.T @ dictionary, dictionary.T @ target, 3), 8)
    updated, scaled = update_mod(target, dictionary, codes)
    expected, *_ = np.linalg.lstsq(codes.T.numpy(), target.T.numpy(), rcond=None)
    np.testing.assert_allclose((updated @ scaled).numpy(), expected.T @ codes.numpy(), atol=1e-9)
    torch.testing.assert_close(updated.norm(dim=0), torch.ones(8, dtype=torch.float64))


@pytest.mark.parametrize("update", ["power", "pca", "mod"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("d1", "k", "d2", "s"), [(16, 24, 50, 4), (40, 20, 90, 10), (10, 12, 11, 2)])
def test_dictionary_updates_never_raise_the_error(
    update: str, dtype: torch.dtype, d1: int, k: int, d2: int, s: int
) -> None:
    _, target = random_problem(d1, 2, d2, seed=8)
    target = target.to(dtype)
    dictionary = initial_dictionary(target, k, seed=42)
    coefficients, support = scatter_codes(*omp(dictionary.T @ dictionary, dictionary.T @ target, s), k)
    before = torch.linalg.vector_norm(target - dictionary @ coefficients, dtype=torch.float64)
    for _ in range(8):
        if update == "mod":
            dictionary, coefficients = update_mod(target, dictionary, coefficients)
        else:
            dictionary, coefficients = update_atoms(target, dictionary, coefficients, support, update)
        after = torch.linalg.vector_norm(target - dictionary @ coefficients, dtype=torch.float64)
        assert after <= before + 10 * torch.finfo(dtype).eps * target.norm()
        assert not coefficients[~support].any()
        before = after


def test_ksvd_replaces_unused_atoms() -> None:
    dictionary, target = random_problem(12, 6, 30, seed=9)
    coefficients, support = scatter_codes(*omp(dictionary.T @ dictionary, dictionary.T @ target, 2), 6)
    coefficients[4], support[4] = 0, False
    residual = target - dictionary @ coefficients
    updated, _ = update_atoms(target, dictionary, coefficients, support, "power")
    cosines = (updated[:, 4] @ target / target.norm(dim=0)).abs()
    assert cosines.max() > 1 - 1e-12  # it became a column of A ...
    assert residual.norm() > 0
    assert (updated[:, 4] - dictionary[:, 4]).norm() > 1e-3  # ... and not the one it was


@pytest.mark.parametrize("update", ["power", "pca", "mod"])
def test_ksvd_result_is_the_best_it_saw_and_keeps_its_form(update: str) -> None:
    _, target = random_problem(20, 2, 64, seed=10)
    solution = ksvd(Problem(target.float()), 16, 5, SolverOptions(iterations=12, update=update))
    error = float((target - (solution.dictionary @ solution.coefficients).double()).norm() / target.norm())
    assert error == pytest.approx(min(solution.errors), rel=1e-4)
    assert solution.support is not None
    assert (solution.support.sum(0) == 5).all()
    assert not solution.coefficients[~solution.support].any()
    torch.testing.assert_close(solution.dictionary.norm(dim=0), torch.ones(16), rtol=1e-5, atol=1e-5)


def test_ksvd_is_deterministic_and_stops_by_tolerance() -> None:
    _, target = random_problem(20, 2, 64, seed=11)
    first, second = (ksvd(Problem(target.float()), 16, 5, SolverOptions(iterations=5)) for _ in range(2))
    assert torch.equal(first.dictionary, second.dictionary)
    assert torch.equal(first.coefficients, second.coefficients)
    assert len(ksvd(Problem(target), 16, 5, SolverOptions(iterations=50, tolerance=0.5)).errors) < 50


def test_ksvd_takes_more_atoms_than_columns_and_zero_targets() -> None:
    _, target = random_problem(10, 2, 8, seed=12)
    target[:, 3] = 0
    solution = ksvd(Problem(target), 12, 2, SolverOptions(iterations=3))
    assert torch.isfinite(solution.dictionary).all()
    zero = ksvd(Problem(torch.zeros(6, 9)), 4, 2, SolverOptions(iterations=3))
    assert torch.isfinite(zero.dictionary).all()
    assert zero.coefficients.abs().max() == 0


def test_ksvd_beats_truncated_svd_of_the_same_size_on_a_union_of_subspaces() -> None:
    dictionary, _ = random_problem(40, 30, 1, seed=13)
    codes, _ = scatter_codes(
        *omp(
            dictionary.T @ dictionary,
            torch.randn(30, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
            3,
        ),
        30,
    )
    target = dictionary @ codes
    ours = ksvd(Problem(target), 30, 3, SolverOptions(iterations=30))
    singular = np.linalg.svd(target.numpy(), compute_uv=False)
    low_rank = np.sqrt((singular[15:] ** 2).sum() / (singular**2).sum())
    assert min(ours.errors) < 0.5 * low_rank


@pytest.mark.parametrize("solver", ["svd", "svd-llm"])
def test_truncated_svd_is_eckart_young(solver: str) -> None:
    _, target = random_problem(20, 2, 30, seed=14)
    solution = SOLVERS[solver].solve(Problem(target), 7, 0, SolverOptions())
    singular = np.linalg.svd(target.numpy(), compute_uv=False)
    expected = np.sqrt((singular[7:] ** 2).sum() / (singular**2).sum())
    assert solution.errors == [pytest.approx(expected, rel=1e-10)]
    assert solution.support is None
    wide = SOLVERS[solver].solve(Problem(target), 25, 0, SolverOptions())
    assert wide.errors[0] < 1e-12


def test_pca_of_few_columns_is_the_leading_singular_vector() -> None:
    for n in (3, 40):
        error = torch.randn(n, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        _, _, right = np.linalg.svd(error.numpy())
        assert abs(float(_leading_direction(error) @ torch.from_numpy(right[0]))) == pytest.approx(1, abs=1e-12)


def check_form(solution: Factorization, d1: int, k: int, d2: int, s: int) -> None:
    """Shapes, finite numbers, exactly s a column, and nothing outside the support."""
    assert solution.dictionary.shape == (d1, k)
    assert solution.coefficients.shape == (k, d2)
    assert solution.support is not None
    assert (solution.support.sum(0) == s).all()
    assert not solution.coefficients[~solution.support].any()
    assert torch.isfinite(solution.dictionary).all()
    assert torch.isfinite(solution.coefficients).all()


@pytest.mark.parametrize("solver", SPARSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("d1", "k", "d2", "s"),
    [(20, 12, 30, 6), (10, 14, 60, 5), (10, 14, 60, 12), (10, 24, 8, 24), (24, 12, 8, 6), (30, 16, 20, 1)],
)
def test_solvers_keep_the_form_whatever_the_shape(
    solver: str, dtype: torch.dtype, d1: int, k: int, d2: int, s: int
) -> None:
    """Also k > d1, s > d1, k > d2, and a column of zeros."""
    _, target = random_problem(d1, 2, d2, seed=15)
    target[:, 2] = 0
    solution = SOLVERS[solver].solve(Problem(target.to(dtype)), k, s, SolverOptions(iterations=4))
    check_form(solution, d1, k, d2, s)
    assert solution.dictionary.dtype == solution.coefficients.dtype == dtype
    error = (target - (solution.dictionary @ solution.coefficients).double()).norm() / target.norm()
    assert float(error) == pytest.approx(min(solution.errors), rel=1e-4, abs=1e-6)
    norms = solution.dictionary.norm(dim=0)
    torch.testing.assert_close(norms[:d1], torch.ones_like(norms[:d1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", SPARSE)
def test_solvers_take_a_zero_target(solver: str) -> None:
    solution = SOLVERS[solver].solve(Problem(torch.zeros(6, 9)), 4, 2, SolverOptions(iterations=3))
    check_form(solution, 6, 4, 9, 2)
    assert not solution.coefficients.any()
    assert solution.errors[-1] == 0


@pytest.mark.parametrize("solver", SPARSE)
def test_solvers_are_deterministic_and_report_every_error(solver: str) -> None:
    _, target = random_problem(20, 2, 64, seed=16)
    seen: list[tuple[int, float]] = []
    options = SolverOptions(iterations=5, on_iteration=lambda iteration, error: seen.append((iteration, error)))
    first, second = (SOLVERS[solver].solve(Problem(target.float()), 16, 5, options) for _ in range(2))
    assert torch.equal(first.dictionary, second.dictionary)
    assert torch.equal(first.coefficients, second.coefficients)
    assert seen == 2 * list(enumerate(first.errors, start=1))


@pytest.mark.parametrize(("d1", "k", "d2"), [(20, 9, 30), (30, 9, 20), (30, 25, 20), (30, 30, 20)])
def test_leading_directions_are_left_singular_vectors(d1: int, k: int, d2: int) -> None:
    _, target = random_problem(d1, 2, d2, seed=17)
    ours = leading_directions(target, k).numpy()
    left, singular, _ = np.linalg.svd(target.numpy(), full_matrices=False)
    rank = min(k, singular.size)
    np.testing.assert_allclose(np.abs((ours[:, :rank] * left[:, :rank]).sum(0)), 1, rtol=1e-8)
    np.testing.assert_allclose(ours.T @ ours, np.eye(k), atol=1e-12)  # also where the rank is used up


def test_keep_largest_is_the_best_of_all_supports() -> None:
    """Over orthonormal atoms no other s of them come closer to a column: all choices are tried."""
    _, target = random_problem(8, 2, 5, seed=18)
    atoms = leading_directions(target, 6)
    coefficients, support = code(target, atoms, 3)
    best = []
    for column in target.numpy().T:
        tried = {}
        for chosen in combinations(range(6), 3):
            basis = atoms[:, chosen].numpy()
            tried[chosen] = np.linalg.norm(column - basis @ np.linalg.lstsq(basis, column, rcond=None)[0])
        best.append(min(tried, key=tried.__getitem__))
    assert [tuple(row.nonzero()[:, 0].tolist()) for row in support.T] == best
    torch.testing.assert_close(coefficients, (atoms.T @ target) * support)
    assert (keep_largest(torch.zeros(6, 5), 4).sum(0) == 4).all()  # ties are broken somehow


def test_orthonormal_update_agrees_with_scipy() -> None:
    """SciPy rotates square matrices only, so k = d1 here."""
    _, target = random_problem(9, 2, 40, seed=19)
    coefficients, _ = code(target, torch.eye(9, dtype=torch.float64), 4)
    # min || S^T R - A^T || with R = D^T
    rotation, _ = orthogonal_procrustes(coefficients.T.numpy(), target.T.numpy())
    np.testing.assert_allclose(update_orthonormal(target, coefficients).numpy(), rotation.T, atol=1e-12)


@pytest.mark.parametrize(("d1", "k", "d2"), [(15, 8, 40), (8, 8, 40), (8, 11, 40), (15, 12, 7)])
def test_orthonormal_update_beats_other_orthonormal_dictionaries(d1: int, k: int, d2: int) -> None:
    _, target = random_problem(d1, 2, d2, seed=20)
    coefficients, _ = code(target, leading_directions(target, k), min(3, k))
    ours = update_orthonormal(target, coefficients)
    atoms = min(k, d1)
    expected = torch.zeros(k, k, dtype=torch.float64)
    expected[:atoms, :atoms] = torch.eye(atoms)
    torch.testing.assert_close(ours.T @ ours, expected)
    for seed in range(20):
        other = torch.zeros_like(ours)
        step = 10.0 ** (-seed / 4)
        noise = torch.randn(d1, atoms, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        other[:, :atoms] = torch.linalg.qr(ours[:, :atoms] + step * noise)[0]
        signs = torch.where((other * ours).sum(0) < 0, -1.0, 1.0)
        assert (target - ours @ coefficients).norm() <= (target - (other * signs) @ coefficients).norm() + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("d1", "k", "d2", "s"), [(24, 20, 90, 8), (12, 15, 70, 6), (20, 12, 9, 4)])
def test_procrustes_error_never_rises_and_atoms_are_orthonormal(
    dtype: torch.dtype, d1: int, k: int, d2: int, s: int
) -> None:
    _, target = random_problem(d1, 2, d2, seed=21)
    target = target.to(dtype)
    solution = procrustes(Problem(target), k, s, SolverOptions(iterations=15))
    assert all(after <= before + 1e-6 for before, after in pairwise(solution.errors))
    start = leading_directions(target, k)
    coefficients, _ = code(target, start, s)
    assert solution.errors[0] <= float((target - start @ coefficients).norm() / target.norm()) + 1e-6
    assert solution.errors[-1] < solution.errors[0]
    atoms = solution.dictionary[:, :d1]
    torch.testing.assert_close(atoms.T @ atoms, torch.eye(min(k, d1), dtype=dtype), rtol=1e-5, atol=1e-5)
    assert not solution.dictionary[:, d1:].any()
    assert not solution.coefficients[d1:].any()


def test_procrustes_stops_by_tolerance_and_finds_an_orthonormal_dictionary() -> None:
    _, target = random_problem(20, 2, 64, seed=22)
    assert len(procrustes(Problem(target), 16, 5, SolverOptions(iterations=50, tolerance=0.5)).errors) == 2
    hidden = torch.linalg.qr(target[:, :20])[0]
    codes, _ = code(torch.randn(20, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), hidden, 3)
    assert min(procrustes(Problem(hidden @ codes), 20, 3, SolverOptions(iterations=100)).errors) < 1e-6


@pytest.mark.parametrize("whitened", [True, False])
def test_eigen_agrees_with_a_plain_one(whitened: bool) -> None:
    """Scores, supports and the refit in numpy, a column and an atom at a time."""
    d1, k, d2, s = 14, 10, 50, 4
    _, weight = random_problem(d1, 2, d2, seed=23)
    factor = torch.triu(random_problem(d1, 2, d1, seed=24)[1]) + 3 * torch.eye(d1, dtype=torch.float64)
    factor[: d1 // 2] *= 30
    factor = factor if whitened else torch.eye(d1, dtype=torch.float64)
    target = factor @ weight
    values, vectors = np.linalg.eigh((target @ target.T).numpy())
    atoms = vectors[:, np.argsort(-values)[:k]]
    codes = np.zeros((k, d2))
    for column in range(d2):
        scores = []
        for atom in range(k):
            c = abs(atoms[:, atom] @ target[:, column].numpy())
            scores.append(np.sqrt(c * c * np.linalg.norm(np.linalg.inv(factor.numpy()) @ atoms[:, atom])))
        chosen = np.argsort(scores)[-s:]
        codes[chosen, column] = atoms[:, chosen].T @ target[:, column].numpy()
    refitted, *_ = np.linalg.lstsq(codes.T, target.T.numpy(), rcond=None)

    undo = (lambda atoms: torch.linalg.solve_triangular(factor, atoms.double(), upper=True)) if whitened else None
    solution = eigen(Problem(target, undo), k, s, SolverOptions())
    assert solution.support is not None
    assert np.array_equal(solution.support.numpy(), codes != 0)
    np.testing.assert_allclose((solution.dictionary @ solution.coefficients).numpy(), refitted.T @ codes, atol=1e-8)
    magnitude = keep_largest(torch.from_numpy(np.abs(atoms.T @ target.numpy())), s)
    assert torch.equal(magnitude, solution.support) != whitened  # the score matters, and only where L does


def test_refit_leaves_unused_atoms_and_never_raises_the_error() -> None:
    _, target = random_problem(12, 2, 40, seed=25)
    dictionary = leading_directions(target, 8)
    codes, _ = code(target, dictionary, 3)
    codes[5] = 0
    refitted, scaled = refit_dictionary(target, dictionary, codes)
    assert torch.equal(refitted[:, 5], dictionary[:, 5])
    assert not scaled[5].any()
    assert (target - refitted @ scaled).norm() < (target - dictionary @ codes).norm()
