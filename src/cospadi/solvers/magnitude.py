"""Pruning by scores: the weights that stay keep their values. Magnitude, and Wanda (Sun et al., ICLR 2024).

As published, every projection is pruned to one density: of a group's nonzeros each member gets its share by size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cospadi.solvers.flops import Flops
from cospadi.solvers.gram import gram_error, gram_error_flops
from cospadi.solvers.problem import Factorization, MetricProblem, SolverOptions
from cospadi.solvers.support import even_portions, largest_of_all, largest_of_each, member_spans


def magnitude(problem: MetricProblem, nonzeros: int, options: SolverOptions) -> Factorization:
    """Keep the largest |w| of each projection, anywhere in it. G serves for the error only; `outputs` is not used.

    Of equal ones those of the first outputs stay, and of one output the first inputs.
    """
    d1 = len(problem.weight)
    support = torch.empty_like(problem.weight, dtype=torch.bool)
    portions = even_portions(nonzeros, problem.members, d1)
    for member, portion in zip(member_spans(problem.members), portions, strict=True):
        scores = problem.weight[:, member].T.abs().float().contiguous()
        support[:, member] = largest_of_all(scores, portion).T
    return _kept(problem, support, options)


def wanda(problem: MetricProblem, nonzeros: int, options: SolverOptions) -> Factorization:
    """Keep the largest |w| times the norm of its input, the same number for each output of a projection.

    That is the paper's comparison within an output, not one over the whole matrix. Where the number of nonzeros does
    not divide by that of the outputs, those whose next score is largest have one more. Norms are roots of G's diagonal;
    without G all are 1. An input that was always zero comes last. `outputs` is not used.
    """
    d1 = len(problem.weight)
    support = torch.empty_like(problem.weight, dtype=torch.bool)
    portions = even_portions(nonzeros, problem.members, d1)
    for member, portion in zip(member_spans(problem.members), portions, strict=True):
        scores = problem.weight[:, member].abs().float()
        if problem.gram is not None:
            scores *= problem.gram.diagonal().clamp(min=0).sqrt()[:, None]
        support[:, member] = largest_of_each(scores, portion)
    return _kept(problem, support, options)


def flops(d1: int, d2: int, nonzeros: int, options: SolverOptions) -> Flops:
    """Of `magnitude` and of `wanda`: their errors, as choosing takes comparisons only."""
    return Flops(gram_error_flops(d1, d2))


def _kept(problem: MetricProblem, support: Tensor, options: SolverOptions) -> Factorization:
    """W on the support."""
    coefficients = problem.weight * support
    error = gram_error(problem, coefficients)
    if options.on_iteration:
        options.on_iteration(1, error)
    return Factorization(None, coefficients, support, [error])
