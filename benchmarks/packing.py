"""Seconds to pack and unpack the coefficients of one projection.

python benchmarks/packing.py --d1 2048 --d2 8192 --ratio 0.2 --output docs/performance/packing.md
"""

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from cospadi.budget import accounting
from cospadi.format import packing
from cospadi.format.form import Form


def main(
    d1: int = 2048,
    d2: int = 8192,
    ratio: float = 0.2,
    threads: int = 1,
    repeats: int = 5,
    output: Annotated[Path | None, typer.Option(help="a page to write; without it it is printed")] = None,
) -> None:
    """The median of each step."""
    torch.set_num_threads(threads)
    k, s = accounting.exact_size(accounting.byte_budget(ratio, d1, [d2]), Form("stored", "mask", "f14"), d1, [d2], 2.0)
    generator = torch.Generator().manual_seed(0)
    support = torch.zeros(d2, k, dtype=torch.bool)
    support.scatter_(1, torch.rand(d2, k, generator=generator).topk(s).indices, True)
    values = torch.randn(d2 * s, generator=generator)
    mask, stream = packing.pack_support(support), packing.pack_values(values, 14)
    steps: dict[str, Callable[[], object]] = {
        "pack support": lambda: packing.pack_support(support),
        "pack values, 14 bits": lambda: packing.pack_values(values, 14),
        "unpack values, 14 bits": lambda: packing.unpack_values(stream, len(values), 14),
        "unpack to dense S": lambda: packing.unpack_coefficients(mask, values, k),
        "count mask bits": lambda: packing.popcount(mask),
    }
    lines = ["# Packing and unpacking one projection", "", f"Written by `python {shlex.join(sys.argv)}`.", ""]
    lines += [f"{d1} x {d2}, k {k}, s {s}, {len(values):,} nonzeros, {threads} threads", ""]
    lines += ["| step | seconds |", "|---|---|"]
    for name, step in steps.items():
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        lines.append(f"| {name} | {sorted(times)[repeats // 2]:.3f} |")
    text = "\n".join(lines) + "\n"
    if output is None:
        print(text)
    else:
        output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
