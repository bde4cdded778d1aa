"""SparseGPT (Frantar and Alistarh, ICML 2023): one pass over the inputs; later weights make up for those removed.

With R^T R the inverse of the damped Gram, R upper triangular, removing w at input i costs (w / R_ii)^2, once the inputs
after i have made up for it, and they do so by giving up w / R_ii times their entries in row i of R.
"""

from __future__ import annotations

import torch

from cospadi.solvers.flops import Flops, cholesky, triangular
from cospadi.solvers.gram import damped_factor, gram_error, gram_error_flops, live_inputs
from cospadi.solvers.problem import Factorization, MetricProblem, SolverOptions
from cospadi.solvers.support import even_portions, largest_of_all, member_spans

BLOCK = 128
"""Inputs whose mask is chosen at once, over all outputs of a projection."""


def sparsegpt(problem: MetricProblem, nonzeros: int, options: SolverOptions) -> Factorization:
    """Blocks of 128 inputs at one density: in each the entries that cost most to remove stay, over all its outputs.

    As published, every projection of a group has that density, too; G's damping is 1 % of its mean diagonal. Inputs
    that were always zero get zeros, which may be stored. `outputs` is not used; without G, G = I.
    The factor of G's inverse is computed in float64, the rest in float32. Memory: five matrices of the size of G in
    float64, two of the size of W.

    Raises:
        UserError: G has values that are not finite.
    """
    weight = problem.weight.float().clone()
    d1 = len(weight)
    gram = torch.eye(d1).to(weight) if problem.gram is None else problem.gram
    weight[~live_inputs(gram)] = 0
    factor = damped_factor(gram).float()
    pivots = factor.diagonal()[:, None]
    support = torch.empty_like(weight, dtype=torch.bool)
    spans, portions = member_spans(problem.members), even_portions(nonzeros, problem.members, d1)
    for start in range(0, d1, BLOCK):
        end = min(start + BLOCK, d1)
        block, kept, pivot = weight[start:end], support[start:end], pivots[start:end]
        for member, portion in zip(spans, portions, strict=True):
            scores = (block[:, member] / pivot).abs().contiguous()
            kept[:, member] = largest_of_all(scores, portion * end // d1 - portion * start // d1)
        removed = torch.empty_like(block)
        for i in range(end - start):
            torch.div(block[i].masked_fill(kept[i], 0), pivot[i], out=removed[i])
            block[i + 1 :].addr_(factor[start + i, start + i + 1 : end], removed[i], alpha=-1)
        block *= kept
        weight[end:].addmm_(factor[start:end, end:].T, removed, alpha=-1)
    error = gram_error(problem, weight)
    if options.on_iteration:
        options.on_iteration(1, error)
    return Factorization(None, weight, support, [error])


def flops(d1: int, d2: int, nonzeros: int, options: SolverOptions) -> Flops:
    """Of `sparsegpt`: every pair of inputs for each output, the factor of G, its inverse, and the error."""
    return Flops(float(d1) * (d1 - 1) * d2 + gram_error_flops(d1, d2), cholesky(d1) + triangular(d1, d1))
