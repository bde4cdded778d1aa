"""Solvers against scikit-learn, numpy and a plain K-SVD written here."""

from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.linalg import orthogonal_procrustes
from sklearn.linear_model import orthogonal_mp_gram

from cospadi.budget import accounting
from cospadi.format.form import Form
from cospadi.solvers import SOLVERS, Factorization, Problem, SolverOptions
from cospadi.solvers.eigen import eigen
from cospadi.solvers.ksvd import (
    POWER_ITERATIONS,
    _leading_direction,
    initial_dictionary,
    ksvd,
    update_atoms,
    update_mod,
)
from cospadi.solvers.least_squares import refit_dictionary
from cospadi.solvers.mod_htp import (
    DESCENT,
    EXACT_FRACTION,
    OVERSHOOT,
    _fit_codes,
    _fit_dictionary,
    _gradient_step,
    _scheduled,
    mod_htp,
)
from cospadi.solvers.omp import omp, scatter_codes
from cospadi.solvers.orthogonal import keep_largest, leading_directions
from cospadi.solvers.procrustes import code, procrustes, update_orthonormal
from cospadi.solvers.products import rough_products, self_product
from cospadi.solvers.support import keep_largest_entries, member_portions, row_blocks

FORM = Form("stored", "mask", "f14")
SPARSE = [name for name, solver in SOLVERS.items() if solver.support == "mask" and not solver.identity]


def exact_errors(errors: list[float]) -> list[float]:
    """Of the iterations of mod_htp whose products are in full float32."""
    return [error for i, error in enumerate(errors, 1) if i > len(errors) * (1 - EXACT_FRACTION)]


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


def check_form(solution: Factorization, d1: int, k: int, d2: int, s: float, free: bool = False) -> None:
    """Shapes, finite numbers, exactly s a column (or s d2 in all), and nothing outside the support."""
    assert solution.dictionary.shape == (d1, k)
    assert solution.coefficients.shape == (k, d2)
    assert solution.support is not None
    if free:
        assert solution.support.sum() == round(s * d2)
    else:
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
    check_form(solution, d1, k, d2, s, SOLVERS[solver].free_support)
    assert solution.dictionary.dtype == solution.coefficients.dtype == dtype
    error = (target - (solution.dictionary @ solution.coefficients).double()).norm() / target.norm()
    if solver == "mod-htp":  # before the last iterations S has more than s d2 nonzeros, or errors are rough
        assert float(error) == pytest.approx(min(exact_errors(solution.errors)), rel=1e-4, abs=1e-3)
    else:
        assert float(error) == pytest.approx(min(solution.errors), rel=1e-4, abs=1e-6)
    norms = solution.dictionary.norm(dim=0)
    torch.testing.assert_close(norms[:d1], torch.ones_like(norms[:d1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", SPARSE)
def test_solvers_take_a_zero_target(solver: str) -> None:
    solution = SOLVERS[solver].solve(Problem(torch.zeros(6, 9)), 4, 2, SolverOptions(iterations=3))
    check_form(solution, 6, 4, 9, 2, SOLVERS[solver].free_support)
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


def structured(d1: int, d2: int, seed: int) -> torch.Tensor:
    """A whitened projection in small: a covariance with eigenvalues 1 / i, weights with log-normal column norms."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(d1, d2, generator=generator) * torch.exp(0.4 * torch.randn(d2, generator=generator))
    basis = torch.linalg.qr(torch.randn(d1, d1, generator=generator))[0]
    return basis @ (torch.arange(1, d1 + 1).rsqrt()[:, None] * weights)


def true_error(target: torch.Tensor, solution: Factorization) -> float:
    """||A - D S||_F / ||A||_F in numpy's float64."""
    exact = target.double().numpy()
    product = solution.dictionary.double().numpy() @ solution.coefficients.double().numpy()
    return float(np.linalg.norm(exact - product) / np.linalg.norm(exact))


def check_free(target: torch.Tensor, solution: Factorization, k: int, nonzeros: int) -> None:
    """The form of mod-htp's result, and the error that it reports."""
    d1, d2 = target.shape
    check_form(solution, d1, k, d2, nonzeros / d2, free=True)
    norms = np.linalg.norm(solution.dictionary.double().numpy(), axis=0)
    np.testing.assert_allclose(norms, 1, rtol=1e-5)
    reported = min(exact_errors(solution.errors))
    assert true_error(target, solution) == pytest.approx(reported, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize(
    ("d1", "k", "d2", "s", "iterations"),
    [
        (48, 30, 80, 12.35, 12),
        (48, 30, 80, 12.35, 1),
        (48, 30, 80, 30, 4),
        (48, 30, 80, 1 / 80, 8),
        (16, 40, 60, 5.5, 12),  # k > d1
        (40, 24, 10, 7.3, 12),  # d2 < k
        (12, 30, 9, 3, 12),  # k > d1 and d2
        (40, 8, 1, 4, 6),
        (1, 1, 20, 0.5, 6),
        (24, 520, 60, 4, 4),
        (12, 30, 9, 30, 12),  # met exactly, by tied atoms
        (40, 20, 1, 15.7, 12),  # rows of S fade away
    ],
)
def test_mod_htp_keeps_its_form_and_knows_its_error(d1: int, k: int, d2: int, s: float, iterations: int) -> None:
    target = structured(d1, d2, seed=26)
    solution = mod_htp(Problem(target), k, s, SolverOptions(iterations=iterations))
    check_free(target, solution, k, round(s * d2))
    settled = [
        error
        for i, error in enumerate(solution.errors, start=1)
        if _scheduled(i / iterations, d2 * min(k, d1, d2), round(s * d2)) == round(s * d2)
    ]
    assert true_error(target, solution) <= 1.01 * min(settled) + 3e-4  # the early ones are known roughly


def test_mod_htp_error_lies_between_the_bound_of_rank_k_and_low_rank_of_the_same_size() -> None:
    target = structured(48, 120, seed=27)
    k, s = 24, 8
    error = true_error(target, mod_htp(Problem(target), k, s, SolverOptions(iterations=40)))
    singular = np.linalg.svd(target.double().numpy(), compute_uv=False)
    tails = np.sqrt((singular[::-1] ** 2).cumsum()[::-1] / (singular**2).sum())  # entry r: error of rank r
    rank = (48 * k + 120 * s) // (48 + 120)
    assert tails[k] < error < tails[rank]


@pytest.mark.parametrize(("k", "s"), [(16, 6), (30, 6)])
def test_mod_htp_of_a_tall_target_is_that_of_its_coordinates(k: int, s: int) -> None:
    """A = Q R with orthonormal Q: the best D for A is Q times the best for R."""
    triangle = structured(24, 24, seed=33)
    basis = torch.linalg.qr(structured(90, 24, seed=34).double()).Q
    tall = mod_htp(Problem((basis @ triangle.double()).float()), k, s, SolverOptions(iterations=20))
    small = mod_htp(Problem(triangle), k, s, SolverOptions(iterations=20))
    assert tall.dictionary.shape == (90, k)
    check_free((basis @ triangle.double()).float(), tall, k, s * 24)
    assert tall.errors[-1] == pytest.approx(small.errors[-1], rel=0.02)
    outside = tall.dictionary.double() - basis @ (basis.T @ tall.dictionary.double())
    assert float(outside.norm()) < 1e-5


@pytest.mark.parametrize("case", ["float64", "transposed", "strided"])
def test_mod_htp_takes_any_layout_and_precision(case: str) -> None:
    plain = structured(40, 60, seed=28)
    target = {
        "float64": lambda: plain.double(),
        "transposed": lambda: plain.T.contiguous().T,
        "strided": lambda: torch.stack([plain, plain], dim=2)[:, :, 0],
    }[case]()
    solution = mod_htp(Problem(target), 24, 8, SolverOptions(iterations=8))
    expected = mod_htp(Problem(plain), 24, 8, SolverOptions(iterations=8))
    assert solution.dictionary.dtype == solution.coefficients.dtype == target.dtype
    torch.testing.assert_close(solution.dictionary.float(), expected.dictionary, rtol=1e-4, atol=1e-4)
    assert torch.equal(solution.support, expected.support)


@pytest.mark.parametrize("widths", [(64, 16, 16), (61, 17, 19), (5, 3, 90), (48, 48)])
@pytest.mark.parametrize("rho", [1.3, 2.0, 4.0])
def test_mod_htp_members_fill_their_bytes(widths: tuple[int, ...], rho: float) -> None:
    target = structured(40, sum(widths), seed=29)
    k, nonzeros = accounting.free_size(accounting.byte_budget(0.3, 40, widths), FORM, 40, widths, rho)
    assert nonzeros % 4 == 0
    problem = Problem(target, members=widths)
    solution = mod_htp(problem, k, nonzeros / sum(widths), SolverOptions(iterations=6))
    check_free(target, solution, k, nonzeros)
    assert solution.support is not None
    counts = [int(part.sum()) for part in torch.split(solution.support, widths, dim=1)]
    assert all(count % 4 == 0 for count in counts)
    stored = 2 * 40 * k + sum(w * -(-k // 8) + -(-count * 14 // 8) for w, count in zip(widths, counts, strict=True))
    assert stored == FORM.nbytes(40, widths, k, [nonzeros]).total


def test_mod_htp_members_differ_as_their_sizes_do() -> None:
    """A member of small weights gets fewer nonzeros, one of almost none gets none."""
    target = structured(40, 96, seed=30)
    target[:, 64:80] *= 0.3
    target[:, 80:] *= 1e-5
    solution = mod_htp(Problem(target, members=(64, 16, 16)), 24, 6, SolverOptions(iterations=12))
    check_free(target, solution, 24, 6 * 96)
    assert solution.support is not None
    first, second, third = (float(part.float().sum(0).mean()) for part in solution.support.split([64, 16, 16], dim=1))
    assert first > second > third == 0


@pytest.mark.parametrize("members", [(), (48, 16, 16)])
@pytest.mark.parametrize("iterations", [1, 6])
@pytest.mark.parametrize("d1", [32, 120])
def test_mod_htp_is_never_worse_than_its_start(d1: int, members: tuple[int, ...], iterations: int) -> None:
    target = structured(d1, 80, seed=31)
    problem, k, s = Problem(target, members=members), 20, 8
    own = mod_htp(problem, k, s, SolverOptions(iterations=60))
    other = ksvd(problem, k, s, SolverOptions(iterations=20))
    for start in (own, other):
        kept = start.coefficients.clone()
        solution = mod_htp(problem, k, s, SolverOptions(iterations=iterations, start=start))
        assert true_error(target, solution) <= true_error(target, start) * (1 + 1e-6)
        check_form(solution, d1, k, 80, s, free=True)
        assert torch.equal(start.coefficients, kept)


@pytest.mark.parametrize("shape", [(40, 60), (90, 24)])
def test_mod_htp_goes_on_in_any_precision(shape: tuple[int, int]) -> None:
    target = structured(*shape, seed=36)
    starts = [mod_htp(Problem(one), 12, 5, SolverOptions(iterations=6)) for one in (target, target.double())]
    for start in starts:
        for one in (target, target.double()):
            solution = mod_htp(Problem(one), 12, 5, SolverOptions(iterations=2, start=start))
            assert solution.dictionary.dtype == solution.coefficients.dtype == one.dtype
            assert true_error(target, solution) <= true_error(target, start) * (1 + 1e-5)


def test_solves_in_threads_leave_the_precision_of_products_alone() -> None:
    target = structured(30, 60, seed=37)
    expected = mod_htp(Problem(target), 12, 5, SolverOptions(iterations=6))
    before = torch.get_float32_matmul_precision()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: mod_htp(Problem(target), 12, 5, SolverOptions(iterations=6)), range(12)))
    assert torch.get_float32_matmul_precision() == before
    assert all(torch.equal(one.coefficients, expected.coefficients) for one in found)


def test_a_precision_that_was_set_for_one_backend_stays() -> None:
    backend = torch.backends.mkldnn.matmul
    if not hasattr(backend, "fp32_precision"):
        pytest.skip("this torch has one precision for all backends")
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        solution = mod_htp(Problem(structured(30, 60, seed=38)), 12, 5, SolverOptions(iterations=4))
        assert backend.fp32_precision == "bf16"
    finally:
        backend.fp32_precision = before
    check_form(solution, 30, 12, 60, 5, free=True)


def test_mod_htp_start_with_more_nonzeros_or_uneven_members() -> None:
    """Such a start is no solution: what comes back has the asked form all the same."""
    target = structured(32, 80, seed=32)
    dense = SOLVERS["svd"].solve(Problem(target), 20, 0, SolverOptions())
    uneven = ksvd(Problem(target), 20, 8, SolverOptions(iterations=4))
    for start, members in ((dense, ()), (dense, (48, 32)), (uneven, (47, 33)), (uneven, (27, 27, 26))):
        options = SolverOptions(iterations=2, start=start)
        solution = mod_htp(Problem(target, members=members), 20, 6.35, options)
        check_free(target, solution, 20, 508)
        assert solution.support is not None
        assert all(int(part.sum()) % 4 == 0 for part in torch.split(solution.support, members or (80,), dim=1))


def test_mod_htp_stops_by_tolerance_with_an_exact_error() -> None:
    target = structured(40, 80, seed=33)
    full = mod_htp(Problem(target), 24, 8, SolverOptions(iterations=60))
    early = mod_htp(Problem(target), 24, 8, SolverOptions(iterations=60, tolerance=0.01))
    assert 0.5 * 60 < len(early.errors) < len(full.errors) == 60
    assert true_error(target, early) == pytest.approx(early.errors[-1], rel=1e-4)
    assert true_error(target, full) <= true_error(target, early) < 1.1 * true_error(target, full)


@pytest.mark.parametrize(
    ("d1", "k", "d2", "members"), [(40, 24, 80, ()), (40, 24, 80, (60, 20)), (20, 50, 60, ()), (64, 520, 530, ())]
)
def test_mod_htp_is_deterministic_to_the_bit(d1: int, k: int, d2: int, members: tuple[int, ...]) -> None:
    target = structured(d1, d2, seed=34)
    problem = Problem(target, members=members)
    first, second = (mod_htp(problem, k, 7.25, SolverOptions(iterations=6)) for _ in range(2))
    assert torch.equal(first.dictionary, second.dictionary)
    assert torch.equal(first.coefficients, second.coefficients)
    assert torch.equal(first.support, second.support)
    assert first.errors == second.errors


@pytest.mark.parametrize(("rank", "k"), [(5, 12), (5, 60), (1, 7)])
def test_mod_htp_takes_targets_of_low_rank(rank: int, k: int) -> None:
    generator = torch.Generator().manual_seed(35)
    target = torch.randn(48, rank, generator=generator) @ torch.randn(rank, 90, generator=generator)
    s = min(k, rank + 1)
    solution = mod_htp(Problem(target), k, s, SolverOptions(iterations=60))
    check_free(target, solution, k, s * 90)
    assert true_error(target, solution) < (5e-3 if k < 48 else 0.05)


@pytest.mark.parametrize("case", ["repeated columns", "constant", "one column of many", "few entries", "tiny", "huge"])
def test_mod_htp_takes_awkward_targets(case: str) -> None:
    plain = structured(24, 60, seed=36)
    target = {
        "repeated columns": plain[:, :4].repeat(1, 15),
        "constant": torch.ones(24, 60),
        "one column of many": plain * (torch.arange(60) == 7),
        "few entries": plain * (torch.arange(24)[:, None] % 12 == 3),
        "tiny": plain * 1e-35,
        "huge": plain * 1e35,
    }[case]
    solution = mod_htp(Problem(target), 12, 3, SolverOptions(iterations=12))
    check_free(target, solution, 12, 180)
    if case in ("tiny", "huge"):
        expected = true_error(plain, mod_htp(Problem(plain), 12, 3, SolverOptions(iterations=12)))
        assert true_error(target, solution) == pytest.approx(expected, rel=0.01)
    else:
        assert true_error(target, solution) < 0.01


@pytest.mark.parametrize(
    ("d1", "k", "d2", "s"), [(48, 24, 96, 12), (48, 30, 40, 12), (80, 24, 48, 10), (32, 26, 120, 8)]
)
def test_mod_htp_reaches_ksvd(d1: int, k: int, d2: int, s: int) -> None:
    for seed in range(3):
        target = structured(d1, d2, seed=40 + seed)
        theirs = true_error(target, ksvd(Problem(target), k, s, SolverOptions(iterations=60)))
        ours = true_error(target, mod_htp(Problem(target), k, s, SolverOptions(iterations=60)))
        assert ours <= theirs


def test_mod_htp_errors_only_come_from_the_schedule() -> None:
    """Nonzeros fall from all of them to what was asked, and stay there for the rest."""
    counts = [_scheduled(i / 20, 1000, 300) for i in range(1, 21)]
    assert all(after <= before for before, after in pairwise(counts))
    assert counts[0] == 300 + round(700 * (1 - 0.05 / DESCENT) ** 3)
    assert counts[int(DESCENT * 20) - 1 :] == [300] * (21 - int(DESCENT * 20))


floats = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9),
    elements=st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, 1e-45, -1e-45, 3e-41, 1e-38, 3.4e38, -3.4e38]),
        st.floats(-4, 4, width=32),
    ),
)


@given(floats, st.data())
def test_keep_largest_entries_agrees_with_a_stable_sort(values: np.ndarray, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, len(values)))
    first = data.draw(st.integers(0, len(values) - 1))
    span = slice(first, len(values))
    part = values[span]
    n = data.draw(
        st.one_of(st.integers(0, part.size), st.sampled_from([0, 1, part.size - 1, part.size, part.size + 3]))
    )
    kept = np.argsort(-np.abs(part).ravel(), kind="stable")[:n]
    expected = values.copy()
    mask = np.zeros(part.size, dtype=bool)
    mask[kept] = True
    expected[span] = np.where(mask.reshape(part.shape), part, 0)
    matrix = torch.from_numpy(values.copy())
    keep_largest_entries(matrix, n, row_blocks(span, rows))
    np.testing.assert_array_equal(matrix.numpy(), expected)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(1, 9),
    st.floats(0, 1),
    st.sampled_from([0, 1, 3]),
    st.integers(0, 99),
)
def test_portions_sum_up_and_follow_the_largest(
    widths: list[int], k: int, density: float, zeroed: int, seed: int
) -> None:
    codes = torch.randn(sum(widths), k, generator=torch.Generator().manual_seed(seed))
    codes[: zeroed * widths[0]] = 0
    nonzeros = int(density * codes.numel())
    portions = member_portions(codes, nonzeros, widths, row_blocks(slice(0, len(codes)), 2))
    assert sum(portions) == nonzeros
    assert all(0 <= share <= width * k for share, width in zip(portions, widths, strict=True))
    if nonzeros % 4 == 0 and nonzeros <= sum(width * k // 4 * 4 for width in widths):
        assert len(widths) == 1 or all(share % 4 == 0 for share in portions)
    if zeroed == 0:
        owner = np.repeat(np.arange(len(widths)), np.array(widths) * k)
        largest = owner[np.argsort(-np.abs(codes.numpy()).ravel(), kind="stable")[:nonzeros]]
        counts = np.bincount(largest, minlength=len(widths))
        assert np.abs(np.array(portions) - counts).max() < 4 * len(widths)


def test_gradient_step_agrees_with_numpy() -> None:
    """Twice the best step of each column: the error of a column stays what it was."""
    dictionary, target = random_problem(20, 14, 30, seed=37)
    codes = torch.randn(30, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gram = (dictionary.T @ dictionary).numpy()
    expected = codes.numpy().copy()
    for j, column in enumerate(target.numpy().T):
        gradient = dictionary.numpy().T @ (column - dictionary.numpy() @ expected[j])
        expected[j] += OVERSHOOT * (gradient @ gradient) / (gradient @ gram @ gradient) * gradient
    before = (target - dictionary @ codes.T).norm(dim=0)
    coherence = dictionary.T @ dictionary - torch.eye(14, dtype=torch.float64)
    _gradient_step(codes, target.T @ dictionary, coherence)
    np.testing.assert_allclose(codes.numpy(), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close((target - dictionary @ codes.T).norm(dim=0), before)


def test_fit_codes_takes_the_best_step_and_many_reach_least_squares() -> None:
    dictionary, target = random_problem(20, 14, 30, seed=38)
    _, support = code(target, leading_directions(target, 14), 4)
    codes = torch.randn(14, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * support
    once, solved = codes.numpy().copy(), codes.numpy().copy()
    for j, column in enumerate(target.numpy().T):
        chosen = np.flatnonzero(support[:, j].numpy())
        atoms = dictionary.numpy()[:, chosen]
        gradient = atoms.T @ (column - atoms @ once[chosen, j])
        once[chosen, j] += (gradient @ gradient) / np.linalg.norm(atoms @ gradient) ** 2 * gradient
        solved[chosen, j] = np.linalg.lstsq(atoms, column, rcond=None)[0]
    coherence = dictionary.T @ dictionary - torch.eye(14, dtype=torch.float64)
    ours = codes.T.contiguous()
    _fit_codes(ours, target.T @ dictionary, coherence)
    np.testing.assert_allclose(ours.numpy().T, once, rtol=1e-8, atol=1e-9)
    for _ in range(300):
        _fit_codes(ours, target.T @ dictionary, coherence)
    np.testing.assert_allclose(ours.numpy().T, solved, rtol=1e-8, atol=1e-9)


def test_fit_dictionary_is_least_squares_and_knows_the_distance() -> None:
    _, target = random_problem(20, 2, 60, seed=39)
    codes = torch.randn(60, 12, generator=torch.Generator().manual_seed(3))
    codes *= torch.rand(60, 12, generator=torch.Generator().manual_seed(4)) < 0.4
    codes[:, 5] = 0
    codes[:, 6] *= 1e6
    unused = torch.randn(12, 20, generator=torch.Generator().manual_seed(5))
    columns = target.T.float()
    atoms, distance = _fit_dictionary(codes.T @ codes, codes.T @ columns, unused, float(columns.norm()))
    expected, *_ = np.linalg.lstsq(codes.double().numpy(), columns.double().numpy(), rcond=None)
    product = codes.double().numpy() @ atoms.double().numpy()
    np.testing.assert_allclose(product, codes.double().numpy() @ expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(atoms[5], unused[5])
    assert distance == pytest.approx(np.linalg.norm(columns.double().numpy() - product), rel=1e-4)


def test_fit_dictionary_where_atoms_are_tied() -> None:
    """Two rows of S that are the same, and one that is their multiple: the fit is as good as without the copies."""
    _, target = random_problem(20, 2, 60, seed=40)
    codes = torch.randn(60, 8, generator=torch.Generator().manual_seed(6))
    tied = torch.cat([codes, codes[:, :1], -3 * codes[:, 1:2]], dim=1)
    columns = target.T.float()
    atoms, distance = _fit_dictionary(tied.T @ tied, tied.T @ columns, torch.zeros(10, 20), float(columns.norm()))
    expected, *_ = np.linalg.lstsq(codes.double().numpy(), columns.double().numpy(), rcond=None)
    best = np.linalg.norm(columns.double().numpy() - codes.double().numpy() @ expected)
    assert float((columns.double() - tied.double() @ atoms.double()).norm()) == pytest.approx(best, rel=1e-3)
    assert distance == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("k", [511, 512, 515, 1030])
def test_self_product_is_a_plain_product(k: int) -> None:
    codes = torch.randn(30, k, generator=torch.Generator().manual_seed(k))
    outer = self_product(codes)
    expected = codes.double().numpy().T @ codes.double().numpy()
    np.testing.assert_allclose(outer.numpy(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(outer, outer.T)


def test_mod_htp_restores_the_precision_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[str] = []

    def fail(*_args: object) -> None:
        inside.append(torch.get_float32_matmul_precision())
        raise RuntimeError("stop here")

    problem = Problem(structured(12, 20, seed=41))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        mod_htp(problem, 6, 2, SolverOptions(iterations=5))
        assert torch.get_float32_matmul_precision() == "highest"
        with pytest.raises(RuntimeError, match="stop here"):
            mod_htp(problem, 6, 2, SolverOptions(iterations=5, on_iteration=fail))
        assert torch.get_float32_matmul_precision() == "highest"
        monkeypatch.setitem(mod_htp.__globals__, "_fit_dictionary", fail)
        for iterations in (5, 1):
            with pytest.raises(RuntimeError, match="stop here"):
                mod_htp(problem, 6, 2, SolverOptions(iterations=iterations))
            assert torch.get_float32_matmul_precision() == "highest"
        assert inside == ["highest", rough_products(torch.device("cpu")), "highest"]
    finally:
        torch.set_float32_matmul_precision(before)
