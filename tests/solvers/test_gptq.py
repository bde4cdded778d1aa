"""Rounding to nearest against its formula, and GPTQ against optimal brain quantization as in the textbook: input by
input, each with the inverse of what is left of the Hessian computed anew, in numpy and float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cospadi.errors import UserError
from cospadi.format.codecs.integers import INTEGERS
from cospadi.solvers import SOLVERS, Coded, IntegerCoder, MetricProblem, SolverOptions, gptq, rtn
from cospadi.stages.solve import integer_coder

Array = NDArray[np.float64]
OPTIONS = SolverOptions()


class Stored:
    """What a solver hands over, member by member: levels (d1, d2), scales and zeros (groups, d2), float64."""

    def __init__(self, bits: int, group: int) -> None:
        self.parts: list[tuple[Array, Array, Array]] = []
        self.coder = IntegerCoder(2**bits - 1, group, lambda scales: scales, self._keep)

    def _keep(self, *parts: torch.Tensor) -> torch.Tensor:
        levels, scales, zeros = (part.double().numpy() for part in parts)
        self.parts.append((levels, scales, zeros))
        return torch.zeros(1, dtype=torch.uint8)


def layer(d1: int, members: tuple[int, ...], seed: int = 0) -> MetricProblem:
    """Random weights, and inputs that depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d1, d1, generator=generator) / d1**0.5 + torch.eye(d1)
    sizes = torch.logspace(-1, 1, d1)[torch.randperm(d1, generator=generator)]
    inputs = torch.randn(8 * d1, d1, generator=generator) @ mix * sizes
    return MetricProblem(torch.randn(d1, sum(members), generator=generator), inputs.T @ inputs, (), members)


def grouped(d1: int, group: int) -> list[slice]:
    return [slice(start, min(start + (group or d1), d1)) for start in range(0, d1, group or d1)]


def from_extremes(weights: Array, bits: int, part: float) -> tuple[float, float]:
    """Scale and zero of one group."""
    least, largest = part * min(0.0, weights.min()), part * max(0.0, weights.max())
    scale = (largest - least) / (2**bits - 1)
    return scale, float(np.rint(-least / scale))


def rounded(weights: Array, scale: Any, zero: Any, bits: int) -> Array:
    levels: Array = np.clip(np.rint(weights / scale) + zero, 0, 2**bits - 1)
    return levels


@pytest.mark.parametrize("group", [0, 8, 7])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rtn_is_the_formula(bits: int, group: int) -> None:
    problem, kept = layer(20, (5, 4)), Stored(bits, group)
    found = rtn.rtn(problem, kept.coder, OPTIONS)
    for span, member, (levels, scales, zeros) in zip(
        (slice(0, 5), slice(5, 9)), found.members, kept.parts, strict=True
    ):
        weight = problem.weight[:, span].double().numpy()
        for row, inputs in enumerate(grouped(20, group)):
            for j in range(weight.shape[1]):
                scale, zero = from_extremes(weight[inputs, j], bits, 1.0)
                assert scales[row, j] == pytest.approx(scale, rel=1e-6)
                assert zeros[row, j] == zero
                np.testing.assert_array_equal(levels[inputs, j], rounded(weight[inputs, j], scale, zero, bits))
                expected = scale * (levels[inputs, j] - zero)
                np.testing.assert_allclose(member.weight[inputs, j], expected, rtol=1e-5, atol=1e-6)
                assert np.abs(expected - weight[inputs, j]).max() <= scale * (1 + 1e-6)


@pytest.mark.parametrize("group", [0, 8])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scales_are_those_of_the_least_error_in_the_norm(bits: int, group: int) -> None:
    problem, kept = layer(20, (9,), seed=1), Stored(bits, group)
    gptq.gptq(problem, kept.coder, OPTIONS)
    ((_, scales, zeros),) = kept.parts
    weight = problem.weight.double().numpy()
    for row, inputs in enumerate(grouped(20, group)):
        for j, own in enumerate(weight[inputs].T):
            tried = [from_extremes(own, bits, part / 100) for part in range(100, 20, -1)]
            missed = [np.sum(np.abs(s * (rounded(own, s, z, bits) - z) - own) ** 2.4) for s, z in tried]
            scale, zero = tried[int(np.argmin(missed))]
            assert scales[row, j] == pytest.approx(scale, rel=1e-5)
            assert zeros[row, j] == zero


def obq(weight: Array, hessian: Array, scales: Array, zeros: Array, bits: int) -> tuple[Array, Array]:
    """Levels (d1, d2), and of each output how near the nearest tie was."""
    order = np.argsort(-np.diagonal(hessian), kind="stable")
    weight, levels, margin = weight.copy(), np.zeros_like(weight), np.full(weight.shape[1], 0.5)
    for step, i in enumerate(order):
        left = order[step:]
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        exact = weight[i] / scales[i]
        margin = np.minimum(margin, np.abs(np.abs(exact - np.floor(exact)) - 0.5))
        levels[i] = rounded(weight[i], scales[i], zeros[i], bits)
        error = weight[i] - scales[i] * (levels[i] - zeros[i])
        weight[left] -= np.outer(inverse[:, 0], error) / inverse[0, 0]
    return levels, margin


@pytest.mark.parametrize("block", [5, 128])
@pytest.mark.parametrize("group", [0, 8])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_is_optimal_brain_quantization_in_order(
    bits: int, group: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "BLOCK", block)
    problem, kept = layer(20, (30, 20), seed=bits), Stored(bits, group)
    found = gptq.gptq(problem, kept.coder, OPTIONS)
    assert problem.gram is not None
    gram = problem.gram.double().numpy()
    hessian = gram + 0.01 * np.trace(gram) / len(gram) * np.eye(len(gram))
    owner = np.arange(20) // (group or 20)
    clear = 0
    for span, member, (levels, scales, zeros) in zip(
        (slice(0, 30), slice(30, 50)), found.members, kept.parts, strict=True
    ):
        weight = problem.weight[:, span].double().numpy()
        expected, margin = obq(weight, hessian, scales[owner], zeros[owner], bits)
        certain = margin > 1e-4
        np.testing.assert_array_equal(levels[:, certain], expected[:, certain])
        meant = (levels - zeros[owner]) * scales[owner]
        np.testing.assert_allclose(member.weight, meant, rtol=1e-6)
        clear += int(certain.sum())
    assert clear >= 45


def error(problem: MetricProblem, found: Coded) -> float:
    difference = (problem.weight - torch.cat([member.weight for member in found.members], 1)).double()
    assert problem.gram is not None
    return float((difference * (problem.gram.double() @ difference)).sum())


@pytest.mark.parametrize("name", ["int2g64", "int3g128", "int4", "int8g64"])
def test_feedback_is_better_than_rounding_and_more_bits_than_fewer(name: str) -> None:
    problem, coder = layer(150, (40,)), integer_coder(INTEGERS[name])
    nearest, fed = rtn.rtn(problem, coder, OPTIONS), gptq.gptq(problem, coder, OPTIONS)
    assert error(problem, fed) < 0.6 * error(problem, nearest)
    finest = integer_coder(INTEGERS["int8g64"])
    assert error(problem, gptq.gptq(problem, finest, OPTIONS)) <= error(problem, fed)


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
@given(
    name=st.sampled_from(list(INTEGERS)),
    d1=st.integers(1, 150),
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.0, 1e-42, 1e-30, 1.0, 1e30]),
)
def test_codes_stand_for_the_weights_that_are_told(
    solver: str, name: str, d1: int, widths: list[int], seed: int, scale: float
) -> None:
    """To the bit, and finite: of weights of any size, of inputs that always were zero, of outputs without weights."""
    generator = torch.Generator().manual_seed(seed)
    weight = scale * (2 * torch.rand(d1, sum(widths), generator=generator) - 1)
    weight[:, 0] = 0
    inputs = torch.randn(2 * d1, d1, generator=generator)
    inputs[:, ::3] = 0
    codec = INTEGERS[name]
    found = SOLVERS[solver].solve(
        MetricProblem(weight, inputs.T @ inputs, (), tuple(widths)), integer_coder(codec), OPTIONS
    )
    for width, member in zip(widths, found.members, strict=True):
        assert member.weight.isfinite().all()
        assert codec.problem(member.code, [width, d1]) is None
        assert torch.equal(codec.decode(member.code, [width, d1]), member.weight.T)
    assert not found.members[0].weight[:, 0].any()


@pytest.mark.parametrize("solve", [rtn.rtn, gptq.gptq])
def test_without_a_gram_and_with_one_that_is_not_finite(solve: Callable[..., Coded]) -> None:
    problem, coder = layer(20, (6,)), integer_coder(INTEGERS["int4g64"])
    plain = MetricProblem(problem.weight, None, (), (6,))
    alone, unit = (
        solve(one, coder, OPTIONS) for one in (plain, MetricProblem(problem.weight, torch.eye(20), (), (6,)))
    )
    assert torch.equal(alone.members[0].code, unit.members[0].code)
    if solve is gptq.gptq:
        broken = MetricProblem(problem.weight, torch.full((20, 20), torch.nan), (), (6,))
        with pytest.raises(UserError, match="not finite"):
            solve(broken, coder, OPTIONS)


def test_codecs_are_told_by_their_names() -> None:
    assert set(rtn.CODECS) == set(INTEGERS)
    sizes = [INTEGERS[name].nbytes([4096, 4096]) for name in rtn.CODECS]
    assert sizes == sorted(sizes)
