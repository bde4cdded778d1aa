"""Integer levels for weights, trellis-coded with error feedback, for a coder that makes short codes of small levels.

Input i has the step c R_ii, with R^T R the inverse of the damped Gram, so that after feedback every error costs the
same (WaterSIC; the order of GPTQ, Frantar et al. 2022); an output has the scale 1 / sqrt(F_j), F_j what its errors cost
in the loss. One number, c, sets the rate: at one c for all, every input, output and projection of a model has the bits
that it is worth.

Along the outputs of an input the levels follow a trellis of eight states (trellis-coded quantization, Marcellin and
Fischer 1990, entropy-coded, Fischer and Wang 1992; the states are those of VVC's dependent quantization): a state knows
the even levels or the odd ones, and the parity of what was chosen decides about the next state. So each level is chosen
from a coarse grid, and the path from a fine one. Viterbi's algorithm finds the path with the least sum of squared
errors and PRICE times its bits, block of outputs by block. Then the errors go on to the inputs that follow.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn

from cospadi import native
from cospadi.errors import KernelError, UserError
from cospadi.solvers.flops import Flops, cholesky, triangular
from cospadi.solvers.gram import damped_factor
from cospadi.solvers.problem import Coded, Coder, Grid, Member, MetricProblem, SolverOptions
from cospadi.solvers.support import member_spans

log = logging.getLogger("cospadi")

gpu: ModuleType | None = None
if torch.cuda.is_available():  # importing Triton takes a while: not where there is no GPU
    with suppress(ImportError):
        from cospadi.solvers import triton_trellis

        gpu = triton_trellis

RUN = 64
"""Inputs whose errors are fed to all later ones in one product."""

PRICE = 0.3
"""Of a bit, in squared steps: from 0.2 to 0.45 errors at 2 bits a weight differ by 1 %, and less beyond."""

NEAR = 5e-4
"""How far below the wanted bytes a result may end, of them."""

ATTEMPTS = 8
"""Steps c that are tried for that at most, unless the recipe tells; then the first that fits is taken."""

MOST = 40
"""Steps c that are tried before none is said to fit."""

CLOSE = 1e-4
"""Octaves between two steps c whose codes differ by chance alone."""

LEAST_STEP = 0.01
"""Octaves that c changes at least."""

FITS = 4
"""Rounds in which widths of outputs and of inputs are fitted to each other."""

LARGEST = 32000.0
"""Of a level."""

TINY = 1e-30

PATH = 200
"""Operations that choose a level, about."""

MOST_OCTAVES = 13
"""Of an output's largest weight in its steps, which else are coarser: after feedback levels may be twice that."""

MOST_QUARTERS = 120
"""Of a step, in size: 2 ** 30."""

FLOOR = 0.02
"""Added to the mean square of levels where their width is fitted: not all of them need to be other than zero."""


def trellis(problem: MetricProblem, nbytes: int, coder: Coder, options: SolverOptions) -> Coded:
    """Levels whose codes take at most so many bytes, and nearly as many.

    Args:
        problem: of `outputs` the diagonals count.
        nbytes: of the codes of all members together.

    Raises:
        UserError: G has values that are not finite, or no code is so short.
    """
    weight, spans = problem.weight.float(), member_spans(problem.members)
    factor, scales = _factor(problem), _scales(problem)
    pivots, count = factor.diagonal(), weight.numel()
    middle = float(pivots.log().mean().exp())
    inputs = quarter_octaves(pivots / middle)
    relative = weight / pivots[:, None] / coder.step(scales) * middle
    widths = [fit_widths(relative[:, span]) for span in spans]
    octaves = sum(int(own.cols.sum()) * len(own.rows) + int(own.rows.sum()) * len(own.cols) for own in widths) / 4
    beside = sum(len(own.rows) + len(own.cols) + 24 for own in widths)  # bytes of steps and widths
    rate = (octaves - 8 * (nbytes - beside)) / count + 1.05  # log2 of c, were levels Gaussian and many
    widths = [own.moved(-rate) for own in widths]
    highest = quarter_octaves(relative.abs().amax(0)) + scales  # of an output's weights, in steps of its inputs
    tried: dict[float, int] = {}
    best: Coded | None = None
    while best is None or (len(tried) < options.iterations and best.nbytes < (1 - NEAR) * nbytes):
        unit = float(torch.tensor(2.0**rate))  # as float32 has it
        least = (highest.int() - round(4 * (rate + MOST_OCTAVES))).clamp(-MOST_QUARTERS, MOST_QUARTERS).short()
        rows = torch.maximum(scales, least)
        grids = [Grid(rows[span], inputs) for span in spans]
        levels = [
            quantize(weight[:, span], factor, unit, grid, own, coder)
            for span, grid, own in zip(spans, grids, widths, strict=True)
        ]
        widths = [fit_widths(one.float()) for one in levels]
        found = Coded(
            tuple(
                Member(
                    one * (unit * coder.step(grid.cols))[:, None] * coder.step(grid.rows),
                    coder.encode(one, unit, grid, own),
                )
                for one, grid, own in zip(levels, grids, widths, strict=True)
            )
        )
        tried[rate] = found.nbytes
        if found.nbytes <= nbytes and (best is None or found.nbytes > best.nbytes):
            best = found
        if best is None and len(tried) > MOST:
            raise UserError(f"no code of a projection of {len(weight)} x {weight.shape[1]} takes {nbytes:,} bytes")
        if best is not None and bool((rows > scales).all()):  # as fine as levels can be
            return best
        moved = next_rate(tried, nbytes * (1 - NEAR / 2), count)
        if best is not None and min(abs(moved - one) for one in tried) < CLOSE:
            return best
        widths, rate = [own.moved(rate - moved) for own in widths], moved
    return best


def next_rate(tried: Mapping[float, int], wanted: float, count: int) -> float:
    """The log2 of c to try next: between the two that enclose the wanted bytes, by a line; else as if an octave of c
    were a bit a weight.

    Args:
        tried: log2 of c -> bytes, at least one. count: weights.
    """
    above = max((rate for rate, nbytes in tried.items() if nbytes > wanted), default=None)
    below = min((rate for rate, nbytes in tried.items() if nbytes <= wanted), default=None)
    if above is None or below is None or not above < below:
        rate, nbytes = list(tried.items())[-1]
        change = 8 * (nbytes - wanted) / count
        return rate + math.copysign(max(abs(change), LEAST_STEP), change)
    part = (tried[above] - wanted) / (tried[above] - tried[below])
    return above + min(max(part, 0.05), 0.95) * (below - above)


def quantize(weight: Tensor, factor: Tensor, unit: float, steps: Grid, widths: Grid, coder: Coder) -> Tensor:
    """Levels of weights, int16 (d1, d2).

    On a GPU without a kernel they are chosen on the CPU, if the package's library is there: plain torch would call
    thousands of small kernels for an input.

    Args:
        weight: float32 (d1, d2) of one projection. factor: R, upper triangular, float32 (d1, d1). unit: of the steps.
    """
    kernels, device = _kernels(weight), weight.device
    if kernels is not None and kernels.can_quantize(weight):
        try:
            return _quantize(weight, factor, unit, steps, widths, coder)
        except KernelError as error:
            _warn(str(error))
    elif kernels is None and device.type != "cpu":
        _warn("Triton is not installed" if weight.is_cuda else f"there is none for {device.type}")
    if device.type == "cpu" or native.library() is None:
        return _quantize(weight, factor, unit, steps, widths, coder)
    steps, widths = (Grid(grid.rows.cpu(), grid.cols.cpu()) for grid in (steps, widths))
    return _quantize(weight.cpu(), factor.cpu(), unit, steps, widths, coder).to(device)


def _kernels(weight: Tensor) -> ModuleType | None:
    """Whose kernel chooses the levels of such weights, if it can."""
    return gpu if weight.is_cuda else None


@cache
def _warn(problem: str) -> None:
    """Log once that the kernel does not run here."""
    instead = "in plain torch, which takes long," if native.library() is None else "on the CPU"
    log.warning("a GPU kernel does not run here, levels are chosen %s instead: %s", instead, problem)


def _quantize(weight: Tensor, factor: Tensor, unit: float, steps: Grid, widths: Grid, coder: Coder) -> Tensor:
    """`quantize` on the device of its tensors."""
    (d1, d2), target = weight.shape, weight.clone()
    scales, inputs = coder.step(steps.rows), unit * coder.step(steps.cols)
    rows, prices = coder.block_rows(d1, d2), coder.bits.to(weight.device) * PRICE
    levels = torch.empty(d1, d2, dtype=torch.int16, device=weight.device)
    for start in range(0, d1, RUN):
        run = slice(start, min(start + RUN, d1))
        own = Grid(widths.rows, widths.cols[run])
        levels[run], errors = _quantize_run(
            target[run], factor[run, run].contiguous(), inputs[run], scales, own, prices, coder, rows
        )
        target[run.stop :].addmm_(factor[run, run.stop :].T, errors, alpha=-1)
    return levels


def _quantize_run(
    target: Tensor, factor: Tensor, steps: Tensor, scales: Tensor, widths: Grid, prices: Tensor, coder: Coder, rows: int
) -> tuple[Tensor, Tensor]:
    """Levels of some inputs, int16, and the errors that go on to later ones, in pivots; both (inputs, d2)."""
    classes, kernels = Grid(widths.rows, widths.cols - coder.lowest), _kernels(target)
    given = target, factor, steps, scales, classes.cols, classes.rows, prices, rows
    if kernels is not None and kernels.can_quantize(target):
        chosen: tuple[Tensor, Tensor] = kernels.quantize(*given)
        return chosen
    if target.device.type == "cpu" and native.library() is not None:
        return native.quantize(*given)
    inputs, d2 = target.shape
    blocks = -(-d2 // rows)
    levels, errors = torch.empty_like(target, dtype=torch.int16), torch.empty_like(target)
    real = torch.arange(blocks * rows, device=target.device).view(blocks, rows) < d2

    def in_blocks(row: Tensor) -> Tensor:
        return nn.functional.pad(row, (0, blocks * rows - d2)).view(blocks, rows)

    for i in range(inputs):
        magnitudes = in_blocks((target[i] / (steps[i] * scales)).abs().clamp(max=LARGEST))
        index = (classes.cols[i] + in_blocks(classes.rows)).clamp(0, len(prices) - 1).long()
        costs, symbols = _choices(magnitudes, prices[index])
        found = _cheapest_paths(costs * real[..., None], symbols, coder).flatten()[:d2]
        levels[i] = torch.where(target[i] < 0, -found, found)
        errors[i] = (target[i] - levels[i] * (steps[i] * scales)) / factor[i, i]
        target[i + 1 :] -= factor[i, i + 1 :, None] * errors[i]
    return levels, errors


def _choices(magnitudes: Tensor, prices: Tensor) -> tuple[Tensor, Tensor]:
    """For each magnitude (...) the cheapest symbol of each quantizer and parity, by its own magnitude, and its cost.

    Args:
        prices: (..., 2, symbols).

    Returns:
        Costs float32 and symbols int64, (..., 4): quantizer times two and parity.
    """
    costs, symbols = [], []
    for quantizer in (0, 1):
        for parity in (0, 1):
            place = ((magnitudes + quantizer) * 0.5).clamp(min=parity)
            first = parity + 2 * ((place - parity) * 0.5).long()
            both = torch.stack([first, first + 2], -1)
            level = (2 * both - quantizer) * (both > 0)
            price = prices[..., quantizer, :].gather(-1, both.clamp(max=prices.shape[-1] - 1))
            cost = (magnitudes[..., None] - level).square() + price
            second = cost[..., 1] < cost[..., 0]
            costs.append(torch.where(second, cost[..., 1], cost[..., 0]))
            symbols.append(torch.where(second, both[..., 1], both[..., 0]))
    return torch.stack(costs, -1), torch.stack(symbols, -1)


def _cheapest_paths(costs: Tensor, symbols: Tensor, coder: Coder) -> Tensor:
    """Magnitudes of levels, int16 (blocks, rows), along the path of least cost through the states, by Viterbi.

    Args:
        costs, symbols: (blocks, rows, 4), of `_choices`.
    """
    blocks, rows = costs.shape[:2]
    moves = [(state, parity) for state in range(len(coder.transitions)) for parity in (0, 1)]
    into = [
        [move for move in moves if coder.transitions[move[0]][move[1]] == state] for state in range(len(moves) // 2)
    ]
    sources = torch.tensor([[state for state, _ in pair] for pair in into], device=costs.device)
    branches = torch.tensor(
        [[(state & 1) * 2 + parity for state, parity in pair] for pair in into], device=costs.device
    )
    total = torch.full((blocks, len(into)), math.inf, device=costs.device)
    total[:, 0] = 0
    took = []
    for row in range(rows):
        both = total[:, sources] + costs[:, row][:, branches]
        second = both[..., 1] < both[..., 0]
        took.append(second)
        total = torch.where(second, both[..., 1], both[..., 0])
        total = total - total.amin(1, keepdim=True)
    state = total.argmin(1)
    magnitudes = torch.empty(blocks, rows, dtype=torch.int16, device=costs.device)
    for row in reversed(range(rows)):
        second = took[row].gather(1, state[:, None]).long()
        branch = branches[state].gather(1, second)
        symbol = symbols[:, row].gather(1, branch)
        magnitudes[:, row] = ((2 * symbol - (branch >> 1)) * (symbol > 0))[:, 0].to(torch.int16)
        state = sources[state].gather(1, second)[:, 0]
    return magnitudes


def fit_widths(levels: Tensor) -> Grid:
    """Widths of an output and of an input whose sum is the class of the level of both, from levels (d1, d2)."""
    squares = levels.double().square() + FLOOR
    cols, rows = squares.mean(1), torch.ones_like(squares[0])
    for _ in range(FITS):
        rows = (squares / cols[:, None]).mean(0)
        cols = (squares / rows).mean(1)
    rows, cols = 2 * torch.log2(rows), 2 * torch.log2(cols)  # quarter octaves of the root
    middle = rows.mean().round()
    return Grid((rows - middle).round().to(torch.int16), (cols + middle).round().to(torch.int16))


def _factor(problem: MetricProblem) -> Tensor:
    """R of the damped Gram, float32; I without a Gram."""
    if problem.gram is None:
        return torch.eye(len(problem.weight), device=problem.weight.device)
    return damped_factor(problem.gram).float()


def _scales(problem: MetricProblem) -> Tensor:
    """1 / sqrt(F_j) of all outputs, in quarter octaves, int16 (d2,), 0 on average."""
    weight = problem.weight
    if not problem.outputs:
        return torch.zeros(weight.shape[1], dtype=torch.int16, device=weight.device)
    costs = torch.cat([cost if cost.ndim == 1 else cost.diagonal() for cost in problem.outputs]).double()
    scales = costs.clamp(min=TINY).rsqrt()
    return quarter_octaves(scales / scales.log().mean().exp())


def quarter_octaves(numbers: Tensor) -> Tensor:
    """The nearest power of 2 ** (1 / 4), int16."""
    return (4 * torch.log2(numbers.double().clamp(min=TINY))).round().clamp(-MOST_QUARTERS, MOST_QUARTERS).short()


def flops(d1: int, d2: int, _k: int, _s: float, options: SolverOptions) -> Flops:
    """Of `trellis`, half of the steps c tried that may be: the feedback of runs of inputs to later ones as products;
    the factor of G, its inverse, the feedback inside of runs and the choice of paths as others."""
    times, runs = max(1.0, options.iterations / 2), range(RUN, d1, RUN)
    later = sum(2.0 * RUN * (d1 - end) * d2 for end in runs)
    return Flops(later * times, cholesky(d1) + triangular(d1, d1) + times * d1 * d2 * (RUN + PATH))
