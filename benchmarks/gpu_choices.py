"""Which configuration of the GPU's kernels is fastest: what the choices in `runtime/triton.py` were made by.

    python benchmarks/gpu_choices.py --json choices.json

Needs an NVIDIA GPU and Triton. Every configuration of a list is timed as `gpu.py` times, in bf16, weights cold, for
each shape and number of rows; the fastest is printed beside the one that the package chooses, and the dense product.
Other processes compile the configurations first, each its share, into Triton's cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import Mock

import gpu
import torch
import typer
from linear import even_size
from torch import Tensor

from cospadi.format.codecs import codec_of_bits
from cospadi.format.form import Form
from cospadi.runtime import reference
from cospadi.runtime import triton as kernels
from cospadi.runtime.levels import Levels
from cospadi.runtime.levels import dense as dense_levels

SHAPES = ["2048x8192", "2048x2048", "8192x2048", "2048x512", "4096x14336"]
ROWS = [1, 4, 16, 64]
RATIO = 0.4
LEVEL_BITS = [4, 6]
COLD = 3
"""Copies of the weights exceed the L2 cache this many times."""

REPLAYS = 6

Choice = tuple[int, ...]


def configurations(what: str, rows: int) -> list[Choice]:
    """What is tried; see `few_values`, `many_values`, `few_levels` and `many_levels` of `runtime/triton.py`."""
    if what == "values" and rows <= kernels.DECODE_ROWS:
        return [(2, 1), (2, 2), (2, 4), (2, 8), (4, 1), (4, 2), (4, 4)]
    if what == "values":
        tiles = [(16, 32, 4), (16, 16, 2), (64, 32, 4)] if rows <= 16 else [(64, 32, 4), (64, 64, 8)]
        return [(*tile, splits) for tile in tiles for splits in (1, 2, 4)]
    if rows <= kernels.DECODE_ROWS:
        return [(outputs, 128 * warps, warps) for outputs in (4, 8, 16) for warps in (1, 2, 4)
                if rows == 1 or outputs < 16]  # fmt: skip
    m = 16 if rows <= 16 else 64
    shapes = [(32, 64, 4, 2), (64, 32, 4, 2), (16, 64, 4, 2), (32, 64, 4, 1), (64, 64, 8, 2), (16, 128, 8, 1),
             (32, 128, 8, 2), (128, 32, 8, 2)]  # fmt: skip
    return [(m, *shape) for shape in shapes]


def chosen(what: str, rows: int) -> str:
    """The name of the function that chooses."""
    return f"{'few' if rows <= kernels.DECODE_ROWS else 'many'}_{what}"


def made(shape: str, what: str, bits: int, device: torch.device) -> tuple[Any, int, Callable[[Any, Tensor], Tensor]]:
    """Random weights, their bytes, and the product with them."""
    d1, d2 = map(int, shape.split("x"))
    if what == "levels":
        levels = gpu.random_levels(d1, d2, bits, device)
        return levels, sum(part.nbytes for part in levels), lambda one, x: kernels.level_matmul(x, one)
    k, s = even_size(Form("identity", "mask", codec_of_bits(bits)), RATIO, d1, d2)
    values = gpu.random_coefficients(k, d2, s, bits, device)
    return values, values.bytes, lambda one, x: one.times(x)


def matrix(weights: Any) -> Tensor:
    """What the weights stand for, float64 (d2, d1)."""
    if isinstance(weights, Levels):
        return dense_levels(weights).double()
    stored = weights.support, weights.values, len(weights.support), weights.k
    return reference.coefficients(*stored, "mask", codec_of_bits(weights.bits), torch.float64)


def cases(shapes: list[str], row_counts: list[int]) -> Iterator[tuple[str, str, int, int]]:
    """Shape, what, bits and rows."""
    for shape in shapes:
        for what, bits in [("values", 14), *(("levels", bits) for bits in LEVEL_BITS)]:
            for rows in row_counts:
                yield shape, what, bits, rows


def main(
    shape: Annotated[list[str] | None, typer.Option(help="d1xd2, repeatable")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="repeatable")] = None,
    save: Annotated[Path | None, typer.Option("--json", help="write everything as JSON, too")] = None,
    seconds: Annotated[float, typer.Option(help="that it may take")] = 600.0,
    share: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Try configurations and print the fastest."""
    if not torch.cuda.is_available() and not kernels.INTERPRETED:
        gpu._refuse("There is no NVIDIA GPU that torch can use on this machine: nothing was timed.")
    begun, device = time.perf_counter(), torch.device("cpu" if kernels.INTERPRETED else "cuda")
    every = list(cases(shape or SHAPES, rows or ROWS))
    if share:
        index, count = map(int, share.split("/"))
        return compile_share(every, index, count, device)
    count = max(1, (os.cpu_count() or 1) - 2)
    others = [
        subprocess.Popen(
            [sys.executable, *sys.argv, "--share", f"{i}/{count}"], env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        for i in range(count)
    ]
    for other in others:
        other.wait()
    print(f"compiled after {time.perf_counter() - begun:.0f} s", flush=True)
    cold = COLD * int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0
    found: list[dict[str, Any]] = []
    print(
        "| d1 x d2 | what | bits | rows | dense, us | package | us | x dense | fastest | us | x dense |\n"
        + "|---" * 11
        + "|"
    )
    weights: dict[str, Any] = {}
    last: tuple[str, str, int] | None = None
    for one in every:
        name, what, bits, count = one
        if time.perf_counter() - begun > seconds:
            print("stopped for want of time")
            break
        d1, d2 = map(int, name.split("x"))
        if name not in weights:
            weights = {name: gpu._copies(torch.randn(d2, d1, device=device, dtype=torch.bfloat16), 2 * d1 * d2, cold)}
        if last != one[:3]:
            first, size, product = made(name, what, bits, device)
            copies, stands_for = [_copy(first) for _ in range(cold // size + 1)], matrix(first)
            last = one[:3]
        x = torch.randn(count, d1, device=device, dtype=torch.bfloat16)
        dense = gpu._time([gpu._linear(x, weight) for weight in weights[name]], REPLAYS)[0]
        function = chosen(what, count)
        own, expected = getattr(kernels, function), x.double() @ stands_for.T
        watched = Mock(wraps=own)
        setattr(kernels, function, watched)
        package, mine = _timed(product, copies, x), own(*watched.call_args.args)
        tried: list[tuple[float, Choice]] = []
        for choice in configurations(what, count):
            setattr(kernels, function, lambda *_, choice=choice: choice)
            try:
                error = float((product(first, x).double() - expected).norm() / expected.norm())
                if not error <= 2 * gpu.TOLERANCE[torch.bfloat16]:
                    print(f"{one} {choice}: WRONG, error {error:.2e}", flush=True)
                tried.append((_timed(product, copies, x), choice))
            except Exception as error:  # whatever the compiler or the driver meets
                kernels._failed.clear()
                print(f"{one} {choice}: {error}", flush=True)
        setattr(kernels, function, own)
        best, choice = min(tried)
        found.append({"shape": name, "what": what, "bits": bits, "rows": count, "dense": dense, "package": package,
                      "chosen": mine, "bytes": size, "tried": sorted(tried)})  # fmt: skip
        cells = [name, what, bits, count, f"{dense * 1e6:.1f}"]
        for taken, configuration in ((package, mine), (best, choice)):
            cells += [configuration, f"{taken * 1e6:.1f}", f"{dense / taken:.2f}"]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
        if save:
            save.write_text(json.dumps(found) + "\n")


def compile_share(every: list[tuple[str, str, int, int]], index: int, count: int, device: torch.device) -> None:
    """Launch every configuration once that no shape before has launched, but only each `count`-th."""
    seen: dict[Any, tuple[str, str, int, int]] = {}
    for one in every:
        _, what, bits, rows = one
        for choice in [*configurations(what, rows), ()]:
            seen.setdefault((one[0] if not choice else "", what, bits, rows, choice), one)
    kinds: dict[Any, Any] = {}
    for place, ((_, what, bits, rows, choice), (shape, *_)) in enumerate(seen.items()):
        if place % count != index:
            continue
        if (shape, what, bits) not in kinds:
            kinds[shape, what, bits] = made(shape, what, bits, device)
        weights, _, product = kinds[shape, what, bits]
        function = chosen(what, rows)
        own = getattr(kernels, function)
        if choice:
            setattr(kernels, function, lambda *_, choice=choice: choice)
        try:
            product(weights, torch.randn(rows, int(shape.split("x")[0]), device=device, dtype=torch.bfloat16))
        except Exception:  # the process that times it tells
            kernels._failed.clear()
        setattr(kernels, function, own)


def _copy(weights: Any) -> Any:
    return weights.copy() if isinstance(weights, gpu.Coefficients) else Levels(*(part.clone() for part in weights))


def _timed(product: Callable[[Any, Tensor], Tensor], copies: list[Any], x: Tensor) -> float:
    return gpu._time([lambda one=one: product(one, x) for one in copies], REPLAYS)[0]  # type: ignore[misc]


if __name__ == "__main__":
    typer.run(main)
