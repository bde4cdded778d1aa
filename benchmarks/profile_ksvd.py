"""Where K-SVD's time goes: sparse coding against dictionary update, a projection shape a row, and the costliest ops.

    python benchmarks/profile_ksvd.py --threads 1 --threads 2
    python benchmarks/profile_ksvd.py --shape 2048x8192 --columns 512

The target is random with a decaying spectrum (singular values i^-0.7): time does not depend on its content.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cospadi.budget import accounting
from cospadi.solvers.ksvd import initial_dictionary, update_atoms, update_mod
from cospadi.solvers.omp import omp, scatter_codes

SHAPES = ["320x320", "320x864", "864x320", "1024x1024"]


def main(
    shape: Annotated[list[str] | None, typer.Option(help="d1xd2, repeatable")] = None,
    ratio: float = 0.2,
    threads: Annotated[list[int] | None, typer.Option(help="repeatable  [default: 1]")] = None,
    columns: Annotated[int | None, typer.Option(help="code only so many columns, and scale the time up")] = None,
    ops: Annotated[bool, typer.Option(help="add the costliest ops of sparse coding of the last shape")] = True,
    output: Annotated[Path | None, typer.Option(help="a page to write; without it it is printed")] = None,
) -> None:
    """A table of seconds an iteration for each number of threads; the ops at the first of them."""
    lines = ["# Where K-SVD's time goes", "", f"Written by `python {shlex.join(sys.argv)}`."]
    for index, count in enumerate(threads or [1]):
        torch.set_num_threads(count)
        lines += _seconds(shape or SHAPES, ratio, columns, count)
        if ops and index == 0:
            lines += _ops((shape or SHAPES)[-1], ratio, columns)
    text = "\n".join(lines) + "\n"
    if output is None:
        print(text)
    else:
        output.write_text(text, encoding="utf-8")


def _seconds(shapes: list[str], ratio: float, columns: int | None, threads: int) -> list[str]:
    lines = [
        "",
        f"ratio {ratio:g}, Eq. 11, {threads} threads; seconds an iteration",
        "",
        "| d1 x d2 | k | s | OMP | power update | pca update | MOD | OMP of both (power) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape in shapes:
        target, dictionary, gram, part, s = _problem(shape, ratio, columns)
        (d1, d2), k = target.shape, len(gram)
        omp(gram, part[:, :8].contiguous(), min(s, 4))  # warm up
        start = time.perf_counter()
        codes = omp(gram, part, s)
        coding = (time.perf_counter() - start) * d2 / part.shape[1]
        times = []
        if part.shape[1] == d2:
            coefficients, support = scatter_codes(*codes, k)
            for method in ("power", "pca", "mod"):
                start = time.perf_counter()
                if method == "mod":
                    update_mod(target, dictionary, coefficients)
                else:
                    update_atoms(target, dictionary, coefficients, support, method)
                times.append(time.perf_counter() - start)
        cells = [f"{seconds:.3f}" for seconds in times] or ["-"] * 3
        of_both = f"{coding / (coding + times[0]):.0%}" if times else "-"
        lines.append(f"| {d1} x {d2} | {k} | {s} | {coding:.3f} | {' | '.join(cells)} | {of_both} |")
    return lines


def _ops(shape: str, ratio: float, columns: int | None) -> list[str]:
    target, _, gram, part, s = _problem(shape, ratio, columns)
    d1, d2 = target.shape
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        omp(gram, part, s)
    total = sum(event.self_cpu_time_total for event in trace.key_averages())
    costliest = sorted(trace.key_averages(), key=lambda event: -event.self_cpu_time_total)[:8]
    return [
        "",
        f"OMP at {d1} x {d2}, time by op:",
        "",
        "| op | of the time | calls |",
        "|---|---|---|",
        *(f"| {event.key} | {event.self_cpu_time_total / total:.1%} | {event.count} |" for event in costliest),
    ]


def _problem(shape: str, ratio: float, columns: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Target (d1, d2), dictionary (d1, k), its Gram (k, k), the correlations that are coded (k, columns), and s."""
    d1, d2 = map(int, shape.split("x"))
    k, s = accounting.eq11_size(ratio, d1, d2, 2)
    target = _target(d1, d2)
    dictionary = initial_dictionary(target, k, 42)
    part = (dictionary.T @ target)[:, : columns or d2].contiguous()
    return target, dictionary, dictionary.T @ dictionary, part, s


def _target(d1: int, d2: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(d1, min(d1, d2), generator=generator))[0]
    singular = torch.arange(1, min(d1, d2) + 1, dtype=torch.float32).pow(-0.7)
    return torch.mm(left * singular, torch.randn(min(d1, d2), d2, generator=generator))


if __name__ == "__main__":
    typer.run(main)
