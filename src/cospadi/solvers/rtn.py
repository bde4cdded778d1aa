"""Round to nearest: integers of few bits on a grid for each output and group of inputs, from its least to its largest
weight and zero among them (the usual weight-only quantization)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cospadi.solvers.flops import Flops
from cospadi.solvers.problem import Coded, IntegerCoder, Member, MetricProblem, SolverOptions
from cospadi.solvers.support import member_spans

CODECS = tuple(f"int{bits}{group}" for bits in (2, 3, 4, 5, 6, 8) for group in ("", "g128", "g64"))
"""How levels may be stored, by the names of the kinds in `format`, from the fewest bytes to the most."""


class Scales(NamedTuple):
    """Of groups of inputs: a level l stands for scale (l - zero).

    Attributes:
        scales: float32 (groups, d2), as they are stored. zeros: float32 (groups, d2), levels.
    """

    scales: Tensor
    zeros: Tensor


def rtn(problem: MetricProblem, coder: IntegerCoder, options: SolverOptions) -> Coded:
    """The level that is nearest to each weight. G and `outputs` are not used."""
    weight = problem.weight.float()
    of_groups = [extremes(inputs, coder) for inputs in groups(weight, coder)]
    grid = Scales(*(torch.cat(parts) for parts in zip(*of_groups, strict=True)))
    return coded(problem, nearest(weight, of_inputs(grid, len(weight), coder), coder), grid, coder)


def groups(weight: Tensor, coder: IntegerCoder) -> tuple[Tensor, ...]:
    """Weights (d1, d2) in the groups of inputs that have a scale, the last of which may be narrower."""
    return torch.split(weight, coder.group or len(weight))


def of_inputs(grid: Scales, d1: int, coder: IntegerCoder) -> Scales:
    """Those of every input, (d1, d2)."""
    group = torch.arange(d1, device=grid.scales.device) // (coder.group or d1)
    return Scales(grid.scales[group], grid.zeros[group])


def extremes(weight: Tensor, coder: IntegerCoder, part: float = 1.0) -> Scales:
    """Scales (1, d2) whose levels reach from the least to the largest weight of a group (inputs, d2), or a part as far.

    Of weights that all are zero, from -1 to 1.
    """
    least, largest = weight.amin(0, keepdim=True).clamp(max=0), weight.amax(0, keepdim=True).clamp(min=0)
    none = least == largest
    least, largest = least.masked_fill(none, -1.0) * part, largest.masked_fill(none, 1.0) * part
    scales = coder.scale(largest / coder.most - least / coder.most)
    return Scales(scales, (-least / scales).round().clamp(0, coder.most))


def nearest(weight: Tensor, grid: Scales, coder: IntegerCoder) -> Tensor:
    """Levels of weights (..., d2), float32, of scales that broadcast to them."""
    return (weight / grid.scales).round_().add_(grid.zeros).clamp_(0, coder.most)


def coded(problem: MetricProblem, levels: Tensor, grid: Scales, coder: IntegerCoder) -> Coded:
    """What levels (d1, d2) stand for, and how they are stored."""
    own = of_inputs(grid, len(levels), coder)
    weight = (levels - own.zeros) * own.scales
    return Coded(
        tuple(
            Member(weight[:, span], coder.encode(levels[:, span], grid.scales[:, span], grid.zeros[:, span]))
            for span in member_spans(problem.members)
        )
    )


def flops(d1: int, d2: int, _k: int, _s: float, options: SolverOptions) -> Flops:
    """Of `rtn`: a few operations a weight."""
    return Flops(others=8.0 * d1 * d2)
