"""Spreads a byte budget: what each group costs at several sizes, which spread the model likes."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from cospadi.budget.accounting import byte_budget
from cospadi.budget.knapsack import Option, interpolate, knapsack
from cospadi.budget.plan import Group, Plan, dense_group, fill_up, form_of, size_group
from cospadi.calibration.loss import mean_loss
from cospadi.calibration.walk import Flow, Stream, embed, mean_loss_of_flow, replaced_weights
from cospadi.recipe import Recipe
from cospadi.solvers import find_solver
from cospadi.stages.costs import Costs
from cospadi.stages.measure import Measured, whitenings
from cospadi.stages.open import Job
from cospadi.stages.solve import approximate, cost_curve, cost_of
from cospadi.stages.tasks import Tasks, keys_of
from cospadi.stages.text import check_text

log = logging.getLogger("cospadi")

RHOS: tuple[float, ...] = (1.5, 2.2, 3.2, 4.8)
"""k / s that budgets choose from, unless the recipe gives one."""

SPANS = (0.0, 0.1, 0.2, 1.0)
"""How far from the asked ratio a group's own may lie: one allocation each, of which the loss on text chooses."""


def allocate(job: Job, costs: Costs | None) -> Plan:
    """Spread the byte budget over the groups so that the errors cost the model least.

    Each group is solved in short runs at a few ratios and rho, which gives its cost against bytes. A knapsack then
    chooses for all groups, for several bounds on how far a group may stray from the asked ratio: costs are quadratic
    and sum up only while errors are small. Of the models that short runs make of these candidates, `uniform` among
    them, the one with the lowest loss on text decides, so that a spread is taken only if it does better than none.
    """
    recipe, uniform = job.recipe, job.uniform
    if recipe.allocate == "uniform":
        return uniform
    budget = byte_budget(recipe.ratio, 1, [uniform.dense_bytes // 2])
    curves = cost_curves(job, uniform.groups, costs)
    candidates = [uniform]
    for span in SPANS:
        plan = _spread(uniform, curves, budget, span, recipe)
        if plan is not None and plan not in candidates:
            candidates.append(plan)
    losses = candidate_losses(job, candidates, costs)
    best = min(range(len(candidates)), key=lambda index: losses[index] if math.isfinite(losses[index]) else math.inf)
    spread = ", ".join(f"{loss:.4f}" for loss in losses[1:]) or "no other fits"
    log.info("budgets: loss %.4f with a uniform ratio; spread: %s; taken: %.4f", losses[0], spread, losses[best])
    if best == 0:
        log.warning("no other spread of the bytes gives a lower loss on the calibration text: the budget is uniform")
    return candidates[best]


def cost_curves(job: Job, groups: Sequence[Group], costs: Costs | None) -> list[list[Option]]:
    """What each group costs at the measured ratios and rho."""

    def sizes(group: Group) -> list[tuple[Group, float, float]]:
        return [
            (sized, ratio, rho)
            for ratio in measured_ratios(job.recipe)
            for rho in measured_rhos(job.recipe)
            if (sized := size_group(group.members, ratio, rho, job.recipe)) is not None
        ]

    def keep(options: list[Option]) -> tuple[dict[str, Any], None]:
        return {"options": [[o.nbytes, o.cost, o.ratio, o.rho] for o in options]}, None

    with Tasks(job, "budgets", keys_of("curve", groups), cost_curve, keep) as tasks:
        for found in whitenings(job, tasks.missing()):
            tasks.give((g, job.task(g, found.whitenings[job.inputs(g)], costs.of(g) if costs else None, sizes(g))) for g in found.groups)
        tasks.finish()
        return [[Option(*option) for option in piece.record["options"]] for piece in tasks.pieces(groups)]


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


def candidate_losses(job: Job, plans: Sequence[Plan], costs: Costs | None) -> list[float]:
    """The loss, on a few calibration sequences, of the models that short solver runs make of some plans."""
    if (piece := job.ledger.get("losses")) is not None:
        return list(piece.record["losses"])
    text, size = check_text(job), job.recipe.batch_size
    if job.calls is None:
        losses = []
        for plan in plans:
            weights: dict[str, Tensor] = {}
            for found in whitenings(job, plan.compressed):
                for _, some in _approximations(job, [plan], found, costs):
                    weights |= some
            with replaced_weights(job.blocks.model, weights):
                losses.append(mean_loss(job.blocks.model, text, size))
    else:
        streams = _through_candidates(job, plans, costs)
        losses = [mean_loss_of_flow(job.blocks, job.calls, stream.flow, text) for stream in streams]
        for stream in streams:
            stream.flow.close()
    job.ledger.put("losses", {"losses": losses})
    job.ledger.drop("candidates/")
    return losses


def _through_candidates(job: Job, plans: Sequence[Plan], costs: Costs | None) -> list[Stream]:
    """For each plan the text behind the last block of its model. Blocks are solved for all plans in one walk."""
    streams = _resumed(job, len(plans)) or [
        Stream(embed(job.blocks, check_text(job), job.recipe.batch_size, job.spill)) for _ in plans
    ]
    kept = streams[0].block
    chosen = {group.members: group for plan in plans for group in plan.compressed}
    groups = [chosen[group.members] for group in plans[0].groups if group.members in chosen]
    for found in whitenings(job, [group for group in groups if group.members[-1].block >= kept], streams):
        if streams[0].block > kept and not any(stream.weights for stream in streams):
            kept = streams[0].block
            _keep(job, streams)
        for plan, weights in _approximations(job, plans, found, costs):
            streams[plan].weights |= weights
    return streams


def _approximations(
    job: Job, plans: Sequence[Plan], found: Measured, costs: Costs | None
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(index of a plan, weights of a group by a short solver run) for every plan that compresses these groups."""
    members = {group.members for group in found.groups}
    wanted = [(index, g) for index, plan in enumerate(plans) for g in plan.compressed if g.members in members]
    tasks = (job.task(group, found.whitenings[job.inputs(group)], costs.of(group) if costs else None) for _, group in wanted)
    with job.stages.stage("budgets", sum(cost_of(group) for _, group in wanted)) as progress:
        for index, weights in job.pool.map(approximate, tasks):
            progress.advance(cost_of(wanted[index][1]), f"{len(plans)} candidates")
            yield wanted[index][0], {name: weight.to(job.blocks.device) for name, weight in weights.items()}


def _keep(job: Job, streams: Sequence[Stream]) -> None:
    """Remember how far the candidates have come."""
    passed = streams[0].block
    tensors = {f"{plan}.{b}": stream.flow[b] for plan, stream in enumerate(streams) for b in range(len(stream.flow))}
    job.ledger.put(f"candidates/{passed:04}", {"plans": len(streams)}, tensors)
    for earlier in range(passed):
        job.ledger.drop(f"candidates/{earlier:04}")


def _resumed(job: Job, plans: int) -> list[Stream]:
    """How far the candidates had come, with their hidden states there; nothing where they had not."""
    for passed in reversed(range(1, len(job.blocks))):
        piece = job.ledger.get(f"candidates/{passed:04}")
        if piece is not None and piece.record.get("plans") == plans:
            tensors = piece.tensors()
            batches = range(len(tensors) // plans)
            flows = [[job.spill.put(tensors[f"{plan}.{batch}"]) for batch in batches] for plan in range(plans)]
            return [Stream(Flow(job.spill, job.blocks.device, items), block=passed) for items in flows]
    return []
