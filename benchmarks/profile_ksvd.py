"""Where K-SVD's time goes: sparse coding against dictionary update, a projection shape a row, and the costliest ops.

    python benchmarks/profile_ksvd.py --threads 1
    python benchmarks/profile_ksvd.py --shape 2048x8192 --columns 512

The target is random with a decaying spectrum (singular values i^-0.7): time does not depend on its content.
"""

from __future__ import annotations

import time
from typing import Annotated

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from cospadi.budget import accounting
from cospadi.solvers.ksvd import initial_dictionary, update_atoms, update_mod
from cospadi.solvers.omp import omp, scatter_codes

SHAPES = ["320x320", "320x864", "864x320", "1024x1024"]


def main(
    shape: Annotated[list[str] | None, typer.Option(help="d1xd2, repeatable")] = None,
    ratio: float = 0.2,
    threads: int = 1,
    columns: Annotated[int | None, typer.Option(help="code only so many columns, and scale the time up")] = None,
    ops: Annotated[bool, typer.Option(help="print the costliest ops of sparse coding of the last shape")] = True,
) -> None:
    """Print a table of seconds an iteration."""
    torch.set_num_threads(threads)
    print(f"ratio {ratio:g}, Eq. 11, {threads} threads; seconds an iteration\n")
    print("| d1 x d2 | k | s | OMP | power update | pca update | MOD | OMP share (power) |")
    print("|---|---|---|---|---|---|---|---|")
    for text in shape or SHAPES:
        d1, d2 = map(int, text.split("x"))
        k, s = accounting.eq11_size(ratio, d1, d2, 2)
        target = _target(d1, d2)
        dictionary = initial_dictionary(target, k, 42)
        gram, correlations = dictionary.T @ dictionary, dictionary.T @ target
        part = correlations[:, : columns or d2].contiguous()
        omp(gram, part[:, :8].contiguous(), min(s, 4))  # warm up
        start = time.perf_counter()
        omp(gram, part, s)
        coding = (time.perf_counter() - start) * d2 / part.shape[1]
        times = []
        if part.shape[1] == d2:
            coefficients, support = scatter_codes(*omp(gram, part, s), k)
            for method in ("power", "pca", "mod"):
                start = time.perf_counter()
                if method == "mod":
                    update_mod(target, dictionary, coefficients)
                else:
                    update_atoms(target, dictionary, coefficients, support, method)
                times.append(time.perf_counter() - start)
        cells = [f"{seconds:.3f}" for seconds in times] or ["-"] * 3
        share = f"{coding / (coding + times[0]):.0%}" if times else "-"
        print(f"| {d1} x {d2} | {k} | {s} | {coding:.3f} | {' | '.join(cells)} | {share} |", flush=True)
    if ops:
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            omp(gram, part, s)
        total = sum(event.self_cpu_time_total for event in trace.key_averages())
        print(f"\nOMP at {d1} x {d2}, share of time by op:\n")
        print("| op | share | calls |\n|---|---|---|")
        for event in sorted(trace.key_averages(), key=lambda event: -event.self_cpu_time_total)[:8]:
            print(f"| {event.key} | {event.self_cpu_time_total / total:.1%} | {event.count} |")


def _target(d1: int, d2: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(d1, min(d1, d2), generator=generator))[0]
    singular = torch.arange(1, min(d1, d2) + 1, dtype=torch.float32).pow(-0.7)
    return torch.mm(left * singular, torch.randn(min(d1, d2), d2, generator=generator))


if __name__ == "__main__":
    typer.run(main)
