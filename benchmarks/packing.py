"""Seconds to pack and unpack the coefficients of one projection.

python benchmarks/packing.py --d1 2048 --d2 8192 --ratio 0.2
"""

import time
from collections.abc import Callable

import torch
import typer

from cospadi.budget import accounting
from cospadi.format import packing


def main(d1: int = 2048, d2: int = 8192, ratio: float = 0.2, threads: int = 1, repeats: int = 5) -> None:
    """Print the median of each step."""
    torch.set_num_threads(threads)
    k, s = accounting.exact_size(accounting.byte_budget(ratio, d1, [d2]), d1, [d2], 2.0, 14)
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
    print(f"{d1} x {d2}, k {k}, s {s}, {len(values):,} nonzeros, {threads} threads\n\n| step | seconds |\n|---|---|")
    for name, step in steps.items():
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        print(f"| {name} | {sorted(times)[repeats // 2]:.3f} |")


if __name__ == "__main__":
    typer.run(main)
