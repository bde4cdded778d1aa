"""Trellis-coded levels: cheapest paths against all paths, the implementations against each other, errors against the
bound of rate-distortion theory, sizes against what was asked."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi import native
from cospadi.errors import UserError
from cospadi.format.codecs.ec import EC
from cospadi.solvers import Grid, MetricProblem, SolverOptions
from cospadi.solvers import trellis as solver
from cospadi.solvers.gram import damped_factor
from cospadi.solvers.problem import Coded
from cospadi.stages.solve import coder


def problem_of(
    d1: int, d2s: tuple[int, ...], seed: int = 0, condition: float = 0.0, outputs: bool = False
) -> MetricProblem:
    """Gaussian weights; inputs that share a direction as much as `condition` says."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d1, sum(d2s), generator=generator)
    x = torch.randn(4 * d1, d1, generator=generator)
    x = x + condition * torch.randn(4 * d1, 1, generator=generator)
    costs = tuple(torch.rand(d2, generator=generator) + 0.01 for d2 in d2s) if outputs else ()
    return MetricProblem(weight, x.T @ x, costs, d2s)


def loss(problem: MetricProblem, found: Coded) -> float:
    """The error that is to be small, in that of zeros."""
    weight = problem.weight.double()
    error = weight - torch.cat([member.weight for member in found.members], 1).double()
    costs = torch.cat(problem.outputs).double() if problem.outputs else torch.ones(weight.shape[1]).double()
    assert problem.gram is not None
    gram = problem.gram.double()
    return float((error * (gram @ error) * costs).sum() / (weight * (gram @ weight) * costs).sum())


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=12), st.integers(-8, 12), st.sampled_from([True, False]))
@settings(max_examples=60, deadline=None)
def test_the_path_is_the_cheapest_of_all(numbers: list[float], width: int, compiled: bool) -> None:
    """Against all symbols in all states, by dynamic programming in plain Python."""
    code, target = coder(), torch.tensor([numbers])
    zeros = torch.zeros(len(numbers)).short()
    widths = Grid(zeros, torch.tensor([width]).short())
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(native, "library", lambda: None)
        found = solver.quantize(target, torch.eye(1), 1.0, Grid(zeros, zeros[:1]), widths, code)[0].tolist()
    prices = (code.bits[width - code.lowest] * solver.PRICE).tolist()
    best, mine, state = {0: 0.0}, 0.0, 0
    for number, level in zip(target[0].tolist(), found, strict=True):
        reached: dict[int, float] = {}
        for before, cost in best.items():
            for symbol in range(-8, 9):
                after = code.transitions[before][symbol & 1]
                reached[after] = min(reached.get(after, math.inf), cost + price(number, symbol, before, prices))
        best = reached
        symbol = int(math.copysign((abs(level) + (state & 1)) // 2, level))
        assert level == 2 * symbol - (state & 1) * ((symbol > 0) - (symbol < 0))
        mine += price(number, symbol, state, prices)
        state = code.transitions[state][symbol & 1]
    assert mine == pytest.approx(min(best.values()), rel=1e-4, abs=1e-4)


def price(number: float, symbol: int, state: int, prices: list[list[float]]) -> float:
    """The squared error of a symbol in a state, and what its bits cost."""
    level = 2 * symbol - (state & 1) * ((symbol > 0) - (symbol < 0))
    return (number - level) ** 2 + prices[state & 1][abs(symbol)]


@pytest.mark.skipif(native.library() is None, reason="the C++ library was not built")
@pytest.mark.parametrize("d2", [1, 63, 150])
def test_both_implementations_choose_the_same(d2: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, code = problem_of(70, (d2,), condition=1.0), coder()
    assert problem.gram is not None
    factor = damped_factor(problem.gram).float()
    steps = solver.quarter_octaves(factor.diagonal())
    widths = Grid(torch.zeros(d2).short(), torch.full((70,), 6).short())
    given = problem.weight, factor, 0.3, Grid(widths.rows, steps), widths, code
    compiled = solver.quantize(*given)
    monkeypatch.setattr(native, "library", lambda: None)
    assert (compiled == solver.quantize(*given)).float().mean() > 0.99  # sums differ in the last place


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The kernel, in Triton's interpreter where there is no GPU; no failure of it is remembered after the test."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from cospadi.solvers import triton_trellis

    if not torch.cuda.is_available() and not triton_trellis.INTERPRETED:
        pytest.skip("there is no GPU and TRITON_INTERPRET is not 1")
    monkeypatch.setattr(triton_trellis, "_failed", [])
    monkeypatch.setattr(triton_trellis, "CHUNK", 16)
    monkeypatch.setattr(solver, "_kernels", lambda weight: triton_trellis)
    solver._warn.cache_clear()
    return triton_trellis


class Run:
    """Random inputs of a run, as the implementations are given them; classes also beyond both ends."""

    def __init__(self, inputs: int, d2: int, rows: int, spread: float, whole: bool = False) -> None:
        generator = torch.Generator().manual_seed(d2)
        self.target = spread * torch.randn(inputs, d2, generator=generator)
        feedback = torch.randn(inputs, inputs, generator=generator).triu(1) / 3
        steps, scales, pivots = (0.5 + torch.rand(size, generator=generator) for size in (inputs, d2, inputs))
        self.code, self.rows = coder(), rows
        prices = self.code.bits * solver.PRICE
        cols = torch.randint(-4, len(prices) + 4, (inputs,), generator=generator).short() + self.code.lowest
        own = torch.randint(-6, 6, (d2,), generator=generator).short()
        if whole:  # numbers that are equally far from two levels, and levels that cost the same
            self.target, feedback, prices = self.target.round(), feedback.round(), torch.zeros_like(prices)
            steps, scales, pivots = steps.round(), torch.ones(d2), torch.ones(inputs)
        self.given = feedback + pivots.diag(), steps, scales, Grid(own, cols), prices

    def on(self, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        factor, steps, scales, widths, prices = self.given
        there = Grid(*(part.to(device) for part in widths))
        rest = (part.to(device) for part in (factor, steps, scales))
        target, prices = self.target.to(device), prices.to(device)
        levels, errors = solver._quantize_run(target, *rest, there, prices, self.code, self.rows)
        return levels.cpu(), errors.cpu()


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("inputs", "d2", "rows", "spread"),
    [(1, 1, 1, 1.0), (3, 3, 1, 9.0), (4, 7, 8, 3.0), (6, 23, 10, 3.0), (3, 40, 33, 500.0), (2, 21, 20, 1e6)],
)
def test_the_kernel_chooses_the_same(
    inputs: int, d2: int, rows: int, spread: float, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(inputs, d2, rows, spread)
    levels, errors = run.on("cpu" if kernels.INTERPRETED else "cuda")
    monkeypatch.setattr(solver, "_kernels", lambda weight: None)
    monkeypatch.setattr(native, "library", lambda: None)
    expected = run.on("cpu")
    assert levels.dtype == torch.int16
    assert torch.equal(levels, expected[0])
    assert torch.equal(errors, expected[1])


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_the_kernel_takes_the_first_of_equal_ones(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(4, 24, 12, 4.0, whole=True)
    levels, _ = run.on("cpu" if kernels.INTERPRETED else "cuda")
    monkeypatch.setattr(solver, "_kernels", lambda weight: None)
    assert torch.equal(levels, run.on("cpu")[0])
    monkeypatch.setattr(native, "library", lambda: None)
    assert torch.equal(levels, run.on("cpu")[0])


def quantized(d2: int, device: str = "cpu") -> torch.Tensor:
    """Levels of 10 inputs, in runs of 4."""
    problem, code = problem_of(10, (d2,), condition=1.0), coder()
    assert problem.gram is not None
    factor = damped_factor(problem.gram).float()
    steps, zeros = solver.quarter_octaves(factor.diagonal()).to(device), torch.zeros(d2).short().to(device)
    widths = Grid(zeros, torch.full((10,), 6).short().to(device))
    given = problem.weight.to(device), factor.to(device), 0.3, Grid(zeros, steps), widths, code
    return solver.quantize(*given).cpu()


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_runs_of_the_kernel_follow_each_other(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "RUN", 4)
    found = quantized(9, "cpu" if kernels.INTERPRETED else "cuda")
    monkeypatch.setattr(solver, "_kernels", lambda weight: None)
    assert (found == quantized(9)).float().mean() > 0.95  # a sum that differs in the last place changes later levels


def test_the_cpu_stands_in_for_a_kernel_that_does_not_compile(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected, run = quantized(9), MagicMock()
    launch = run.__getitem__.return_value
    launch.side_effect = RuntimeError("PassManager::run failed\nand more")
    monkeypatch.setattr(kernels, "_run", run)
    for _ in range(2):
        found = quantized(9, "cpu" if kernels.INTERPRETED else "cuda")
        assert (found == expected).float().mean() > 0.95
    assert launch.call_count == 1, "it should not be compiled again"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages[0].endswith("instead: RuntimeError: PassManager::run failed")


def test_want_of_memory_is_no_fault_of_the_kernel(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    run = MagicMock()
    run.__getitem__.return_value.side_effect = torch.OutOfMemoryError("out of memory")
    monkeypatch.setattr(kernels, "_run", run)
    device = "cpu" if kernels.INTERPRETED else "cuda"
    with pytest.raises(torch.OutOfMemoryError):
        quantized(9, device)
    assert kernels.can_quantize(torch.empty(0, device=device))


COMPILED = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cospadi.solvers import triton_trellis as kernels

TYPES = {"cols": "*i16", "rows": "*i16", "levels": "*i16", "symbols": "*i64", "maps": "*i32", "CHUNK": "constexpr"}
NUMBERS = ("inputs", "d2", "block_rows", "last_class", "last_symbol")
names = kernels._run.arg_names
signature = {name: TYPES.get(name, "i32" if name in NUMBERS else "*fp32") for name in names}
source = ASTSource(kernels._run, signature, {(names.index("CHUNK"),): kernels.CHUNK})
options = {"num_warps": 1, "enable_fp_fusion": False}
for capability in (80, 90):
    assert compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]
print("done")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests compile the kernel")
def test_the_kernel_compiles_without_a_gpu(tmp_path: Path) -> None:
    """The interpreter takes what the compiler refuses. For Ampere and Hopper, with the assembler that Triton brings."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.parametrize("bits", [2.0, 3.0, 4.0, 6.0])
def test_independent_weights_cost_what_theory_says(bits: float) -> None:
    """A Gaussian's error at b bits is at least 4 ** -b; a trellis of eight states is 0.1 to 0.15 bits from it."""
    problem = MetricProblem(problem_of(128, (256,)).weight, None, (), (256,))
    count = problem.weight.numel()
    found = solver.trellis(problem, int(count * bits / 8), coder(), SolverOptions())
    assert 0.995 * count * bits / 8 <= found.nbytes <= count * bits / 8
    error = float((problem.weight - found.members[0].weight).square().mean())
    assert 4.0**-bits < error < 4.0 ** (0.2 - bits)


def test_feedback_and_costs_lower_the_loss() -> None:
    problem = problem_of(64, (48, 80), condition=2.0, outputs=True)
    assert problem.gram is not None
    plain = replace(problem, outputs=())
    alone = replace(problem, gram=problem.gram.diagonal().diag(), outputs=())
    code, nbytes = coder(), 64 * 128 * 3 // 8
    losses = [loss(problem, solver.trellis(one, nbytes, code, SolverOptions())) for one in (problem, plain, alone)]
    assert losses[0] < 0.95 * losses[1] < 0.8 * losses[2]


@given(st.integers(3, 40), st.lists(st.integers(2, 40), min_size=1, max_size=3), st.floats(4, 9))
@settings(max_examples=25, deadline=None)
def test_codes_are_no_larger_than_asked_and_tell_the_levels(d1: int, d2s: list[int], bits: float) -> None:
    problem = problem_of(d1, tuple(d2s), condition=0.5)
    nbytes = int(d1 * sum(d2s) * bits / 8) + sum(4 * d2 + d1 + 40 for d2 in d2s)
    found = solver.trellis(problem, nbytes, coder(), SolverOptions())
    assert found.nbytes <= nbytes
    for d2, member in zip(d2s, found.members, strict=True):
        assert torch.equal(EC.decode(member.code, [d2, d1]).T, member.weight)


def test_more_bytes_lose_less() -> None:
    problem, code = problem_of(48, (64,), condition=1.0), coder()
    losses = [
        loss(problem, solver.trellis(problem, 48 * 64 * bits // 8, code, SolverOptions())) for bits in (2, 3, 4, 6)
    ]
    assert losses == sorted(losses, reverse=True)


def test_what_has_no_code_is_refused() -> None:
    with pytest.raises(UserError, match="no code of a projection of 16 x 16 takes 20 bytes"):
        solver.trellis(problem_of(16, (16,)), 20, coder(), SolverOptions())


def test_inputs_that_are_never_there_cost_nothing() -> None:
    problem = problem_of(32, (40,))
    assert problem.gram is not None
    problem.gram[:5] = problem.gram[:, :5] = 0
    found = solver.trellis(problem, 32 * 40 * 3 // 8, coder(), SolverOptions())
    assert torch.isfinite(found.members[0].weight).all()
