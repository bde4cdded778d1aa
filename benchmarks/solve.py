"""Solvers against each other: error, seconds and how much of them is matrix products, at real shapes.

    python benchmarks/solve.py run --shape Llama-3.2-1B --solver mod-htp --iterations 60 --threads 1
    python benchmarks/solve.py run --shape 2048x8192 --solver ksvd --iterations 2
    python benchmarks/solve.py projections MODEL --calibration FILE --ratio 0.3
    python benchmarks/solve.py table --output docs/performance/solvers.md
    python benchmarks/solve.py figure

`run` and `projections` keep a row a file and skip what is there; `table` and `figure` read the files.

The whitened matrices A = L W of `run` are synthetic: W Gaussian with log-normal column norms (standard deviation of the
logarithm 0.4), eigenvalues of the covariance L^T L falling as i^-0.9 exp(-(i / d1)^2), in a random basis. That is what
the projections of tiny-llama look like: eigenvalues fall as i^-0.9 at first and steeper at the end, norms of neurons'
weights differ by 0.4 to 0.6 and those of other outputs by 0.1, and the singular values of W itself are those of a
Gaussian matrix. Errors of mod-htp in relation to those of truncated SVD come out within some 5 % of the real ones.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from cospadi.budget.accounting import byte_budget, eq11_size, exact_rank, exact_size
from cospadi.budget.plan import Group
from cospadi.format.codecs import codec_of_bits
from cospadi.format.form import Form
from cospadi.jobs.ledger import Ledger
from cospadi.jobs.pool import Engine
from cospadi.jobs.progress import Stages
from cospadi.model import load
from cospadi.recipe import CACHE_BYTES, Recipe
from cospadi.solvers import SOLVERS, Problem, SolverOptions
from cospadi.solvers.mod_htp import EXACT_FRACTION, _scheduled
from cospadi.solvers.products import bf16_is_fast, float32_products, self_product
from cospadi.solvers.support import CACHED_ENTRIES, row_blocks
from cospadi.stages.measure import measured_groups
from cospadi.stages.open import opened
from cospadi.stages.solve import pack, solve
from cospadi.stages.text import read_text

RESULTS = Path(__file__).parent / "results" / "solve"
KSVD_RESULTS = Path(__file__).parent / "results" / "quality"
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "solvers.svg"

MODELS = {
    "Llama-3.2-1B": ["2048x2048", "2048x512", "2048x3072", "2048x8192", "2048x16384", "8192x2048"],
    "Llama-3-8B": ["4096x4096", "4096x1024", "4096x14336", "14336x4096"],
    "Qwen3-8B": ["4096x4096", "4096x1024", "4096x12288", "12288x4096"],
}
"""Projections d1 x d2: q or o, k or v, (q|k|v,) gate or up, (gate|up,) down."""

DIRECT = ("eigen", "svd-llm", "svd")
"""Solvers without iterations."""

PAPER_ITERATIONS = 60
RHO, BITS = 2.0, 14
app = typer.Typer(add_completion=False)


@app.command()
def run(
    shape: Annotated[list[str] | None, typer.Option(help="d1xd2 or a model's name, repeatable")] = None,
    solver: Annotated[list[str] | None, typer.Option(help="repeatable")] = None,
    iterations: Annotated[list[int] | None, typer.Option(help="repeatable")] = None,
    ratio: float = 0.3,
    accounting: Annotated[str, typer.Option(help="exact or eq11: where k and s come from")] = "exact",
    threads: int = 1,
    device: str = "auto",
) -> None:
    """Compute the rows that are missing."""
    torch.set_num_threads(threads)
    place = load.pick_device(device)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in [one for text in shape or ["Llama-3.2-1B"] for one in MODELS.get(text, [text])]:
        d1, d2 = map(int, name.split("x"))
        target: Tensor | None = None
        for one in solver or ["mod-htp"]:
            for count in [1] if one in DIRECT else iterations or [PAPER_ITERATIONS]:
                path = RESULTS / f"{name}-{accounting}-{ratio:g}-{one}-{count}-{place.type}-{threads}.json"
                if path.exists():
                    continue
                if target is None:
                    target = synthetic_target(d1, d2).to(place)
                row = _row(target, one, count, ratio, accounting)
                row |= {"threads": threads, "device": _device_name(place), "versions": _versions()}
                _save(path, row)


def synthetic_target(d1: int, d2: int) -> Tensor:
    """A = L W as this file's docstring says, float32 (d1, d2).

    L W is Gaussian with standard deviations sqrt(eigenvalue) along the basis, which is a Hartley transform between two
    changes of signs.
    """
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(1, d1 + 1, dtype=torch.float32)
    spread = (index.pow(-0.9) * torch.exp(-((index / d1) ** 2))).sqrt()
    matrix = torch.randn(d1, d2, generator=generator) * spread[:, None]
    matrix *= torch.exp(0.4 * torch.randn(d2, generator=generator))
    signs = torch.randint(0, 2, (2, d1), generator=generator) * 2.0 - 1
    for block in row_blocks(slice(0, d2), 1024):
        turned = torch.fft.fft(signs[0, :, None] * matrix[:, block], dim=0, norm="ortho")
        matrix[:, block] = signs[1, :, None] * (turned.real - turned.imag)
    return matrix


def _row(target: Tensor, solver: str, iterations: int, ratio: float, accounting: str) -> dict[str, Any]:
    (d1, d2), device = target.shape, target.device
    allowed = byte_budget(ratio, d1, [d2])
    if accounting == "eq11":
        k, s = eq11_size(ratio, d1, d2, RHO)
    else:
        k, s = exact_size(allowed, Form("stored", "mask", codec_of_bits(BITS)), d1, [d2], RHO)
    if SOLVERS[solver].support == "full":
        k, s = exact_rank(allowed, Form("stored", "full", "bf16"), d1, [d2]), 0
    stamps: list[float] = []
    errors: list[float] = []

    def note(_iteration: int, error: float) -> None:
        stamps.append(time.perf_counter() - start)
        errors.append(error)

    _synchronize(device)
    memory = _PeakMemory(device)
    start = time.perf_counter()
    solution = SOLVERS[solver].solve(Problem(target), k, s, SolverOptions(iterations=iterations, on_iteration=note))
    assert solution.dictionary is not None
    _synchronize(device)
    seconds = time.perf_counter() - start
    steps = [after - before for before, after in pairwise(stamps)]
    row = {
        "shape": f"{d1}x{d2}",
        "ratio": ratio,
        "accounting": accounting,
        "solver": solver,
        "k": k,
        "s": s,
        "iterations": iterations,
        "error": _error(target, solution.dictionary, solution.coefficients),
        "seconds": seconds,
        "seconds_start": max(0.0, stamps[0] - statistics.median(steps)) if steps else None,
        "errors": errors,
        "stamps": stamps,
        "settled_from": next(
            (i for i in range(len(errors)) if solver != "mod-htp" or _is_settled(i + 1, iterations, d1, d2, k, s)), None
        ),
        "peak_bytes": memory.taken(),
    }
    if solver == "mod-htp":
        quick = steps[: max(0, int(iterations * (1 - EXACT_FRACTION)) - 1)]
        bare = bare_products(target, k)
        flops = iteration_flops(d1, d2, k)
        row |= {"flops": flops, "bare_seconds": bare, "bare_tflops": flops / bare / 1e12}
        if quick:
            seconds_iteration = statistics.mean(quick)
            row |= {
                "seconds_iteration": seconds_iteration,
                "tflops": flops / seconds_iteration / 1e12,
                "share_of_bare": bare / seconds_iteration,
            }
    return row


def _is_settled(iteration: int, iterations: int, d1: int, d2: int, k: int, s: int) -> bool:
    return _scheduled(iteration / iterations, d2 * min(k, d1, d2), s * d2) == s * d2


def iteration_flops(d1: int, d2: int, k: int) -> int:
    """Floating-point operations of the matrix products in one iteration of mod-htp, two for each multiply-and-add.

    With d1 no more than d2, which is all that it works in. D^T A and S A^T: 2 d1 k d2 each. Gradient step and codes:
    four products of S and G of 2 d2 k^2. D^T D and S S^T: 2 d1 k^2 and 2 d2 k^2, of which five eighths from k = 512 on.
    Cholesky factor and its solve, which are no products, do not count.
    """
    d1 = min(d1, d2)
    squares = 2 * (d1 + d2) * k * k
    return 4 * d1 * k * d2 + 8 * d2 * k * k + (squares if k < 512 else squares * 5 // 8)


def bare_products(target: Tensor, k: int, repeats: int = 3) -> float:
    """Seconds of the same products and nothing else: same sizes, blocks, and precision as in mod-htp's iterations.

    Operands of bf16 products are bf16 already, and random. The best of several rounds, after one to warm up.
    """
    (d1, d2), device = (min(target.shape), target.shape[1]), target.device
    columns = target[:d1].T.contiguous()
    generator = torch.Generator(device=device).manual_seed(0)
    atoms = torch.randn(k, d1, generator=generator, device=device)
    codes = torch.randn(d2, k, generator=generator, device=device)
    low = torch.bfloat16 if bf16_is_fast(device) else torch.float32
    codes_low, coherence = codes.to(low), torch.randn(k, k, generator=generator, device=device).to(low)
    blocks = row_blocks(slice(0, d2), max(1, CACHED_ENTRIES[device.type] // max(k, d1)))
    atoms_t = atoms.T.contiguous()
    best = float("inf")
    for _ in range(repeats + 1):
        _synchronize(device)
        start = time.perf_counter()
        with float32_products("medium"):
            self_product(atoms_t)
            for block in blocks:
                torch.mm(columns[block], atoms_t)
                for _ in range(4):
                    torch.mm(codes_low[block], coherence)
            self_product(codes)
            torch.mm(codes.T, columns)
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


@app.command()
def projections(
    model: Path,
    calibration: Annotated[str, typer.Option(help="the text that the stored K-SVD rows were calibrated on")],
    ratio: Annotated[list[float] | None, typer.Option(help="repeatable; each has a stored K-SVD row")] = None,
    iterations: int = PAPER_ITERATIONS,
    threads: int = 1,
    limit: Annotated[int | None, typer.Option(help="only so many projections, and nothing is stored")] = None,
) -> None:
    """mod-htp against the stored K-SVD errors of every projection of a model, with the same k and s, alone, unweighted.

    Errors are those of the factors as stored: bf16 dictionary, 14-bit values.
    """
    torch.set_num_threads(threads)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for one in ratio or [0.2, 0.3, 0.4, 0.5]:
        path = RESULTS / f"{model.name}-projections-{one:g}-{iterations}-{threads}.json"
        if not path.exists():
            stored = json.loads((KSVD_RESULTS / f"{model.name}-paper-{one:g}.json").read_text())
            row = _projections_row(model, calibration, one, iterations, stored["relative_errors"], limit)
            row |= {"threads": threads, "device": _device_name(torch.device("cpu")), "versions": _versions()}
            if limit is None:
                _save(path, row)
            else:
                print(json.dumps(row))


def _projections_row(
    folder: Path, calibration: str, ratio: float, iterations: int, ksvd_errors: dict[str, float], limit: int | None
) -> dict[str, Any]:
    recipe = Recipe.build(
        {"ratio": ratio, "method": "paper", "calibration": calibration, "rho": RHO},
    )
    found: dict[str, dict[str, Any]] = {}
    ksvd_seconds: dict[str, float] = {}
    with opened(folder, recipe, None, Stages(), Engine(), Ledger(), CACHE_BYTES) as job:
        groups = job.uniform.groups[:limit]
        read_text(job)
        for block in measured_groups(job, groups):
            for group, whitening, _ in block.measure(block.sets[0]):
                given = job.task(group, whitening, None).payload[0]
                ours = replace(given, recipe=given.recipe.model_copy(update={"solver": "mod-htp"}))
                (name, shape), target = _name_and_shape(group), whitening.apply(given.weight)
                if shape not in ksvd_seconds:
                    start = time.perf_counter()
                    solve(given, 2)
                    ksvd_seconds[shape] = (time.perf_counter() - start) / 2 * PAPER_ITERATIONS
                start = time.perf_counter()
                solution = solve(ours, iterations)
                seconds = time.perf_counter() - start
                energy = torch.linalg.svdvals(target).square()
                found[name] = {
                    "shape": shape,
                    "k": group.k,
                    "s": round(group.s),
                    "error": pack(ours, solution).errors[name],
                    "error_ksvd": ksvd_errors[name],
                    "error_rank_k": float((energy[group.k :].sum() / energy.sum()).sqrt()),
                    "seconds": seconds,
                    "seconds_ksvd": ksvd_seconds[shape],
                }
    return {"model": folder.name, "ratio": ratio, "iterations": iterations, "projections": found}


def _name_and_shape(group: Group) -> tuple[str, str]:
    return group.members[0].name, f"{group.d1}x{sum(group.d2s)}"


@app.command()
def table(output: Annotated[Path | None, typer.Option(help="the page; without it it is printed")] = None) -> None:
    """Every row there is as Markdown."""
    if output is None:
        print(page())
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page(), encoding="utf-8")


def page() -> str:
    """The page of all rows there are."""
    rows = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    of_models = [row for row in rows if "projections" in row]
    lines = [HEADER]
    if of_models:
        lines += [PROJECTIONS_HEAD, *(_projections_line(row) for row in of_models)]
    order = {solver: index for index, solver in enumerate(SOLVERS)}
    solves = [row for row in rows if "shape" in row]
    for name in sorted({row["device"] for row in solves}):
        lines.append(SOLVES_HEAD.format(device=name))
        of_device = [row for row in solves if row["device"] == name]
        for row in sorted(
            of_device,
            key=lambda row: (_sizes(row), row["ratio"], order[row["solver"]], row["iterations"], row["threads"]),
        ):
            lines.append(_solve_line(row))
    return "\n".join(lines) + "\n"


HEADER = """# Solvers: error and time

Written by `python benchmarks/solve.py table --output docs/performance/solvers.md` from `benchmarks/results/solve`.
[What they come to](../solvers.md#measured)."""
PROJECTIONS_HEAD = """
## Against K-SVD at T = 60, on the projections of a model

Same k and s, `python benchmarks/solve.py projections MODEL --calibration FILE`. K-SVD's seconds are those of two
iterations on each shape, times 30, in the same run.

| model | ratio | T | mod-htp / K-SVD, mean | largest | above 1 | rank-k bound / K-SVD, mean \
| mod-htp, s | K-SVD T = 60, s | speed-up | threads |
|---|---|---|---|---|---|---|---|---|---|---|"""
SOLVES_HEAD = """
## Synthetic matrices of real shapes, {device}

`python benchmarks/solve.py run --shape SHAPE --solver SOLVER`. "Bare products" are an iteration's matrix products
alone, at the same sizes and precision, and "of it" their time over an iteration's. "Peak" is what the process's peak
memory grew by, so that of several runs in one process the later ones show little.

| d1 x d2 | ratio | solver | k | s | T | error | seconds | of it start | s an iteration \
| TFLOP/s | bare products, TFLOP/s | of it | peak, MB | threads |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def _projections_line(row: dict[str, Any]) -> str:
    found = row["projections"].values()
    ratios = [one["error"] / one["error_ksvd"] for one in found]
    bounds = [one["error_rank_k"] / one["error_ksvd"] for one in found]
    seconds, theirs = sum(one["seconds"] for one in found), sum(one["seconds_ksvd"] for one in found)
    return (
        f"| {row['model']} | {row['ratio']:g} | {row['iterations']} | {statistics.mean(ratios):.4f} "
        f"| {max(ratios):.4f} | {sum(one > 1 for one in ratios)} of {len(ratios)} | {statistics.mean(bounds):.4f} "
        f"| {seconds:.1f} | {theirs:.0f} | {theirs / seconds:.0f} | {row['threads']} |"
    )


def _solve_line(row: dict[str, Any]) -> str:
    def cell(key: str, form: str, scale: float = 1.0) -> str:
        return "-" if row.get(key) is None else format(row[key] * scale, form)

    cells = [
        "{} x {}".format(*_sizes(row)), f"{row['ratio']:g}", row["solver"], str(row["k"]), str(row["s"] or "-"),
        str(row["iterations"]), f"{row['error']:.4f}", f"{row['seconds']:.1f}", cell("seconds_start", ".1f"),
        cell("seconds_iteration", ".3f"), cell("tflops", ".3g"), cell("bare_tflops", ".3g"),
        cell("share_of_bare", ".0%"), cell("peak_bytes", ".0f", 1 / 2**20), str(row["threads"]),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _sizes(row: dict[str, Any]) -> tuple[int, int]:
    d1, d2 = map(int, row["shape"].split("x"))
    return d1, d2


@app.command()
def figure(
    shape: Annotated[
        list[str] | None,
        typer.Option(help="d1xd2 or a model's name, repeatable; default: all that several solvers have solved"),
    ] = None,
    output: Path = FIGURE,
) -> None:
    """Draw error against time, a panel a shape and device: best error so far, at the asked number of nonzeros."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    rows = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    rows = [row for row in rows if "shape" in row]
    solvers = {row["shape"]: {other["solver"] for other in rows if other["shape"] == row["shape"]} for row in rows}
    compared = [name for name, found in solvers.items() if len(found) > 1]
    wanted = {one for text in shape or compared for one in MODELS.get(text, [text])}
    rows = [row for row in rows if row["shape"] in wanted]
    panels = sorted({(_sizes(row), row["device"], row["ratio"]) for row in rows})
    if not panels:
        raise typer.BadParameter("there are no rows to draw. Compute some with run")
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    drawing, axes = pyplot.subplots(lines, columns, figsize=(4.2 * columns, 3.2 * lines), squeeze=False)
    colours = {solver: f"C{index}" for index, solver in enumerate(SOLVERS)}
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        for row in (row for row in rows if (_sizes(row), row["device"], row["ratio"]) == panel):
            settled = slice(row["settled_from"] or 0, None)
            best = [min(row["errors"][settled][: i + 1]) for i in range(len(row["errors"][settled]))]
            axis.plot(row["stamps"][settled], best, color=colours[row["solver"]], linewidth=1)
            label = row["solver"] + (f", T = {row['iterations']}" if row["solver"] not in DIRECT else "")
            axis.plot(row["seconds"], row["error"], "o", color=colours[row["solver"]], markersize=4)
            axis.annotate(label, (row["seconds"], row["error"]), fontsize=6, xytext=(3, 3), textcoords="offset points")
        (d1, d2), device, ratio = panel
        axis.set(xscale="log", xlabel="seconds", ylabel="relative error")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.margins(x=0.3)
        axis.set_title(f"{d1} x {d2}, ratio {ratio:g}, {device}", fontsize=8)
        axis.grid(alpha=0.3, which="both")
    drawing.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None, dpi=150)
    print(output)


def _error(target: Tensor, dictionary: Tensor, coefficients: Tensor) -> float:
    """||A - D S||_F / ||A||_F in float64, some columns at a time."""
    missed, atoms = 0.0, dictionary.double()
    for block in row_blocks(slice(0, target.shape[1]), 1024):
        missed += float((target[:, block].double() - atoms @ coefficients[:, block].double()).square().sum())
    return float((missed / target.double().square().sum()) ** 0.5)


class _PeakMemory:
    """Bytes taken beyond those in use when it was made; None where the system does not tell.

    On a CPU what the process got from the system: too little where it had freed memory left from an earlier row.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before: int | None = torch.cuda.memory_allocated(device)
        else:
            self.before = _resident("VmRSS") if _forget_peak() else None

    def taken(self) -> int | None:
        if self.before is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return _resident("VmHWM") - self.before


def _forget_peak() -> bool:
    """Let Linux count this process's peak memory anew."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "python": platform.python_version()}


def _save(path: Path, row: dict[str, Any]) -> None:
    path.write_text(json.dumps(row, indent=1, sort_keys=True) + "\n")
    shown = {key: value for key, value in row.items() if not isinstance(value, list | dict)}
    print(path.name, json.dumps(shown), flush=True)


if __name__ == "__main__":
    app()
