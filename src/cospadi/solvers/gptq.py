"""GPTQ (Frantar et al., ICLR 2023): integers input by input; later weights make up for the rounding of earlier ones.

With R^T R the inverse of the damped Gram, R upper triangular, rounding w at input i to q costs ((w - q) / R_ii)^2, once
the inputs after i have made up for it, and they do so by giving up (w - q) / R_ii times their entries in row i of R. As
in the usual implementations inputs come in order of their Gram diagonal, the largest first, in groups that are fixed
beforehand as they are stored, and each group's scale is searched: of parts of the way from its least to its largest
weight, that which has the least error in the norm 2.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cospadi.solvers.flops import Flops, cholesky, triangular
from cospadi.solvers.gram import damped_factor, live_inputs
from cospadi.solvers.problem import Coded, IntegerCoder, MetricProblem, SolverOptions
from cospadi.solvers.rtn import Scales, coded, extremes, groups, nearest
from cospadi.solvers.support import BLOCK_ENTRIES, row_blocks

BLOCK = 128
"""Inputs whose errors are fed to all later ones in one product."""

PARTS, LEAST_PART = 100, 21
"""Parts of the way are tried in hundredths, from all of it down to this many."""

NORM = 2.4


def gptq(problem: MetricProblem, coder: IntegerCoder, options: SolverOptions) -> Coded:
    """min ||X (W - S)||_F, greedily, with a damping of 1 % of G's mean diagonal.

    Inputs that were always zero get zeros. `outputs` is not used; without G, G = I. The factor of G's inverse is
    computed in float64, the rest in float32. Memory: five matrices of the size of G in float64, five of the size of W.

    Raises:
        UserError: G has values that are not finite.
    """
    weight = problem.weight.float().clone()
    d1 = len(weight)
    gram = torch.eye(d1).to(weight) if problem.gram is None else problem.gram
    weight[~live_inputs(gram)] = 0
    grid = searched(weight, coder)
    order = gram.diagonal().argsort(descending=True, stable=True)
    factor, rest, levels = damped_factor(gram[order][:, order]).float(), weight[order], torch.empty_like(weight)
    group = (order // (coder.group or d1)).tolist()
    for start in range(0, d1, BLOCK):
        end = min(start + BLOCK, d1)
        block, removed = rest[start:end], torch.empty_like(rest[start:end])
        for i in range(end - start):
            own = Scales(grid.scales[group[start + i]], grid.zeros[group[start + i]])
            found = nearest(block[i], own, coder)
            levels[order[start + i]] = found
            torch.div(block[i] - (found - own.zeros) * own.scales, factor[start + i, start + i], out=removed[i])
            block[i + 1 :].addr_(factor[start + i, start + i + 1 : end], removed[i], alpha=-1)
        rest[end:].addmm_(factor[start:end, end:].T, removed, alpha=-1)
    return coded(problem, levels, grid, coder)


def searched(weight: Tensor, coder: IntegerCoder) -> Scales:
    """The scales with the least sum of |w - q|^2.4 over each group of inputs of an output, (groups, d2)."""
    found = Scales(*(torch.empty(len(groups(weight, coder)), weight.shape[1], device=weight.device) for _ in range(2)))
    for number, inputs in enumerate(groups(weight, coder)):
        for outputs in row_blocks(slice(0, weight.shape[1]), max(1, BLOCK_ENTRIES // len(inputs))):
            own = inputs[:, outputs].contiguous()
            unit = extremes(own, coder).scales  # in which the norm neither vanishes nor overflows
            best = torch.full((own.shape[1],), torch.inf, device=own.device)
            for part in range(PARTS, LEAST_PART - 1, -1):
                tried = extremes(own, coder, part / PARTS)
                missed = (nearest(own, tried, coder) - tried.zeros).mul_(tried.scales).sub_(own)
                error = missed.div_(unit).abs_().pow_(NORM).sum(0)
                better = error < best
                best = torch.where(better, error, best)
                for whole, new in zip(found, tried, strict=True):
                    whole[number, outputs] = torch.where(better, new[0], whole[number, outputs])
    return found


def flops(d1: int, d2: int, _k: int, _s: float, options: SolverOptions) -> Flops:
    """Of `gptq`: every pair of inputs for each output, the factor of G and its inverse; the search as others."""
    searching = 10.0 * d1 * d2 * (PARTS - LEAST_PART + 1)
    return Flops(float(d1) * (d1 - 1) * d2, cholesky(d1) + triangular(d1, d1) + searching)
