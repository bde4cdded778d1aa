"""How fast this machine is: seconds a FLOP, from pieces like a job's that take a second in all."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cospadi.budget.plan import Group
from cospadi.calibration.grams import gram_block
from cospadi.commands.agenda import Agenda, Shape, Text
from cospadi.model import load
from cospadi.recipe import Recipe
from cospadi.solvers import Flops, Problem, SolverOptions, find_solver
from cospadi.solvers.flops import cholesky, triangular
from cospadi.solvers.products import self_product_flops

TIMED_ITERATIONS = 8
"""Of the solver runs that are timed."""

TIMED_FLOPS = {"cpu": 2e10, "cuda": 1e12}
"""FLOPs that one timed piece may have: a few hundredths of a second to some tenths."""

TIMED_WIDTH = {"cpu": 1024, "cuda": 4096}
"""Largest hidden size, and order of a float64 matrix, that is timed."""


@dataclass(frozen=True)
class Speed:
    """How fast this device is.

    Attributes:
        passes, factors: seconds a FLOP of a decoder block with a Gram, and of float64 products and factorizations.
        solver: (FLOPs, seconds) of a small and a large solver run of TIMED_ITERATIONS.
    """

    passes: float
    factors: float
    solver: tuple[tuple[float, float], tuple[float, float]]

    def solving(self, flops: float) -> float:
        """Seconds of a solver run of TIMED_ITERATIONS: on the line through the two that were timed, or beyond it."""
        (less, low), (more, high) = self.solver
        if flops >= more:
            return high * flops / more
        return low + (high - low) * max(0.0, flops - less) / max(1.0, more - less)


def measure_speed(shape: Shape, recipe: Recipe, text: Text, agenda: Agenda) -> Speed:
    """Time a decoder block, a float64 factorization and two solver runs, at the job's sizes or smaller ones."""
    device = load.pick_device(recipe.device)
    passes = _time_passes(shape, text, device) if text.sequences else 0.0
    factors = _time_factors(max(reader.d1 for reader in shape.readers), device)
    sizes = {dimensions(group) for run in agenda.runs for group in run.sizes}
    small, *_, large = sorted(sizes, key=lambda size: solver_flops(recipe, *size).total) * 2
    return Speed(passes, factors, (_time_solver(recipe, small, device), _time_solver(recipe, large, device)))


def dimensions(group: Group) -> tuple[int, int, int, float]:
    """d1, d2, k, s of all members side by side."""
    return group.d1, sum(group.d2s), group.k, group.s


def solver_flops(
    recipe: Recipe, d1: int, d2: int, k: int, s: float, iterations: int = TIMED_ITERATIONS, again: bool = True
) -> Flops:
    """Of a solver run, `again` where another size was solved before of the same A."""
    options = SolverOptions(iterations=iterations, update=recipe.update)
    return find_solver(recipe.solver).flops(d1, d2, k, s, options, again)


def _time_passes(shape: Shape, text: Text, device: torch.device) -> float:
    """Seconds a FLOP of a block like the model's: attention, a gated product in and out, the Gram of its input."""
    width = min(shape.hidden, TIMED_WIDTH[device.type])
    heads = max(1, shape.heads * width // shape.hidden)
    attention = heads * (shape.attention // shape.heads)
    rest = shape.parameters[0] * (width / shape.hidden) ** 2 - 4 * width * attention
    inner = max(width, round(rest / 3 / width))
    length = text.length
    a_token = 2.0 * (4 * width * attention + 3 * width * inner) + 4.0 * length * attention
    batch = min(text.batch, max(1, int(TIMED_FLOPS[device.type] / a_token / length)))
    options: Any = {"dtype": shape.dtype, "device": device}
    projections = [torch.randn(rows, columns, **options) * columns**-0.5 for rows, columns in (
        (3 * attention, width), (width, attention), (2 * inner, width), (width, inner)
    )]  # fmt: skip
    hidden = torch.randn(batch, length, width, **options)

    def block() -> Tensor:
        qkv, out, up, down = projections
        heads_of = nn.functional.linear(hidden, qkv).view(batch, length, 3 * heads, -1).transpose(1, 2)
        query, key, value = heads_of.chunk(3, 1)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        inside = hidden + nn.functional.linear(mixed.transpose(1, 2).flatten(2), out)
        gate, inner_value = nn.functional.linear(nn.functional.rms_norm(inside, (width,)), up).chunk(2, -1)
        gram_block(hidden, hidden, "")
        return inside + nn.functional.linear(nn.functional.silu(gate) * inner_value, down)

    return _seconds(block, device) / (batch * length * a_token + self_product_flops(batch * length, width))


def _time_factors(d1: int, device: torch.device) -> float:
    """Seconds a FLOP of a Cholesky factor and a triangular solve in float64."""
    n = min(d1, TIMED_WIDTH[device.type])
    matrix = torch.eye(n, dtype=torch.float64, device=device) + 1 / n

    def factors() -> Tensor:
        solution: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(matrix), matrix, upper=False)
        return solution

    return _seconds(factors, device) / (cholesky(n) + triangular(n, n))


def _time_solver(recipe: Recipe, size: tuple[int, int, int, float], device: torch.device) -> tuple[float, float]:
    """FLOPs and seconds of a solver run at a size (d1, d2, k, s), or a smaller one of the same proportions."""
    while solver_flops(recipe, *size).total > TIMED_FLOPS[device.type]:
        d1, d2, k, s = size
        size = (int(0.9 * d1), int(0.9 * d2), int(0.9 * k), 0.9 * s)
    d1, d2, k, s = size
    solver = find_solver(recipe.solver)
    problem = Problem(torch.randn(d1, d2, device=device))
    options = SolverOptions(iterations=TIMED_ITERATIONS, update=recipe.update)
    s = s if solver.free_support else max(1, round(s))
    return solver_flops(recipe, *size).total, _seconds(lambda: solver.solve(problem, k, s, options), device)


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
