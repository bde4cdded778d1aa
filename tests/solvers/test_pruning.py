"""Magnitude, Wanda, SparseGPT, ALPS and OATS against plain numpy written here from their papers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from flop_counts import counted
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cospadi.errors import UserError
from cospadi.solvers import Factorization, Flops, SolverOptions, magnitude, sparsegpt
from cospadi.solvers.alps import alps
from cospadi.solvers.alps import flops as alps_flops
from cospadi.solvers.gram import damped, damped_factor, gram_error
from cospadi.solvers.magnitude import flops as magnitude_flops
from cospadi.solvers.magnitude import wanda
from cospadi.solvers.oats import counted_bytes, oats, sizes
from cospadi.solvers.oats import flops as oats_flops
from cospadi.solvers.problem import MetricProblem
from cospadi.solvers.sparsegpt import flops as sparsegpt_flops
from cospadi.solvers.support import even_portions, largest_of_all, largest_of_each, member_spans

Array = NDArray[np.float64]
Solve = Callable[[MetricProblem, int, SolverOptions], Factorization]

PEERS: dict[str, Solve] = {
    "magnitude": magnitude.magnitude,
    "wanda": wanda,
    "sparsegpt": sparsegpt.sparsegpt,
    "alps": alps,
}
OPTIONS = SolverOptions(iterations=100)


def layer(d1: int, members: tuple[int, ...], seed: int = 0) -> MetricProblem:
    """Random weights, and inputs that depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d1, d1, generator=generator) / d1**0.5 + torch.eye(d1)
    inputs = torch.randn(8 * d1, d1, generator=generator) @ mix * torch.logspace(-1, 1, d1)
    return MetricProblem(torch.randn(d1, sum(members), generator=generator), inputs.T @ inputs, (), members)


def cost(gram: Array, difference: Array) -> float:
    return float(np.sum(difference * (gram @ difference)))


def with_damping(gram: torch.Tensor) -> Array:
    matrix = gram.double().numpy()
    return matrix + 0.01 * np.trace(matrix) / len(matrix) * np.eye(len(matrix))


def least_squares(gram: Array, weight: Array, support: NDArray[np.bool_]) -> Array:
    """The best values on a support, by numpy's lstsq of every column."""
    root = np.linalg.cholesky(gram).T
    best = np.zeros_like(weight)
    for j, rows in enumerate(support.T):
        best[rows, j] = np.linalg.lstsq(root[:, rows], root @ weight[:, j], rcond=None)[0]
    return best


@pytest.mark.parametrize("values", ["different", "tied"])
def test_magnitude_is_a_sort(values: str) -> None:
    problem = layer(13, (7, 5))
    if values == "tied":
        problem = MetricProblem(problem.weight.round(), problem.gram, (), problem.members)
    solution = magnitude.magnitude(problem, 84, OPTIONS)
    expected = np.zeros((12, 13), bool)  # an output in a row
    for span, portion in zip(member_spans((7, 5)), (48, 36), strict=True):
        rows = problem.weight.T[span].numpy()
        kept = np.zeros(rows.size, bool)
        kept[np.argsort(-np.abs(rows), axis=None, kind="stable")[:portion]] = True
        expected[span] = kept.reshape(rows.shape)
    np.testing.assert_array_equal(solution.support, expected.T)
    np.testing.assert_array_equal(solution.coefficients, np.where(expected.T, problem.weight, 0))


@pytest.mark.parametrize("nonzeros", [0, 12, 60, 61, 150, 156])
def test_wanda_sorts_within_each_output(nonzeros: int) -> None:
    problem = layer(13, (12,))
    scores = np.abs(problem.weight.double().numpy()) * np.sqrt(np.diagonal(problem.gram.double().numpy()))[:, None]
    each, rest = divmod(nonzeros, 12)
    ranked = [sorted(range(13), key=lambda i, j=j: -scores[i, j]) for j in range(12)]
    expected = np.zeros((13, 12), bool)
    for j, order in enumerate(ranked):
        expected[order[:each], j] = True
    if rest:
        for j in sorted(range(12), key=lambda j: -scores[ranked[j][each], j])[:rest]:
            expected[ranked[j][each], j] = True
    solution = wanda(problem, nonzeros, OPTIONS)
    np.testing.assert_array_equal(solution.support, expected)
    np.testing.assert_array_equal(solution.coefficients, np.where(expected, problem.weight, 0))


def naive_sparsegpt(weight: Array, gram: Array, nonzeros: int, block: int) -> tuple[Array, NDArray[np.bool_]]:
    """Input by input, each with the inverse of what is left of G computed anew; all later weights follow at once."""
    weight, kept = weight.copy(), np.zeros(weight.shape, bool)
    d1 = len(weight)
    inverses = [np.linalg.inv(gram[i:, i:]) for i in range(d1)]
    for start in range(0, d1, block):
        rows = range(start, min(start + block, d1))
        costs = np.array([weight[i] ** 2 / inverses[i][0, 0] for i in rows])
        count = nonzeros * rows.stop // d1 - nonzeros * start // d1
        mask = np.zeros(costs.size, bool)
        mask[np.argsort(-costs, axis=None)[:count]] = True
        kept[start : rows.stop] = mask.reshape(costs.shape)
        for i in rows:
            for j in np.flatnonzero(~kept[i]):
                weight[i:, j] -= weight[i, j] / inverses[i][0, 0] * inverses[i][0]
    return np.where(kept, weight, 0), kept


@pytest.mark.parametrize("block", [6, 8, 128])
@pytest.mark.parametrize("nonzeros", [100, 190, 323])
def test_sparsegpt_is_a_loop_over_inputs(block: int, nonzeros: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsegpt, "BLOCK", block)
    problem = layer(20, (10, 9))
    solution = sparsegpt.sparsegpt(problem, nonzeros, OPTIONS)
    spans, portions = member_spans((10, 9)), even_portions(nonzeros, (10, 9), 20)
    for span, portion in zip(spans, portions, strict=True):
        weight = problem.weight[:, span].double().numpy()
        expected, kept = naive_sparsegpt(weight, with_damping(problem.gram), portion, block)
        np.testing.assert_array_equal(solution.support[:, span], kept)
        np.testing.assert_allclose(solution.coefficients[:, span], expected, atol=1e-4)


def naive_alps(weight: Array, gram: Array, nonzeros: int, iterations: int) -> tuple[NDArray[np.bool_], int]:
    """ADMM as in the paper, with a fall of the first rho as in the authors' code: its last support, its iterations."""
    scale = np.sqrt(np.diagonal(gram))
    hessian, target = gram / np.outer(scale, scale), weight * scale[:, None]

    def largest(matrix: Array) -> Array:
        least = np.sort(np.abs(matrix), axis=None)[-nonzeros]
        return np.where(np.abs(matrix) >= least, matrix, 0)

    codes, dual, rho, begun = largest(target), np.zeros_like(target), 0.1, False
    before = codes != 0
    for iteration in range(1, iterations + 1):
        dense = np.linalg.solve(hessian + rho * np.eye(len(hessian)), hessian @ target - dual + rho * codes)
        codes = largest(dense + dual / rho)
        dual = dual + rho * (dense - codes)
        if iteration % 3:
            continue
        changed, before = np.sum(before != (codes != 0)), codes != 0
        if changed > 0.1 * nonzeros:
            begun, rho = True, rho * 1.3
        elif changed > 0.005 * nonzeros:
            begun, rho = True, rho * 1.2
        elif begun and changed:
            rho *= 1.1
        elif begun:
            break
        elif changed:
            rho, codes, dual = rho / 5, largest(target), np.zeros_like(target)
        else:
            rho /= 5
        if iteration > 30 and changed < 0.0003 * nonzeros:
            break
    return codes != 0, iteration


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("nonzeros", [64, 160, 236])
def test_alps_finds_the_support_of_a_plain_admm(nonzeros: int, seed: int) -> None:
    problem = layer(20, (16,), seed)
    expected, iterations = naive_alps(problem.weight.double().numpy(), with_damping(problem.gram), nonzeros, 100)
    solution = alps(problem, nonzeros, OPTIONS)
    np.testing.assert_array_equal(solution.support, expected)
    assert len(solution.errors) == iterations + 1


def test_alps_lowers_a_rho_that_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(768, 48, generator=generator)
    inputs = inputs @ (torch.eye(48) + torch.randn(48, 48, generator=generator) * 0.05)
    problem = MetricProblem(torch.randn(48, 64, generator=generator), inputs.T @ inputs, (), (64,))
    nonzeros = 2979
    expected, iterations = naive_alps(problem.weight.double().numpy(), with_damping(problem.gram), nonzeros, 100)
    solution = alps(problem, nonzeros, OPTIONS)
    np.testing.assert_array_equal(solution.support, expected)
    assert len(solution.errors) == iterations + 1


def test_alps_ends_when_hardly_an_entry_changes() -> None:
    problem, nonzeros = layer(96, (160,)), 13824
    expected, iterations = naive_alps(problem.weight.double().numpy(), with_damping(problem.gram), nonzeros, 100)
    solution = alps(problem, nonzeros, OPTIONS)
    np.testing.assert_array_equal(solution.support, expected)
    assert len(solution.errors) == iterations + 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("density", [0.2, 0.5, 0.8])
def test_alps_has_the_best_values_and_a_better_support(density: float, seed: int) -> None:
    problem = layer(64, (32, 16), seed)
    nonzeros = round(density * 64 * 12) * 4
    weight, gram = problem.weight.double().numpy(), with_damping(problem.gram)
    solution = alps(problem, nonzeros, OPTIONS)
    reached = cost(gram, weight - solution.coefficients.double().numpy())
    best = cost(gram, weight - least_squares(gram, weight, solution.support.numpy()))
    assert reached == pytest.approx(best, rel=1e-6)
    for solve in (magnitude.magnitude, wanda, sparsegpt.sparsegpt):
        support = solve(problem, nonzeros, OPTIONS).support
        assert support is not None
        assert reached < cost(gram, weight - least_squares(gram, weight, support.numpy()))


def test_alps_comes_near_the_best_of_all_supports() -> None:
    reached, best = [], []
    for seed in range(8):
        problem = layer(6, (2,), seed)
        weight, gram = problem.weight.double().numpy(), with_damping(problem.gram)
        solution = alps(problem, 5, OPTIONS)
        reached.append(cost(gram, weight - solution.coefficients.double().numpy()))
        costs = []
        for chosen in combinations(range(12), 5):
            support = np.zeros(12, bool)
            support[list(chosen)] = True
            costs.append(cost(gram, weight - least_squares(gram, weight, support.reshape(6, 2))))
        best.append(min(costs))
        assert reached[-1] >= best[-1] * (1 - 1e-5)
    ratios = np.divide(reached, best)
    assert np.sum(ratios < 1.001) >= 7  # of eight
    assert ratios.max() < 2


def naive_oats(weight: Array, moments: Array, nonzeros: int, rank: int, iterations: int) -> tuple[Array, Array]:
    roots = np.sqrt(moments)[:, None]
    target, sparse = weight * roots, np.zeros_like(weight)
    low_rank = sparse
    each = nonzeros // weight.shape[1]
    for _ in range(iterations):
        left, values, right = np.linalg.svd(target - sparse, full_matrices=False)
        low_rank = left[:, :rank] * values[:rank] @ right[:rank]
        rest = target - low_rank
        sparse = np.zeros_like(rest)
        following = []
        for j, column in enumerate(rest.T):
            order = np.argsort(-np.abs(column))
            sparse[order[:each], j] = column[order[:each]]
            following.append((-np.abs(column[order[each]]), order[each], j))
        for _, i, j in sorted(following)[: nonzeros % weight.shape[1]]:
            sparse[i, j] = rest[i, j]
    return sparse / roots, low_rank / roots


@pytest.mark.parametrize(("d1", "members"), [(24, (32, 16)), (40, (12,)), (16, (16, 16, 24))])
def test_oats_is_a_loop_of_svd_and_sorting(d1: int, members: tuple[int, ...]) -> None:
    problem = layer(d1, members)
    nbytes = d1 * sum(members) * 10 // 8
    solution = oats(problem, nbytes, SolverOptions(iterations=10))
    used = 0
    for span, width, rank in zip(member_spans(members), members, solution.ranks, strict=True):
        nonzeros = int(solution.support[:, span].sum())
        sparse, low_rank = naive_oats(
            problem.weight[:, span].double().numpy(), np.diagonal(problem.gram.double()), nonzeros, rank, 10
        )
        assert rank > 0
        assert nonzeros > width
        np.testing.assert_array_equal(solution.support[:, span], sparse != 0)
        np.testing.assert_allclose(solution.coefficients[:, span], sparse, atol=1e-4)
        distance = np.linalg.norm(solution.low_rank[:, span].double().numpy() - low_rank)
        assert distance < 2**-8 * np.linalg.norm(low_rank)  # two factors in bf16, 8 bits each
        used += counted_bytes(d1, width, nonzeros, rank)
    assert solution.nbytes == used
    assert all(factor.dtype == torch.bfloat16 for pair in solution.factors for factor in pair)
    torch.testing.assert_close(solution.weight, solution.coefficients + solution.low_rank)
    assert solution.errors[-1] == gram_error(problem, solution.weight)


@given(
    st.integers(1, 64), st.lists(st.integers(1, 64), min_size=1, max_size=3), st.floats(0.125, 2.0), st.integers(0, 9)
)
def test_oats_fills_its_bytes(d1: int, widths: list[int], of_weights: float, more: int) -> None:
    members = tuple(widths)
    nbytes = round(of_weights * d1 * sum(members)) + len(members) + more
    for width in members:
        share = nbytes * width // sum(members)
        if share < -(-d1 * width // 8):
            with pytest.raises(UserError, match=r"mask of a \d+ x \d+ matrix. Give at least"):
                sizes(d1, width, share)
            continue
        nonzeros, rank = sizes(d1, width, share)
        used = counted_bytes(d1, width, nonzeros, rank)
        assert used <= share
        assert used > share - 2 or nonzeros == d1 * width
        assert 2 * rank * (d1 + width) <= 0.25 * share


def test_oats_reports_each_iteration_and_improves() -> None:
    seen: list[tuple[int, float]] = []
    options = SolverOptions(iterations=5, on_iteration=lambda *step: seen.append(step))
    solution = oats(layer(32, (24, 8)), 32 * 32 * 5 // 4, options)
    assert seen == list(enumerate(solution.errors[:5], 1))
    assert all(later <= earlier for earlier, later in zip(solution.errors[:4], solution.errors[1:5], strict=True))


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("members", [(24,), (9, 9, 6), (3, 20, 1), (1, 1)])
@pytest.mark.parametrize("density", [0.0, 0.03, 0.4, 0.77, 1.0])
def test_peers_keep_as_many_as_asked(name: str, members: tuple[int, ...], density: float) -> None:
    problem = layer(20, members)
    size = problem.weight.numel()
    for nonzeros in {round(density * size), round(density * size) // 4 * 4}:
        solution = PEERS[name](problem, nonzeros, OPTIONS)
        assert solution.dictionary is None
        assert solution.support is not None
        assert solution.support.dtype == torch.bool
        assert solution.coefficients.shape == solution.support.shape == problem.weight.shape
        assert solution.coefficients.dtype == torch.float32
        assert solution.coefficients.is_contiguous()
        assert int(solution.support.sum()) == nonzeros
        assert not solution.coefficients[~solution.support].any()
        counts = [int(part.sum()) for part in solution.support.split(members, dim=1)]
        if nonzeros % 4 == 0:
            assert all(count % 4 == 0 for count in counts)
        if nonzeros == size:
            torch.testing.assert_close(solution.coefficients, problem.weight)
            assert solution.errors[-1] < 1e-5
        assert solution.errors[-1] == gram_error(problem, solution.coefficients)


def test_peers_come_in_the_order_of_their_papers() -> None:
    problem = layer(96, (64,))
    errors = [solve(problem, 3072, OPTIONS).errors[-1] for solve in PEERS.values()]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[-2]


@pytest.mark.parametrize("name", PEERS)
def test_members_are_solved_as_if_alone(name: str) -> None:
    problem = layer(24, (16, 8))
    together = PEERS[name](problem, 288, OPTIONS)
    for span, portion in zip(member_spans((16, 8)), (192, 96), strict=True):
        width = span.stop - span.start
        alone = PEERS[name](MetricProblem(problem.weight[:, span], problem.gram, (), (width,)), portion, OPTIONS)
        if name != "alps":  # whose rho is that of the group
            torch.testing.assert_close(together.coefficients[:, span], alone.coefficients)
        assert int(together.support[:, span].sum()) == portion


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40])
def test_peers_do_not_depend_on_the_number_of_tokens(name: str, scale: float) -> None:
    problem = layer(24, (16,))
    scaled = MetricProblem(problem.weight, problem.gram * scale, (), (16,))
    expected, solution = (PEERS[name](each, 192, OPTIONS) for each in (problem, scaled))
    np.testing.assert_array_equal(solution.support, expected.support)
    torch.testing.assert_close(solution.coefficients, expected.coefficients)


@pytest.mark.parametrize("name", PEERS)
def test_peers_repeat_themselves_and_leave_the_problem_alone(name: str) -> None:
    problem = layer(40, (24,))
    weight, gram = problem.weight.clone(), problem.gram.clone()
    first, second = (PEERS[name](problem, 480, OPTIONS) for _ in range(2))
    assert torch.equal(first.coefficients, second.coefficients)
    assert torch.equal(problem.weight, weight)
    assert torch.equal(problem.gram, gram)


def singular_grams() -> dict[str, torch.Tensor]:
    few = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    dead = layer(20, (12,)).gram.clone()
    dead[[2, 11]] = 0
    dead[:, [2, 11]] = 0
    tied = torch.ones(20, 20) * 7.0
    rounded = tied - 5.0 * torch.eye(20)  # the smallest eigenvalue is -5, where a mean diagonal is 2
    return {"few tokens": few.T @ few, "dead inputs": dead, "tied": tied, "indefinite": rounded, "zero": dead * 0}


@pytest.mark.parametrize("name", [*PEERS, "oats"])
@pytest.mark.parametrize("kind", singular_grams())
def test_singular_grams(name: str, kind: str) -> None:
    gram = singular_grams()[kind]
    problem = MetricProblem(layer(20, (12,)).weight, gram, (), (12,))
    solution: Any = oats(problem, 300, OPTIONS) if name == "oats" else PEERS[name](problem, 120, OPTIONS)
    assert solution.coefficients.isfinite().all()
    assert np.isfinite(solution.errors).all()
    if name == "oats":
        assert solution.weight.isfinite().all()
        assert not solution.weight[gram.diagonal() == 0].any()
    else:
        assert int(solution.support.sum()) == 120
    if name in ("sparsegpt", "alps"):
        assert not solution.coefficients[gram.diagonal() == 0].any()


@pytest.mark.parametrize("kind", singular_grams())
def test_damped_grams_can_be_inverted(kind: str) -> None:
    gram = singular_grams()[kind]
    matrix, factor = damped(gram), damped_factor(gram)
    assert torch.equal(factor, factor.triu())
    np.testing.assert_allclose(factor.T @ factor, np.linalg.inv(matrix), rtol=1e-7, atol=1e-12)
    live = gram.diagonal() > 0
    if kind != "zero":
        added = matrix.diagonal()[live] - gram.double().diagonal()[live]
        mean = gram.double().diagonal()[live].mean()
        torch.testing.assert_close(added, ((10 if kind == "indefinite" else 0.01) * mean).expand(len(added)))
        assert torch.equal(matrix - matrix.diagonal().diag(), (gram - gram.diagonal().diag()).double())


@pytest.mark.parametrize("solve", [sparsegpt.sparsegpt, alps])
def test_grams_that_are_not_finite_are_refused(solve: Solve) -> None:
    problem = layer(8, (8,))
    problem.gram[3, 4] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        solve(problem, 32, OPTIONS)


@pytest.mark.parametrize("name", PEERS)
def test_without_a_gram_the_error_is_in_the_weights(name: str) -> None:
    problem = MetricProblem(layer(16, (12,)).weight, None, (), (12,))
    solution = PEERS[name](problem, 96, OPTIONS)
    kept = problem.weight * solution.support
    torch.testing.assert_close(solution.coefficients, kept)
    assert solution.errors[-1] == pytest.approx(float((problem.weight - kept).norm() / problem.weight.norm()))
    if name in ("magnitude", "alps"):
        assert torch.equal(solution.support, problem.weight.abs() >= problem.weight.abs().flatten().sort().values[-96])


def test_the_error_is_that_of_outputs() -> None:
    problem = layer(20, (12,))
    approximation = problem.weight.round()
    gram, weight = problem.gram.double().numpy(), problem.weight.double().numpy()
    expected = np.sqrt(cost(gram, weight - approximation.double().numpy()) / cost(gram, weight))
    assert gram_error(problem, approximation) == pytest.approx(expected, rel=1e-5)
    assert gram_error(problem, problem.weight) == 0
    assert gram_error(MetricProblem(torch.zeros(20, 12), problem.gram, (), (12,)), torch.zeros(20, 12)) == 0


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.integers(0, 2**31), st.booleans())
def test_largest_entries_agree_with_stable_sorts(d1: int, d2: int, density: float, seed: int, tied: bool) -> None:
    scores = torch.randn(d1, d2, generator=torch.Generator().manual_seed(seed)).abs()
    scores = scores.round() if tied else scores
    n = round(density * d1 * d2)
    ranks = np.argsort(np.argsort(-scores.numpy(), axis=None, kind="stable")).reshape(d1, d2)
    np.testing.assert_array_equal(largest_of_all(scores.clone(), n), ranks < n)
    support = largest_of_each(scores, n)
    assert int(support.sum()) == n
    counts = support.sum(0)
    assert int(counts.max() - counts.min()) <= 1
    for j in range(d2):
        kept = np.argsort(-scores[:, j].numpy(), kind="stable")[: counts[j]]
        assert set(kept) == set(np.flatnonzero(support[:, j]))
    if int(counts.max()) > int(counts.min()):
        following = -np.sort(-scores.numpy(), axis=0)[counts.min()]
        more = counts.numpy() > int(counts.min())
        assert following[more].min() >= following[~more].max()


@given(st.integers(1, 12), st.lists(st.integers(1, 12), min_size=1, max_size=4), st.floats(0, 1), st.booleans())
def test_even_portions(d1: int, members: list[int], density: float, whole: bool) -> None:
    nonzeros = round(density * d1 * sum(members))
    nonzeros = nonzeros // 4 * 4 if whole else nonzeros
    portions = even_portions(nonzeros, members, d1)
    assert sum(portions) == nonzeros
    assert all(0 <= portion <= d1 * width for portion, width in zip(portions, members, strict=True))
    if len(members) > 1 and nonzeros % 4 == 0 and nonzeros <= sum(d1 * width // 4 * 4 for width in members):
        assert all(portion % 4 == 0 for portion in portions)
    assert all(
        abs(portion - nonzeros * width / sum(members)) < 4 * len(members)
        for portion, width in zip(portions, members, strict=True)
    )


FLOPS: dict[str, Callable[[int, int, int, SolverOptions], Flops]] = {
    "magnitude": magnitude_flops,
    "wanda": magnitude_flops,
    "sparsegpt": sparsegpt_flops,
    "alps": alps_flops,
    "oats": oats_flops,
}


@pytest.mark.parametrize(("d1", "d2"), [(48, 80), (80, 48), (200, 32)])
@pytest.mark.parametrize("name", FLOPS)
def test_a_solve_costs_what_torch_counts(name: str, d1: int, d2: int) -> None:
    problem, options = layer(d1, (d2,)), SolverOptions(iterations=5)
    size = d1 * d2 if name == "oats" else d1 * d2 // 2
    solve: Any = oats if name == "oats" else PEERS[name]
    products, others = counted(lambda: solve(problem, size, options))
    expected = FLOPS[name](d1, d2, size, options)
    assert expected.products == pytest.approx(products, rel=0.02)
    assert expected.others == pytest.approx(others, rel=0.02)
