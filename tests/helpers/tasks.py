"""Tasks for the tests of pools, which processes import from here."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cospadi.jobs import carry
from cospadi.jobs.carry import Report
from cospadi.jobs.pool import Engine, Pool, Task
from cospadi.solvers import Problem, SolverOptions
from cospadi.solvers.mod_htp import mod_htp

CPU = torch.device("cpu")


def products(seed: int, size: int, report: Report) -> Tensor:
    """Float32 products, each of the one before."""
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    for step in range(4):
        matrix = torch.nn.functional.normalize(matrix @ matrix.T)
        report(step / 4, f"step {step}")
    return matrix


def solve(target: Tensor, k: int, s: int, report: Report) -> tuple[Tensor, Tensor, list[float]]:
    """What the package itself would run."""
    options = SolverOptions(iterations=8, on_iteration=lambda step, error: report(step / 8, f"error {error:.4f}"))
    solution = mod_htp(Problem(target), k, s, options)
    return solution.dictionary, solution.coefficients, solution.errors


def threads(report: Report) -> int:
    return torch.get_num_threads()


def raises(error: Exception, report: Report) -> None:
    raise error


def reports(folder: Path, report: Report) -> str:
    """Tells things until it has been heard."""
    for _ in range(600):
        report(0.5, "half")
        if (folder / "heard").exists():
            return "heard"
        time.sleep(0.1)
    return "not heard"


def dies(marker: Path, times: int, report: Report) -> str:
    """Its process is killed so many times; then it returns."""
    for attempt in range(times):
        try:
            (marker / f"death {attempt}").touch(exist_ok=False)
        except FileExistsError:
            continue
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def waits(folder: Path, index: int, seed: int, report: Report) -> Tensor:
    """Tells on which node of the Ray cluster it runs, and goes on once it may."""
    import ray

    report(0.0, ray.get_runtime_context().get_node_id())
    wait_for(folder / f"go {index}")
    result = products(seed, 300, report)
    (folder / f"done {index} {time.monotonic_ns()}").touch()
    return result


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"nobody made {path.name}"
        time.sleep(0.02)


def problems() -> list[Task]:
    generator = torch.Generator().manual_seed(0)
    targets = [torch.randn(48, 64, generator=generator, dtype=dtype) for dtype in (torch.float64, torch.float32)]
    return [Task((target, 30, 5), nbytes=2**20) for target in targets]


def contents(value: Any) -> Any:
    """A result as something whose equality means equal bytes."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().numpy().tobytes()
    return [contents(item) for item in value] if isinstance(value, (list, tuple)) else value


def run(pool: Pool, function: Callable[..., Any], tasks: list[Task]) -> list[Any]:
    results = dict(pool.map(function, tasks))
    assert sorted(results) == list(range(len(tasks)))
    return [contents(results[index]) for index in range(len(tasks))]


def here(function: Callable[..., Any], tasks: list[Task], threads: int = 1) -> list[Any]:
    with Engine(threads_per_task=threads).open(CPU) as pool:
        return run(pool, function, tasks)


class Unportable(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def raises_unportable(report: Report) -> None:
    raise Unportable("left ", "right")


def reports_or_dies(folder: Path, deadly: bool, report: Report) -> None:
    if deadly:
        wait_for(folder / "go")
        os.kill(os.getpid(), signal.SIGKILL)
    reports(folder, report)


def surroundings(report: Report) -> dict[str, Any]:
    """What a process of a pool finds."""
    found: dict[str, Any] = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")}
    found["main module"] = getattr(sys.modules["__main__"], "__file__", None)
    found["Ctrl-C is kept away"] = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    found["prints on stderr"] = sys.stdout.fileno() == 1 and os.path.samestat(os.fstat(1), os.fstat(2))
    return found


def tells_much(folder: Path, report: Report) -> str:
    """Reports more than a pipe holds."""
    before, carry.REPORT_SECONDS = carry.REPORT_SECONDS, 0.0
    try:
        for step in range(200):
            report(step / 200, "a" * 1000)
    finally:
        carry.REPORT_SECONDS = before
    (folder / "told").touch()
    return "told"


def tells_its_process(folder: Path, index: int, report: Report) -> None:
    (folder / f"new {index}").write_text(str(os.getpid()))
    (folder / f"new {index}").rename(folder / f"runs {index}")
    time.sleep(100)
