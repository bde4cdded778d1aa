"""The default solver against brute force, dense least squares in the Kronecker metric, and what ranks by one rule."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from cospadi.solvers import Factorization, MetricProblem, SolverOptions
from cospadi.solvers.alps import alps
from cospadi.solvers.htp import htp, scheduled
from cospadi.solvers.magnitude import magnitude, wanda
from cospadi.solvers.sparsegpt import sparsegpt
from cospadi.solvers.support import member_spans

Array = NDArray[np.float64]
OPTIONS = SolverOptions(iterations=30)


def correlated(width: int, generator: torch.Generator, tokens: int = 0) -> Tensor:
    """A Gram matrix (width, width) of features that depend on each other and differ in size."""
    mix = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    features = torch.randn(tokens or 8 * width, width, generator=generator) @ mix * torch.logspace(-0.5, 0.5, width)
    return features.T @ features / len(features)


def layer(d1: int, members: tuple[int, ...], seed: int = 0, gammas: str = "full", tokens: int = 0) -> MetricProblem:
    """Random weights; a Gram of inputs; Gamma none, diagonal or full of each member."""
    generator = torch.Generator().manual_seed(seed)
    gram = correlated(d1, generator, tokens)
    outputs = [correlated(width, generator, tokens) for width in members]
    if gammas == "diagonal":
        outputs = [gamma.diagonal().clone() for gamma in outputs]
    weight = torch.randn(d1, sum(members), generator=generator)
    return MetricProblem(weight, gram, () if gammas == "none" else tuple(outputs), members)


def kronecker(problem: MetricProblem) -> Array:
    """H (d1 d2, d1 d2) with vec(E)^T H vec(E) = tr(Gamma E^T G E), columns of E one after the other."""
    d1, d2 = problem.weight.shape
    gram = np.eye(d1) if problem.gram is None else problem.gram.double().numpy()
    gamma, start = np.zeros((d2, d2)), 0
    for block in problem.outputs:
        width = len(block)
        gamma[start : start + width, start : start + width] = (block.diag() if block.ndim == 1 else block).double()
        start += width
    return np.kron(gamma if problem.outputs else np.eye(d2), gram)


def vec(matrix: Tensor) -> Array:
    flat: Array = matrix.double().numpy().flatten(order="F")
    return flat


def cost(problem: MetricProblem, coefficients: Tensor) -> float:
    error = vec(problem.weight) - vec(coefficients)
    return float(error @ kronecker(problem) @ error)


def best_on(problem: MetricProblem, support: NDArray[np.bool_]) -> float:
    """The least cost of all values on a support, by numpy's least squares; `support` is flat as `vec` has it."""
    values, vectors = np.linalg.eigh(kronecker(problem))
    root = np.sqrt(values.clip(min=0))[:, None] * vectors.T
    target = root @ vec(problem.weight)
    found = np.linalg.lstsq(root[:, support], target, rcond=None)[0]
    return float(np.sum((target - root[:, support] @ found) ** 2))


def check(problem: MetricProblem, nonzeros: int, solution: Factorization) -> None:
    """Exact counts, multiples of four a member, nothing off the support, finite, errors as they are defined."""
    assert solution.dictionary is None
    assert solution.support is not None
    assert solution.support.shape == solution.coefficients.shape == problem.weight.shape
    assert int(solution.support.sum()) == nonzeros
    if nonzeros % 4 == 0 and len(problem.members) > 1:
        assert all(int(solution.support[:, span].sum()) % 4 == 0 for span in member_spans(problem.members))
    assert not solution.coefficients[~solution.support].any()
    assert torch.isfinite(solution.coefficients).all()
    assert len(solution.errors) == OPTIONS.iterations
    whole = cost(problem, torch.zeros_like(problem.weight))
    if whole > 0:
        assert solution.errors[-1] == pytest.approx((cost(problem, solution.coefficients) / whole) ** 0.5, abs=2e-3)


@pytest.mark.parametrize("gammas", ["none", "diagonal", "full"])
@pytest.mark.parametrize("nonzeros", [3, 5, 8])
def test_near_the_best_of_all_supports(nonzeros: int, gammas: str) -> None:
    """Of 4 x 3 problems: optimal in many, and near on average, as fractions of what it costs to drop all."""
    gaps = []
    for seed in range(24):
        problem = layer(4, (3,), seed, gammas)
        metric, target = kronecker(problem), vec(problem.weight)
        supports = np.array(list(combinations(range(12), nonzeros)))
        gradient = (metric @ target)[supports]
        values = np.linalg.solve(metric[supports[:, :, None], supports[:, None, :]], gradient[:, :, None])[:, :, 0]
        whole = float(target @ metric @ target)
        best = whole - float((gradient * values).sum(1).max())
        solution = htp(problem, nonzeros, OPTIONS)
        check(problem, nonzeros, solution)
        gaps.append((cost(problem, solution.coefficients) - best) / whole)
    assert min(gaps) >= -1e-6
    assert sum(gap < 1e-5 for gap in gaps) >= 8, gaps
    assert np.median(gaps) < 0.003, gaps
    assert np.mean(gaps) < {3: 0.02, 5: 0.006, 8: 0.001}[nonzeros], gaps


@pytest.mark.parametrize("gammas", ["none", "diagonal", "full"])
@pytest.mark.parametrize("members", [(14,), (9, 6)])
def test_values_are_nearly_the_best_of_their_own_support(members: tuple[int, ...], gammas: str) -> None:
    for seed in range(3):
        problem = layer(16, members, seed, gammas)
        nonzeros = 4 * (16 * sum(members) // 10)
        solution = htp(problem, nonzeros, OPTIONS)
        check(problem, nonzeros, solution)
        assert solution.support is not None
        least = best_on(problem, vec(solution.support).astype(bool))
        assert least <= cost(problem, solution.coefficients) * (1 + 1e-4)
        assert cost(problem, solution.coefficients) <= 1.02 * least


@pytest.mark.parametrize("gammas", ["none", "diagonal", "full"])
def test_better_than_rules_and_solvers_that_know_less(gammas: str) -> None:
    """Magnitude, Wanda; and where gradients tell what outputs are worth, SparseGPT and ALPS, which do not ask."""
    for seed in range(3):
        problem = layer(32, (24, 12), seed, gammas)
        nonzeros = 576
        ours = cost(problem, htp(problem, nonzeros, OPTIONS).coefficients)
        solvers = (magnitude, wanda) if gammas == "none" else (magnitude, wanda, sparsegpt, alps)
        others = [cost(problem, solve(problem, nonzeros, OPTIONS).coefficients) for solve in solvers]
        assert ours < 0.6 * min(others[:2])
        assert ours < 0.95 * min(others)


def test_gradients_both_ways_are_worth_more_than_their_diagonal() -> None:
    problem = layer(24, (20,))
    diagonal = MetricProblem(problem.weight, problem.gram, (problem.outputs[0].diagonal(),), problem.members)
    plain = MetricProblem(problem.weight, problem.gram, (), problem.members)
    found = [cost(problem, htp(known, 200, OPTIONS).coefficients) for known in (problem, diagonal, plain)]
    assert found[0] < 0.97 * found[1] < found[2]


def test_a_diagonal_gamma_is_a_full_one_that_is_diagonal() -> None:
    problem = layer(20, (16, 8), gammas="diagonal")
    full = MetricProblem(problem.weight, problem.gram, tuple(map(torch.diag, problem.outputs)), problem.members)
    assert_alike(problem, full, 240)


def test_blocks_of_gamma_need_not_be_those_of_the_members() -> None:
    """A wide projection comes in blocks: what lies between them is zero."""
    problem = layer(12, (8, 8))
    pieces = [problem.outputs[0][:5, :5], problem.outputs[0][5:, 5:], problem.outputs[1]]
    whole = torch.block_diag(*pieces)
    split = MetricProblem(problem.weight, problem.gram, tuple(pieces), problem.members)
    one = MetricProblem(problem.weight, problem.gram, (whole,), problem.members)
    assert_alike(split, one, 96)


def assert_alike(problem: MetricProblem, same: MetricProblem, nonzeros: int) -> None:
    """The same error, told in two ways, leads to much the same S: step lengths are shared by other columns."""
    found = [htp(told, nonzeros, OPTIONS) for told in (problem, same)]
    costs = [cost(problem, solution.coefficients) for solution in found]
    assert costs[0] == pytest.approx(costs[1], rel=0.05)
    supports = [solution.support for solution in found]
    assert supports[0] is not None
    assert supports[1] is not None
    assert int((supports[0] & supports[1]).sum()) >= 0.9 * nonzeros


@pytest.mark.parametrize("gammas", ["none", "diagonal", "full"])
@pytest.mark.parametrize(
    "what", ["dead inputs", "few tokens", "zero gram", "no gram", "zero weight", "dead outputs", "huge", "tiny"]
)
def test_metrics_that_are_singular_or_extreme(what: str, gammas: str) -> None:
    problem = layer(12, (8, 5), 1, gammas, tokens=4 if what == "few tokens" else 0)
    weight, gram, outputs = problem.weight, problem.gram, problem.outputs
    assert gram is not None
    if what == "dead inputs":
        gram[[2, 7]] = 0
        gram[:, [2, 7]] = 0
    elif what == "zero gram":
        gram = torch.zeros_like(gram)
    elif what == "zero weight":
        weight = torch.zeros_like(weight)
    elif what == "dead outputs" and outputs:
        outputs[0][3] = 0
        if gammas == "full":
            outputs[0][:, 3] = 0
    elif what in ("huge", "tiny"):
        gram, weight = gram * (1e12 if what == "huge" else 1e-12), weight * (1e4 if what == "huge" else 1e-6)
    problem = MetricProblem(weight, None if what == "no gram" else gram, outputs, problem.members)
    solution = htp(problem, 80, OPTIONS)
    assert solution.support is not None
    assert int(solution.support.sum()) == 80
    assert torch.isfinite(solution.coefficients).all()
    assert np.isfinite(solution.errors).all()
    whole = cost(problem, torch.zeros_like(weight))
    assert cost(problem, solution.coefficients) <= 0.5 * whole
    if what == "dead inputs":  # what nobody reads is the first to go
        assert int(solution.support[[2, 7]].sum()) == 0


@pytest.mark.parametrize("gammas", ["none", "diagonal", "full"])
@pytest.mark.parametrize("tokens", [1, 2, 5, 9])
def test_fewer_tokens_than_inputs_and_more_nonzeros_than_that(tokens: int, gammas: str) -> None:
    """Columns are met exactly, and what follows must not follow rounding errors to infinity."""
    problem = layer(12, (8, 5), tokens, gammas, tokens=tokens)
    for iterations in (1, 5, 60):
        solution = htp(problem, 120, SolverOptions(iterations=iterations))
        assert solution.support is not None
        assert int(solution.support.sum()) == 120
        assert torch.isfinite(solution.coefficients).all()
        assert float(solution.coefficients.abs().max()) < 100 * float(problem.weight.abs().max())
        assert solution.errors[-1] < 0.1


def test_no_metric_is_magnitude() -> None:
    """With G = Gamma = I nothing is worth more than its square, and nothing makes up for anything."""
    weight = torch.randn(15, 11, generator=torch.Generator().manual_seed(3))
    problem = MetricProblem(weight, None, (), (11,))
    ours, theirs = htp(problem, 60, OPTIONS), magnitude(problem, 60, OPTIONS)
    assert ours.support is not None
    assert theirs.support is not None
    assert torch.equal(ours.support, theirs.support)
    torch.testing.assert_close(ours.coefficients, theirs.coefficients)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 20),
    st.lists(st.integers(1, 12), min_size=1, max_size=3),
    st.floats(0, 1),
    st.sampled_from(["none", "diagonal", "full"]),
    st.integers(0, 2**16),
)
def test_counts_are_exact_at_any_size(d1: int, members: list[int], share: float, gammas: str, seed: int) -> None:
    problem = layer(d1, tuple(members), seed, gammas)
    nonzeros = max(1, round(share * d1 * sum(members)))
    solution = htp(problem, nonzeros, SolverOptions(iterations=6))
    assert solution.support is not None
    assert int(solution.support.sum()) == nonzeros
    room = sum(d1 * width // 4 * 4 for width in members)
    if nonzeros % 4 == 0 and nonzeros <= room and len(members) > 1:
        assert all(int(solution.support[:, span].sum()) % 4 == 0 for span in member_spans(members))
    assert not solution.coefficients[~solution.support].any()
    if nonzeros == d1 * sum(members):
        torch.testing.assert_close(solution.coefficients, problem.weight, rtol=1e-3, atol=1e-3)


def test_equal_runs_are_equal_and_the_problem_stays_as_it_was() -> None:
    problem = layer(24, (16, 8))
    before = [problem.weight.clone(), *[gamma.clone() for gamma in problem.outputs]]
    first, second = htp(problem, 200, OPTIONS), htp(problem, 200, OPTIONS)
    assert torch.equal(first.coefficients, second.coefficients)
    assert first.errors == second.errors
    assert all(map(torch.equal, [problem.weight, *problem.outputs], before))


def test_progress_is_told_and_more_iterations_are_better() -> None:
    problem = layer(32, (24,))
    told: list[tuple[int, float]] = []
    few = htp(problem, 300, SolverOptions(iterations=3))
    many = htp(problem, 300, SolverOptions(iterations=40, on_iteration=lambda *what: told.append(what)))
    assert [iteration for iteration, _ in told] == list(range(1, 41))
    assert [error for _, error in told] == many.errors
    assert many.errors[-1] < few.errors[-1]


def test_the_schedule_falls_from_all_entries_to_the_asked_number() -> None:
    found = [scheduled(progress / 10, 1000, 300) for progress in range(14)]
    assert found[0] == 1000
    assert found == sorted(found, reverse=True)
    assert found[10:] == [300] * 4
    falls = [left - right for left, right in pairwise(found)]
    assert falls == sorted(falls, reverse=True)


@pytest.mark.parametrize("tied", [True, False])
def test_quick_products_do_as_well_where_inputs_share_nearly_all(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """G, and Gamma, of one direction but for a thousandth: rounded whole to bf16 they would lose the rest. On such
    problems one result may be a multiple of another by chance, hence the geometric mean of several."""
    gains = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        shared = torch.randn(400, 1, generator=generator)
        inputs, gradients = (shared + 0.03 * torch.randn(400, size, generator=generator) for size in (64, 48))
        gammas = (gradients.T @ gradients,) if tied else ()
        problem = MetricProblem(torch.randn(64, 48, generator=generator), inputs.T @ inputs, gammas, (48,))
        costs = {}
        for quick in (True, False):
            monkeypatch.setattr("cospadi.solvers.htp.bf16_is_fast", lambda _device, quick=quick: quick)
            costs[quick] = cost(problem, htp(problem, 1500, SolverOptions(iterations=20)).coefficients)
        gains.append(math.log(costs[True] / costs[False]))
    assert math.exp(sum(gains) / len(gains)) < 1.2
