"""Spreads a byte budget over groups: a multiple-choice knapsack over ways to store each group.

A group's options differ in bytes and in what they cost the model; "leave dense" costs nothing. The sum of costs is
minimised under a bound on the sum of bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

CELLS = 8192
"""Steps into which a byte budget is divided: what rounding may waste is a fraction of it."""


@dataclass(frozen=True)
class Option:
    """One way to store a group.

    Attributes:
        nbytes: bytes on disk at most.
        cost: what it costs the model, in any unit that is the same for all groups.
        ratio: fraction of the group's dense bytes that it saves; 0 leaves the group dense.
        rho: atoms for each nonzero of a column; 0 where the group stays dense.
    """

    nbytes: int
    cost: float
    ratio: float
    rho: float


def knapsack(groups: Sequence[Sequence[Option]], budget: int) -> list[Option] | None:
    """One option of each group with the least sum of costs among those whose bytes sum to at most `budget`.

    Dynamic programming over the budget in CELLS steps; bytes are rounded down to steps while choosing, and where the
    choice then exceeds the budget, it is made again for a budget that is smaller by the excess.

    Returns:
        None where even the smallest options do not fit.
    """
    if sum(min(option.nbytes for option in options) for options in groups) > budget:
        return None
    allowed = budget
    while allowed > 0:
        chosen = _choose(groups, budget / CELLS, int(allowed / budget * CELLS))
        if chosen is None:
            break
        excess = sum(option.nbytes for option in chosen) - budget
        if excess <= 0:
            return chosen
        allowed -= max(excess, budget // CELLS)
    return [min(options, key=lambda option: option.nbytes) for options in groups]


def _choose(groups: Sequence[Sequence[Option]], cell: float, cells: int) -> list[Option] | None:
    best = torch.zeros(cells + 1, dtype=torch.float64)  # least cost within so many cells, over the groups so far
    choices = []
    for options in groups:
        reached = torch.full((len(options), cells + 1), math.inf, dtype=torch.float64)
        for row, option in enumerate(options):
            size = int(option.nbytes / cell)
            if size <= cells:
                reached[row, size:] = best[: cells + 1 - size] + option.cost
        best, choice = reached.min(0)
        choices.append(choice)
    if not math.isfinite(float(best[cells])):
        return None
    chosen, left = [], cells
    for options, choice in zip(reversed(groups), reversed(choices), strict=True):
        option = options[int(choice[left])]
        chosen.append(option)
        left -= int(option.nbytes / cell)
    return chosen[::-1]


def interpolate(measured: Sequence[Option], ratios: Sequence[float], dense_bytes: int) -> list[Option]:
    """Options at more ratios: the logarithm of the cost is taken as linear between measured ones of equal rho.

    Nothing is extrapolated. Of several options at a ratio only the cheapest stays.
    """
    cheapest: dict[float, Option] = {}
    for rho in {option.rho for option in measured}:
        points = sorted((option for option in measured if option.rho == rho), key=lambda option: option.ratio)
        for ratio in ratios:
            for low, high in zip(points, points[1:] or points, strict=False):
                if low.ratio <= ratio <= high.ratio:
                    t = (ratio - low.ratio) / (high.ratio - low.ratio) if high is not low else 0.0
                    cost = math.exp((1 - t) * _log(low.cost) + t * _log(high.cost))
                    option = Option(math.floor((1 - ratio) * dense_bytes), cost, ratio, rho)
                    if ratio not in cheapest or cost < cheapest[ratio].cost:
                        cheapest[ratio] = option
                    break
    return [cheapest[ratio] for ratio in sorted(cheapest)]


def _log(cost: float) -> float:
    return math.log(max(cost, 1e-300))
