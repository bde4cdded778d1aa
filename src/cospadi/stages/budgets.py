"""Spreads the nonzeros over the groups by what they are worth to the model."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from cospadi.budget.plan import Group, Plan, beside_bytes, coded_group, free_group, least_bytes
from cospadi.format import rans, rans_tables
from cospadi.solvers.support import rounded_portions
from cospadi.stages.costs import Costs
from cospadi.stages.open import Job

log = logging.getLogger("cospadi")

POOLED = 0.5
"""How far a group's share of the nonzeros goes from that of an equal density to that of one threshold for all."""

LEAST = 4
"""Nonzeros that every group has."""

TINY = 1e-30

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
    if job.recipe.spreads_levels:
        return _one_rate(job, costs)
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


def _one_rate(job: Job, costs: Costs) -> Plan:
    """A plan of the same bytes as the uniform one, in which the levels of all groups have one step in the loss.

    How many bits a group then takes is that of levels as wide as its weights are, in such steps: the products of an
    input's and an output's width, by the pivots of the inputs and what outputs cost.
    """
    uniform, lengths = job.uniform, _mean_lengths()
    spectra = []
    with job.stages.stage("budgets", len(uniform.groups)) as progress:
        for group in uniform.groups:
            spectra.append(_spectrum(job, costs, group))
            progress.advance(1)
    places = torch.arange(SPECTRUM) / PLACES - REACH  # octaves

    def planned(rate: float) -> list[int]:
        """Bytes of each group at a step of 2 ** rate."""
        place = ((places - rate) * 4 - rans_tables.LOW).clamp(min=0)
        below = place.long().clamp(max=len(lengths) - 2)
        mean = lengths[below] + (lengths[below + 1] - lengths[below]) * (place - below)
        return [
            max(least_bytes(group.members), beside_bytes(group.members) + int((spectrum * mean).sum() / 8))
            for group, spectrum in zip(uniform.groups, spectra, strict=True)
        ]

    total, low, high = sum(group.parts.total for group in uniform.groups), -float(REACH), float(REACH)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(planned(middle)) > total else (low, middle)
    wanted = planned(high)
    room = [2 * group.dense_bytes for group in uniform.groups]
    counts = rounded_portions(wanted, total, room)
    groups = [
        coded_group(group.members, group.stored, count) for group, count in zip(uniform.groups, counts, strict=True)
    ]
    bits = [16 * group.parts.total / group.dense_bytes for group in groups]
    log.info("budgets: from %.2f to %.2f bits a weight", min(bits), max(bits))
    return Plan(tuple(groups))


LINEAR = 20
"""The class from which on a bit more is four classes: levels deviate by 32."""

PLACES, REACH = 16, 64
"""Of a spectrum of widths: places an octave, and octaves to both sides of 1."""
SPECTRUM = 2 * PLACES * REACH


def _mean_lengths() -> Tensor:
    """Bits of a level of each class, float64, quantizers in equal shares; the last two are a quarter bit apart."""
    bits = rans.bits_table()[: LINEAR - rans_tables.LOW + 2].double()
    chances = torch.exp2(-bits) * torch.where(torch.arange(bits.shape[2]) > 0, 2.0, 1.0)
    lengths = (chances * bits).sum(2).mean(1)
    lengths[-1] = lengths[-2] + 0.25
    return lengths


def _spectrum(job: Job, costs: Costs, group: Group) -> Tensor:
    """How many weights of a group have which width, in loss: float64 (SPECTRUM,)."""
    pivots = costs.pivots(group.members[0].block, job.inputs(group)[0])
    found = torch.zeros(SPECTRUM, dtype=torch.float64)
    for member in group.members:
        squares = job.blocks.weight(member.name).float().square()  # (d2, d1)
        squares = squares * costs.diagonals(member)[1].to(squares)[:, None] / pivots.to(squares) ** 2
        cols = squares.mean(0).clamp(min=TINY)
        rows = (squares / cols).mean(1)
        octaves = (torch.log2(part.double().clamp(min=TINY)).cpu() / 2 + REACH / 2 for part in (cols, rows))
        places = [(PLACES * part).round().long().clamp(0, SPECTRUM // 2 - 1) for part in octaves]
        counts = [torch.bincount(part, minlength=SPECTRUM // 2).double() for part in places]
        spectrum = torch.fft.irfft(torch.fft.rfft(counts[0], SPECTRUM) * torch.fft.rfft(counts[1], SPECTRUM), SPECTRUM)
        found += spectrum.clamp(min=0)
    return found


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
