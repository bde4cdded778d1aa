"""How fast this machine is: seconds of pieces like a job's, some seconds in all."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from cospadi.budget.plan import Group, forms_of
from cospadi.calibration import walk
from cospadi.calibration.gradients import output_widths
from cospadi.calibration.grams import gram_block
from cospadi.format.form import dense_bytes
from cospadi.model import load
from cospadi.model.projections import decoder_blocks
from cospadi.recipe import Recipe
from cospadi.solvers import Flops, MetricProblem, Problem, SolverOptions, find_solver
from cospadi.solvers.flops import cholesky, triangular
from cospadi.solvers.products import self_product_flops
from cospadi.stages.solve import told

log = logging.getLogger("cospadi")

TIMED_ITERATIONS = 8
"""Of the solver runs that are timed, at most."""

TIMED_FLOPS = {"cpu": 2e10, "cuda": 1e12}
"""FLOPs that one timed piece may have: a few hundredths of a second to some tenths."""

TIMED_WIDTH = {"cpu": 1024, "cuda": 4096}
"""Largest order of a float64 matrix that is timed."""


@dataclass(frozen=True)
class Size:
    """A group's problem: W (d1, sum of d2s), and what is stored of it, k and s."""

    d1: int
    d2s: tuple[int, ...]
    k: int
    s: float

    @property
    def shape(self) -> tuple[int, ...]:
        """What its FLOPs run at a speed by: a group of this shape that stores more or less runs at the same."""
        return (self.d1, *self.d2s)

    def smaller(self) -> Size:
        """The same proportions at nine tenths."""
        d2s = tuple(max(1, int(0.9 * d2)) for d2 in self.d2s)
        return Size(int(0.9 * self.d1), d2s, int(0.9 * self.k), 0.9 * self.s)


def size_of(group: Group) -> Size:
    """A group's problem."""
    return Size(group.d1, tuple(group.d2s), group.k, group.s)


Rates = dict[str | tuple[int, ...], float]
"""Seconds a FLOP of "forward" and "backward" (forward and back) of a decoder block, of "grams" and "factors" (float64),
and by `Size.shape` of a solver run."""


def measure_speed(
    model: Any, recipe: Recipe, batch: int, length: int, of_block: tuple[float, float], sizes: Sequence[Size]
) -> Rates | None:
    """Time a decoder block, a Gram, a float64 factorization and the solver, at the job's sizes or smaller ones.

    Args:
        model: on the meta device; its first block leaves it, and the others are lost.
        recipe: settled.
        of_block: FLOPs of the first block, a token: forward, and forward and back.

    Returns:
        None where the block does not run.
    """
    device = load.pick_device(recipe.device)
    rates: Rates = {"factors": _time_factors(max(size.d1 for size in sizes), device)}
    if not recipe.data_free:
        most = max(1, int(TIMED_FLOPS[device.type] / of_block[1]))
        tokens = torch.zeros(max(1, min(batch, most // length)), min(length, most), dtype=torch.int64, device=device)
        try:
            forward, backward = _time_block(model, tokens)
        except Exception as error:  # a model's class may raise anything without its weights
            log.debug("no block was timed: %s", error)
            log.warning("a block of this model does not run without its weights: no time is told")
            return None
        rates["forward"] = forward / of_block[0] / tokens.numel()
        rates["backward"] = backward / of_block[1] / tokens.numel()
        rates["grams"] = _time_grams(max(size.d1 for size in sizes), tokens.numel(), device)
    rates |= {size.shape: _time_solver(recipe, size, device) for size in {size.shape: size for size in sizes}.values()}
    return rates


def solver_flops(recipe: Recipe, size: Size, most: int | None = None) -> Flops:
    """Of a solver run by a settled recipe, of as many iterations at most."""
    solver = find_solver(recipe.solver)
    options = SolverOptions(iterations=min(recipe.iterations or 1, most or 2**31), update=recipe.update)
    blocks = [[width for d2 in size.d2s for width in output_widths(d2)]] if recipe.metric == "two-sided" else []
    flops: Flops = solver.flops(size.d1, sum(size.d2s), size.k, size.s, options, *blocks)
    return flops


def _time_block(model: Any, tokens: Tensor) -> tuple[float, float]:
    """Seconds of the model's first block, with made-up weights: forward, and forward and back as in refinement."""
    _, blocks = decoder_blocks(model)
    del blocks[1:]
    model.to_empty(device=tokens.device)
    with torch.no_grad():
        for tensor in [*blocks.parameters(), *model.buffers()]:
            tensor.fill_(0.01)
        seen, _ = walk.blocks_called(model, list(blocks), tokens, stop=True)
    _, args, kwargs = seen[0]
    block = blocks[0]
    hidden = torch.randn_like(seen[0][0])
    weights = {name: p.detach().float() for name, p in block.named_parameters() if p.ndim == 2}
    masks = {name: torch.ones_like(weight) for name, weight in weights.items()}

    def forward() -> None:
        with torch.no_grad():
            block(hidden, *args, **kwargs)

    def backward() -> None:
        codes = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        replaced = {name: (code * masks[name]).to(hidden.dtype) for name, code in codes.items()}
        output = functional_call(block, replaced, (hidden, *args), kwargs)
        (output[0] if isinstance(output, tuple) else output).float().square().sum().backward()

    block.requires_grad_(False)
    return _seconds(forward, tokens.device), _seconds(backward, tokens.device)


def _time_grams(d1: int, tokens: int, device: torch.device) -> float:
    """Seconds a FLOP of a Gram of a batch, added up in float64."""
    rows = max(1, min(tokens, int(TIMED_FLOPS[device.type] / self_product_flops(1, d1))))
    x, total = torch.randn(rows, d1, device=device), torch.zeros(d1, d1, dtype=torch.float64, device=device)
    return _seconds(lambda: total.add_(gram_block(x, x, "")), device) / self_product_flops(rows, d1)


def _time_factors(d1: int, device: torch.device) -> float:
    """Seconds a FLOP of a Cholesky factor and a triangular solve in float64."""
    n = min(d1, TIMED_WIDTH[device.type])
    matrix = torch.eye(n, dtype=torch.float64, device=device) + 1 / n

    def factors() -> Tensor:
        solution: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(matrix), matrix, upper=False)
        return solution

    return _seconds(factors, device) / (cholesky(n) + triangular(n, n))


def _time_solver(recipe: Recipe, size: Size, device: torch.device) -> float:
    """Seconds a FLOP of a solver run at a size, or a smaller one of the same proportions."""
    while (flops := solver_flops(recipe, size, TIMED_ITERATIONS).total) > TIMED_FLOPS[device.type]:
        size = size.smaller()
    solver, d1, d2 = find_solver(recipe.solver), size.d1, sum(size.d2s)
    options = SolverOptions(iterations=min(recipe.iterations or 1, TIMED_ITERATIONS), update=recipe.update)
    weight = torch.randn(d1, d2, device=device)
    if solver.identity:
        gram = None if recipe.data_free else torch.eye(d1, device=device) + 0.5
        if recipe.metric == "two-sided":
            gammas = [torch.eye(width, device=device) + 0.5 for d2 in size.d2s for width in output_widths(d2)]
        else:
            gammas = [torch.ones(d2, device=device) for d2 in size.d2s] if recipe.wants_gradients else []
        metric = MetricProblem(weight, gram, tuple(gammas), size.d2s)
        nonzeros, nbytes = min(round(size.s * d2), d1 * d2), int((1 - recipe.ratio) * dense_bytes(d1, d2))
        asked = told(solver, forms_of(recipe)[0], nonzeros, nbytes)
        return _seconds(lambda: solver.solve(metric, *asked, options), device) / flops
    s = size.s if solver.free_support else max(1, round(size.s))
    return _seconds(lambda: solver.solve(Problem(weight), size.k, s, options), device) / flops


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    """The shortest of some runs, of which the first warms up: other processes can only add to it."""
    took: list[float] = []
    while len(took) < 4 and sum(took) < 0.5:
        start = _now(device)
        function()
        took.append(_now(device) - start)
    return min(took)


def _now(device: torch.device) -> float:
    """Seconds: on one thread those of the processor, which other processes do not add to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()
