"""Spreads a byte budget: what errors cost, what each group costs at several sizes, which spread the model likes."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from cospadi.budget.accounting import byte_budget
from cospadi.budget.knapsack import Option, interpolate, knapsack
from cospadi.budget.plan import Group, Plan, dense_group, fill_up, form_of, size_group
from cospadi.calibration import walk as sequence
from cospadi.calibration.fisher import output_fisher, output_fisher_by_blocks
from cospadi.calibration.grams import Whitening
from cospadi.calibration.walk import Flow, in_block
from cospadi.commands import evaluate
from cospadi.jobs.ledger import Piece
from cospadi.jobs.pool import Task
from cospadi.recipe import Recipe
from cospadi.solvers import find_solver
from cospadi.stages.open import Job, allocation_of, check_text, each_group, walk, weighs_columns
from cospadi.stages.solve import approximate, cost_curve, work_of

log = logging.getLogger("cospadi")

RHOS: tuple[float, ...] = (1.5, 2.2, 3.2, 4.8)
"""k / s that budgets choose from, unless the recipe gives one."""

SPANS = (0.0, 0.1, 0.2, 1.0)
"""How far from the asked ratio a group's own may lie: one allocation each, of which the loss on text chooses."""


def estimate_fisher(job: Job, uniform: Plan) -> dict[str, Tensor] | None:
    """What an error at each output costs in the loss (`output_fisher`), or None where the recipe does not ask.

    Taken at the model that a uniform budget and short solver runs make of it: in a damaged model early projections
    matter more than they do in the whole one, and that is the model that is going to be.

    Returns:
        name -> float64 (d2,), on the CPU.
    """
    if not (weighs_columns(job.recipe) or allocation_of(job.recipe) == "fisher"):
        return None
    if (piece := job.ledger.get("fisher/2")) is not None:
        return piece.tensors()
    first = job.ledger.get("fisher/1")
    if first is None:
        first = job.ledger.put("fisher/1", {}, _fisher_of(job, uniform, {}))
    quick = quick_weights(job, uniform, first.tensors())
    fisher = job.ledger.put("fisher/2", {}, _fisher_of(job, uniform, quick)).tensors()
    job.ledger.drop("quick/")
    return fisher


def _fisher_of(job: Job, uniform: Plan, quick: Mapping[Group, Piece]) -> dict[str, Tensor]:
    """F of all projections in the model that some groups' other weights make."""
    text, blocks = check_text(job), job.blocks
    projections = [member for group in uniform.groups for member in group.members]
    with job.stages.stage("fisher", len(text)) as progress:
        if job.calls is None:
            everything = {name: weight for piece in quick.values() for name, weight in piece.tensors().items()}
            everything = {name: weight.to(blocks.device) for name, weight in everything.items()}
            with sequence.other_weights(blocks.model, everything):
                fisher = output_fisher(blocks.model, projections, text, progress.advance)
        else:

            def stand_ins(index: int) -> dict[str, Tensor]:
                touching = [piece for group, piece in quick.items() if any(m.block == index for m in group.members)]
                weights = [item for piece in touching for item in piece.tensors().items()]
                return {
                    name: weight.to(blocks.device) for name, weight in in_block(blocks.name_of(index), weights).items()
                }

            fisher = output_fisher_by_blocks(
                blocks, job.calls, projections, text, job.shelf, stand_ins, progress.advance
            )
    return {name: values.cpu() for name, values in fisher.items()}


def quick_weights(job: Job, plan: Plan, fisher: Mapping[str, Tensor]) -> dict[Group, Piece]:
    """The weights (d2, d1) that short solver runs make of a plan's groups, in the model's dtype: a piece a group."""
    groups = plan.compressed
    pieces = each_group(
        job, "budgets", "quick", groups, approximate,
        lambda group, metric: job.task(job.work(group, metric, fisher)),
        lambda weights: ({}, weights),
    )  # fmt: skip
    return dict(zip(groups, pieces, strict=True))


def allocate(job: Job, uniform: Plan, fisher: Mapping[str, Tensor] | None) -> Plan:
    """Spread the byte budget over the groups so that the errors cost the model least.

    Each group is solved in short runs at a few ratios and rho, which gives its cost against bytes. A knapsack then
    chooses for all groups, for several bounds on how far a group may stray from the asked ratio: costs are quadratic
    and sum up only while errors are small. Of the models that short runs make of these candidates, `uniform` among
    them, the one with the lowest loss on text decides, so that a spread is taken only if it does better than none.
    """
    recipe = job.recipe
    if allocation_of(recipe) == "uniform":
        return uniform
    budget = byte_budget(recipe.ratio, 1, [uniform.dense_bytes // 2])
    curves = cost_curves(job, uniform.groups, fisher)
    candidates = [uniform]
    for span in SPANS:
        plan = _spread(uniform, curves, budget, span, recipe)
        if plan is not None and plan not in candidates:
            candidates.append(plan)
    losses = candidate_losses(job, candidates, fisher)
    best = min(range(len(candidates)), key=lambda index: losses[index] if math.isfinite(losses[index]) else math.inf)
    spread = ", ".join(f"{loss:.4f}" for loss in losses[1:]) or "no other fits"
    log.info("budgets: loss %.4f with a uniform ratio; spread: %s; taken: %.4f", losses[0], spread, losses[best])
    if best == 0:
        log.warning("no other spread of the bytes gives a lower loss on the calibration text: the budget is uniform")
    return candidates[best]


def cost_curves(job: Job, groups: Sequence[Group], fisher: Mapping[str, Tensor] | None) -> list[list[Option]]:
    """What each group costs at the measured ratios and rho."""
    by_fisher = allocation_of(job.recipe) == "fisher"

    def task(group: Group, metric: Whitening) -> Task:
        sizes = [
            (sized, ratio, rho)
            for ratio in measured_ratios(job.recipe)
            for rho in measured_rhos(job.recipe)
            if (sized := size_group(group.members, ratio, rho, job.recipe)) is not None
        ]
        return job.task(job.work(group, metric, fisher), sizes, by_fisher)

    pieces = each_group(
        job, "budgets", "curve", groups, cost_curve, task,
        lambda options: ({"options": [[o.nbytes, o.cost, o.ratio, o.rho] for o in options]}, None),
    )  # fmt: skip
    return [[Option(*option) for option in piece.record["options"]] for piece in pieces]


def measured_ratios(recipe: Recipe) -> list[float]:
    """Ratios at which groups are measured, around the asked one."""
    r = recipe.ratio
    return [0.3 * r, r, r + 0.25 * (1 - r), r + 0.5 * (1 - r)]


def measured_rhos(recipe: Recipe) -> tuple[float, ...]:
    """k / s at which groups are measured."""
    if not form_of(recipe).support_kind.chosen:
        return (recipe.uniform_rho,)  # means nothing there
    return RHOS if recipe.rho is None else (recipe.rho,)


def _spread(uniform: Plan, curves: Sequence[Sequence[Option]], budget: int, span: float, recipe: Recipe) -> Plan | None:
    """The plan that a knapsack makes of the groups' cost curves, with ratios within `span` of the asked one."""
    ratios = sorted({ratio / 100 for ratio in range(2, 98, 2)} | {recipe.ratio})
    choices = []
    for group, curve in zip(uniform.groups, curves, strict=True):
        within = [ratio for ratio in ratios if abs(ratio - recipe.ratio) <= span + 1e-9]
        options = interpolate(curve, within, group.dense_bytes)
        if span >= recipe.ratio:
            options.append(Option(group.dense_bytes, 0.0, 0.0, 0.0))
        if not options:
            return None
        choices.append(options)
    chosen = knapsack(choices, budget)
    if chosen is None:
        return None
    groups: list[Group] = []
    for group, option in zip(uniform.groups, chosen, strict=True):
        dense = option.ratio == 0
        sized = dense_group(group.members) if dense else size_group(group.members, option.ratio, option.rho, recipe)
        if sized is None:
            return None
        groups.append(sized)
    left = budget - sum(group.parts.total for group in groups)
    groups = fill_up(groups, left, find_solver(recipe.solver).free_support)
    plan = Plan(tuple(groups))
    return plan if plan.bytes <= budget else None


def candidate_losses(job: Job, plans: Sequence[Plan], fisher: Mapping[str, Tensor] | None) -> list[float]:
    """The loss, on a few calibration sequences, of the models that short solver runs make of some plans."""
    if (piece := job.ledger.get("losses")) is not None:
        return list(piece.record["losses"])
    text, size = check_text(job), job.recipe.batch_size
    if job.calls is None:
        losses = []
        for plan in plans:
            weights: dict[str, Tensor] = {}
            for groups, metrics in walk(job, plan.compressed):
                for _, found in _approximations(job, [plan], groups, metrics, fisher):
                    weights |= {name: weight.to(job.blocks.device) for name, weight in found.items()}
            with sequence.other_weights(job.blocks.model, weights):
                losses.append(evaluate.mean_loss(job.blocks.model, text, size))
    else:
        flows = _flows_of_plans(job, plans, fisher)
        losses = [sequence.mean_loss(job.blocks, job.calls, flow, text) for flow in flows]
        for flow in flows:
            flow.close()
    job.ledger.put("losses", {"losses": losses})
    job.ledger.drop("candidates/")
    return losses


def _flows_of_plans(job: Job, plans: Sequence[Plan], fisher: Mapping[str, Tensor] | None) -> list[Flow]:
    """For each plan the text behind the last block of its model. Blocks are solved for all plans in one walk."""
    assert job.calls is not None
    blocks, text = job.blocks, check_text(job)
    groups = _all_groups(plans)
    passed, flows = _resumed_flows(job, len(plans))
    if not flows:
        flows = [sequence.embed(blocks, text, job.recipe.batch_size, job.shelf) for _ in plans]
    weights: list[dict[str, Tensor]] = [{} for _ in plans]

    def advance_to(end: int) -> None:
        nonlocal passed
        while passed < end and all(
            g.members[-1].block < end for g in groups if any(m.block == passed for m in g.members)
        ):
            with blocks.loaded(passed) as block:
                for flow, some in zip(flows, weights, strict=True):
                    here = in_block(blocks.name_of(passed), some.items())
                    sequence.advance(block, passed, job.calls, flow, here)  # type: ignore[arg-type]
                    for name in here:
                        del some[f"{blocks.name_of(passed)}.{name}"]
            passed += 1

    for some, metrics in walk(job, [group for group in groups if group.members[-1].block >= passed]):
        for owner, found in _approximations(job, plans, some, metrics, fisher):
            weights[owner] |= {name: weight.to(blocks.device) for name, weight in found.items()}
        before = passed
        advance_to(max(group.members[-1].block for group in some) + 1)
        if passed > before and passed < len(blocks) and not any(weights):
            _keep_flows(job, passed, flows)
    advance_to(len(blocks))
    return flows


def _all_groups(plans: Sequence[Plan]) -> list[Group]:
    """A group of each set of members that some plan compresses, in model order."""
    chosen = {group.members: group for plan in plans for group in plan.compressed}
    return [chosen[group.members] for group in plans[0].groups if group.members in chosen]


def _approximations(
    job: Job,
    plans: Sequence[Plan],
    groups: Sequence[Group],
    metrics: Mapping[tuple[str, ...], Whitening],
    fisher: Mapping[str, Tensor] | None,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(index of a plan, weights of a group by a short solver run) for every plan that compresses these groups."""
    members = {group.members for group in groups}
    wanted = [(owner, g) for owner, plan in enumerate(plans) for g in plan.compressed if g.members in members]
    tasks = (job.task(job.work(group, metrics[job.inputs(group)], fisher)) for _, group in wanted)
    with job.stages.stage("budgets", sum(work_of(group) for _, group in wanted)) as progress:
        for index, found in job.pool.map(approximate, tasks):
            progress.advance(work_of(wanted[index][1]), f"{len(plans)} candidates")
            yield wanted[index][0], found


def _keep_flows(job: Job, passed: int, flows: Sequence[Flow]) -> None:
    """Remember how far the candidates have come."""
    tensors = {f"{plan}.{batch}": flow[batch] for plan, flow in enumerate(flows) for batch in range(len(flow))}
    job.ledger.put(f"candidates/{passed:04}", {"plans": len(flows)}, tensors)
    for earlier in range(passed):
        job.ledger.drop(f"candidates/{earlier:04}")


def _resumed_flows(job: Job, plans: int) -> tuple[int, list[Flow]]:
    """How far the candidates had come, and their hidden states there."""
    for passed in reversed(range(1, len(job.blocks))):
        piece = job.ledger.get(f"candidates/{passed:04}")
        if piece is not None and piece.record.get("plans") == plans:
            tensors = piece.tensors()
            batches = len(tensors) // plans
            return passed, [
                Flow(job.shelf, job.blocks.device, [job.shelf.put(tensors[f"{plan}.{b}"]) for b in range(batches)])
                for plan in range(plans)
            ]
    return 0, []
