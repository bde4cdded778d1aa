"""Pooled budgets: the same bytes, more of them where weights are worth more, against a plain sort."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cospadi
from cospadi.budget.plan import Plan, size_group
from cospadi.format import schema
from cospadi.jobs.progress import Stages
from cospadi.model.projections import Projection
from cospadi.recipe import Recipe
from cospadi.solvers import MetricProblem, SolverOptions
from cospadi.solvers.trellis import trellis
from cospadi.stages.budgets import POOLED, allocate
from cospadi.stages.solve import coder

RECIPE = Recipe.build(ratio=0.3).settled()


def problem(sizes: list[list[tuple[int, int]]], recipe: Recipe, seed: int) -> tuple[Any, Any, dict[str, Tensor]]:
    """A job and costs, as far as `allocate` looks at them, of groups of (d1, d2); and the saliencies of all weights."""
    generator = torch.Generator().manual_seed(seed)
    groups, weights, diagonals = [], {}, {}
    for number, shapes in enumerate(sizes):
        members = tuple(Projection(f"{number}.{i}", number, str(i), d1, d2) for i, (d1, d2) in enumerate(shapes))
        for member in members:
            size = torch.exp(2 * torch.randn((), generator=generator))
            weights[member.name] = size * torch.randn(member.d2, member.d1, generator=generator)
            diagonals[member.name] = tuple(
                torch.exp(torch.randn(width, generator=generator)) for width in (member.d1, member.d2)
            )
        group = size_group(members, recipe.ratio, recipe.rho, recipe)
        if group is not None:
            groups.append(group)
    blocks, uniform = SimpleNamespace(weight=weights.get), Plan(tuple(groups))
    job = SimpleNamespace(recipe=recipe, uniform=uniform, blocks=blocks, stages=Stages())
    costs = SimpleNamespace(diagonals=lambda member: diagonals[member.name])
    saliencies = {
        name: weight.double() ** 2 * diagonals[name][1].double()[:, None] * diagonals[name][0].double()
        for name, weight in weights.items()
    }
    return job, costs, saliencies


def of_group(saliencies: dict[str, Tensor], group: Any) -> np.ndarray:
    return torch.cat([saliencies[member.name].flatten() for member in group.members]).numpy()


def check(job: Any, plan: Plan) -> None:
    """The same groups, bytes and nonzeros as the uniform plan's; every group has some, and no more than fit."""
    assert plan.bytes == job.uniform.bytes
    assert sum(group.nonzeros for group in plan.groups) == sum(group.nonzeros for group in job.uniform.groups)
    for group, before in zip(plan.groups, job.uniform.groups, strict=True):
        assert (group.members, group.form, group.k) == (before.members, before.form, before.k)
        assert 4 <= group.nonzeros <= group.d1 * sum(group.d2s)
        assert group.nonzeros % 4 == 0


widths = st.sampled_from([1, 2, 3, 4, 7, 8, 16, 33, 60])


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        widths.flatmap(lambda d1: st.lists(st.tuples(st.just(d1), widths), min_size=1, max_size=3)),
        min_size=1,
        max_size=7,
    ),
    st.sampled_from([0.05, 0.3, 0.5, 0.8]),
    st.sampled_from([12, 14, 16]),
    st.integers(0, 2**16),
)
def test_the_bytes_stay_at_any_size(
    sizes: list[list[tuple[int, int]]], ratio: float, value_bits: int, seed: int
) -> None:
    job, costs, _ = problem(sizes, Recipe.build(ratio=ratio, value_bits=value_bits).settled(), seed)
    if job.uniform.groups:
        check(job, allocate(job, costs))


def test_shares_are_half_way_to_one_threshold() -> None:
    sizes = [[(48, 40), (48, 24)], [(32, 64)], [(64, 64)], [(24, 96)]]
    for seed in range(4):
        job, costs, saliencies = problem(sizes, RECIPE, seed)
        plan = allocate(job, costs)
        check(job, plan)
        total = sum(group.nonzeros for group in job.uniform.groups)
        everything = np.concatenate([of_group(saliencies, group) for group in job.uniform.groups])
        threshold = np.sort(everything)[-total]
        spread = []
        for group, before in zip(plan.groups, job.uniform.groups, strict=True):
            above = int((of_group(saliencies, group) >= threshold).sum())
            wanted = (1 - POOLED) * before.nonzeros + POOLED * above
            assert group.nonzeros == pytest.approx(wanted, abs=0.005 * total + 8)
            spread.append(abs(above - before.nonzeros))
        assert max(spread) > 0.05 * total  # the threshold does say something else


def test_a_group_that_is_worth_more_gets_more() -> None:
    sizes = [[(48, 40)], [(32, 64)], [(64, 64)]]
    found = []
    for factor in (0.01, 0.5, 1.0, 2.0, 100.0):
        job, costs, _ = problem(sizes, RECIPE, 5)
        plain = costs.diagonals
        costs.diagonals = lambda member, plain=plain, factor=factor: (
            plain(member)[0],
            plain(member)[1] * (factor if member.block == 1 else 1.0),
        )
        plan = allocate(job, costs)
        check(job, plan)
        found.append(plan.groups[1].nonzeros)
    assert found == sorted(found)
    assert found[-1] > 1.2 * found[0]


@pytest.mark.parametrize("what", ["equal", "zero weights", "zero group", "one entry", "huge"])
def test_saliencies_that_tell_little(what: str) -> None:
    job, costs, _ = problem([[(16, 20)], [(16, 20)], [(8, 12)]], RECIPE, 1)
    weights: dict[str, Tensor] = {}
    for number, group in enumerate(job.uniform.groups):
        (member,) = group.members
        weight = torch.ones(member.d2, member.d1)
        if what == "zero weights" or (what == "zero group" and number == 1):
            weight.zero_()
        elif what == "one entry":
            weight = torch.zeros_like(weight)
            weight[0, 0] = 1
        elif what == "huge":
            weight *= 1e18
        weights[member.name] = weight
    job.blocks.weight = weights.get
    costs.diagonals = lambda member: (torch.ones(member.d1), torch.ones(member.d2))
    plan = allocate(job, costs)
    check(job, plan)
    counts = [group.nonzeros for group in plan.groups]
    uniform = [group.nonzeros for group in job.uniform.groups]
    if what in ("equal", "zero weights", "huge"):
        assert counts == pytest.approx(uniform, abs=4)
    if what == "zero group":  # what the others have no room for
        rest = sum(uniform) - 16 * 20 - 8 * 12
        assert counts[1] == pytest.approx((uniform[1] + rest) / 2, abs=8)


def test_groups_of_four_nonzeros_keep_them() -> None:
    """One is worth all that there is, and none of the others can give."""
    job, costs, _ = problem([[(4, 4)]] * 6, Recipe.build(ratio=0.5).settled(), 1)
    assert [group.nonzeros for group in job.uniform.groups] == [4] * 6
    costs.diagonals = lambda member: (torch.ones(4), torch.full((4,), 1e6 if member.block == 3 else 1.0))
    check(job, allocate(job, costs))


def test_uniform_is_left_alone() -> None:
    job, costs, _ = problem([[(16, 20)], [(8, 12)]], Recipe.build(allocate="uniform").settled(), 1)
    assert allocate(job, costs) == job.uniform
    job, _, _ = problem([[(16, 20)], [(8, 12)]], RECIPE, 1)
    assert allocate(job, None) == job.uniform


def test_a_job_spreads_its_bytes_and_writes_what_was_planned(
    dense_folder: Path, default: dict[str, Any], tmp_path: Path
) -> None:
    plan = cospadi.measure_plan(dense_folder, default)
    uniform = cospadi.measure_plan(dense_folder, default | {"allocate": "uniform"})
    assert plan.bytes == uniform.bytes
    assert [group.nonzeros for group in plan.groups] != [group.nonzeros for group in uniform.groups]
    result = cospadi.compress(dense_folder, default, tmp_path / "out")
    assert result.plan == plan
    entries = schema.read_config(tmp_path / "out")
    for group in plan.groups:
        assert sum(entries[member.name].nnz for member in group.members) == group.nonzeros
    given = cospadi.compress(dense_folder, default, tmp_path / "given", plan=plan)
    assert given.plan == plan
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "given" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_model_that_runs_whole_gets_the_plan_of_one_that_runs_by_blocks(
    dense_folder: Path, default: dict[str, Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_blocks = cospadi.measure_plan(dense_folder, default)
    refuse: Callable[..., None] = lambda *_: None  # noqa: E731
    monkeypatch.setattr("cospadi.stages.text.learn_calls", refuse)
    whole = cospadi.measure_plan(dense_folder, default)
    assert whole.bytes == by_blocks.bytes
    for one, other in zip(whole.groups, by_blocks.groups, strict=True):
        assert one.nonzeros == pytest.approx(other.nonzeros, rel=0.02, abs=8)


@pytest.mark.parametrize("bits", [2.0, 3.0, 5.0, 8.0, 10.0])
def test_levels_have_one_step_in_the_loss(bits: float) -> None:
    """Weights twice as large have a bit more, or somewhat less where there are few, and errors of the same size once
    they are solved."""
    recipe = Recipe.build(bits=bits).settled()
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": 1.0, "b": 2.0, "c": 4.0}
    members = {name: Projection(name, 0, name, 96, 160) for name in sizes}
    weights = {name: size * torch.randn(160, 96, generator=generator) for name, size in sizes.items()}
    groups = [size_group((member,), recipe.ratio, recipe.rho, recipe) for member in members.values()]
    job: Any = SimpleNamespace(
        recipe=recipe,
        uniform=Plan(tuple(group for group in groups if group is not None)),
        blocks=SimpleNamespace(weight=weights.get),
        stages=Stages(),
        inputs=lambda group: (group.members[0].name,),
    )
    costs: Any = SimpleNamespace(
        pivots=lambda _index, _reader: torch.ones(96), diagonals=lambda _member: (torch.ones(96), torch.ones(160))
    )
    plan = allocate(job, costs)
    assert plan.bytes == job.uniform.bytes
    given = [8 * group.parts.total / (96 * 160) for group in plan.groups]
    assert np.diff(given) == pytest.approx(1, abs=0.1 if bits > 3 else 0.4)
    errors = []
    for group in plan.groups:
        weight = weights[group.members[0].name].T.contiguous()
        found = trellis(MetricProblem(weight, None, (), (160,)), group.parts.values, coder(), SolverOptions())
        errors.append(float((weight - found.members[0].weight).square().mean().sqrt()))
    assert max(errors) < (1.1 if bits > 3 else 1.4) * min(errors)
