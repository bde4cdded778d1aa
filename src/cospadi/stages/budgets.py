"""Spreads the nonzeros over the groups by what they are worth to the model."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from cospadi.budget.plan import Group, Plan, free_group
from cospadi.solvers.support import rounded_portions
from cospadi.stages.costs import Costs
from cospadi.stages.open import Job

log = logging.getLogger("cospadi")

POOLED = 0.5
"""How far a group's share of the nonzeros goes from that of an equal density to that of one threshold for all."""

LEAST = 4
"""Nonzeros that every group has."""

BINS = 2**15
"""Of the histogram of saliencies: float32 patterns, whose upper 16 bits order as the numbers do."""


def allocate(job: Job, costs: Costs | None) -> Plan:
    """A plan of the same bytes as the uniform one, which gives more nonzeros to groups whose weights are worth more.

    What a weight is worth alone is its saliency w_ij^2 E[x_i^2] E[g_j^2] (optimal brain damage, LeCun 1990, with the
    diagonals of the Kronecker factors): what the loss gains without it. One threshold for the whole model leaves each
    group some number of nonzeros; a group gets the mean of that and of what the same density everywhere would give it,
    since saliencies know nothing of how errors add up.
    """
    uniform = job.uniform
    if job.recipe.allocate == "uniform" or costs is None:
        return uniform
    histograms = []
    with job.stages.stage("budgets", len(uniform.groups)) as progress:
        for group in uniform.groups:
            histograms.append(_histogram(job, costs, group))
            progress.advance(1)
    total = sum(group.nonzeros for group in uniform.groups)
    above = torch.stack(histograms).flip(1).cumsum(1)  # entries of each group down to a bin, the dearest bin first
    place = int(torch.searchsorted(above.sum(0), total))
    before = above[:, place - 1] if place else torch.zeros(len(above), dtype=torch.int64)
    inside = above[:, place] - before
    part = (total - int(before.sum())) / max(1, int(inside.sum()))
    pooled = (before + part * inside).tolist()
    wanted = [
        max(LEAST, int((1 - POOLED) * group.nonzeros + POOLED * share))
        for group, share in zip(uniform.groups, pooled, strict=True)
    ]
    while (surplus := sum(wanted) - total) > 0:  # what tiny groups have got to their least
        largest = wanted.index(max(wanted))
        wanted[largest] -= min(surplus, wanted[largest] - LEAST)
    room = [group.d1 * sum(group.d2s) for group in uniform.groups]
    counts = rounded_portions(wanted, total, room)
    groups = [
        free_group(group.members, group.stored, group.k, count)
        for group, count in zip(uniform.groups, counts, strict=True)
    ]
    densities = [count / most for count, most in zip(counts, room, strict=True)]
    log.info("budgets: densities from %.3f to %.3f", min(densities), max(densities))
    return Plan(tuple(groups))


def _histogram(job: Job, costs: Costs, group: Group) -> Tensor:
    """How many saliencies of a group lie in each bin, int64 (BINS,)."""
    counts = torch.zeros(BINS, dtype=torch.int64)
    for member in group.members:
        inputs, outputs = costs.diagonals(member)
        weight = job.blocks.weight(member.name).float().square()
        saliency = weight * outputs.to(weight)[:, None] * inputs.to(weight)
        bits = saliency.clamp(min=0).contiguous().view(torch.int32) >> 16
        counts += torch.bincount(bits.flatten(), minlength=BINS).cpu()
    return counts
