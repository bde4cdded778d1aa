"""How the cost of a job grows: estimates against what happens, runs at growing sizes, extrapolation to large models.

    python benchmarks/scaling.py check MODEL CALIBRATION --sequences 32
    python benchmarks/scaling.py run
    python benchmarks/scaling.py table
    python benchmarks/scaling.py figure
    python benchmarks/scaling.py extrapolate

`check` and `run` keep a row a file in results/scaling; `table` and `figure` read the files. All runs have one thread,
and seconds are the processor's: on an idle machine they are those of the clock, and other work does not add to them.
"""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, LlamaConfig

from cospadi.budget.plan import make_plan, outlook, owner_without_weights
from cospadi.commands import estimate as estimating
from cospadi.commands.tables import duration
from cospadi.compress import compress
from cospadi.jobs.progress import Stages
from cospadi.model import load
from cospadi.model.projections import find_projections
from cospadi.recipe import CACHE_BYTES, Recipe
from cospadi.solvers import Flops
from cospadi.stages.open import job_directory

RESULTS = Path(__file__).parent / "results" / "scaling"
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "scaling.svg"
WIDTHS = (64, 128, 256, 512, 768, 1024)
DEPTHS = (1, 2, 4, 8)
LARGE = {
    "Llama-3-8B": (4096, 14336, 32, 32),
    "Llama-3-70B": (8192, 28672, 80, 64),
    "Llama-3.1-405B": (16384, 53248, 126, 128),
}
"""Hidden and intermediate size, blocks, heads; 8 of keys and values, 128256 tokens."""
app = typer.Typer(add_completion=False)


@app.command()
def check(
    model: str,
    calibration: str,
    sequences: Annotated[int, typer.Option()] = 256,
    option: Annotated[list[str] | None, typer.Option(help="one more of compress, as --option=--solver=eigen")] = None,
) -> None:
    """What `cospadi plan` says against what `cospadi compress` then does."""
    words = [model, "--calibration", calibration, "--sequences", str(sequences)]
    words += [*(option or []), "--json"]
    command = [sys.executable, "-m", "cospadi"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    planned = subprocess.run([*command, "plan", *words], env=environment, capture_output=True, text=True, check=True)
    foreseen = json.loads(planned.stdout)["estimate"]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        before, start, largest = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
        log = (Path(folder) / "log").open("w+")
        running = subprocess.Popen([*command, "compress", *words, "-o", str(output)], env=environment, stdout=log)
        while running.poll() is None:
            largest = max(largest, _size(output) + _size(job_directory(output)))
            time.sleep(0.02)
        clock, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        if running.returncode:
            raise typer.Exit(running.returncode)
        log.seek(0)
        stages = json.loads(log.read())["seconds"]
        largest = max(largest, _size(output))
    row = {
        "model": Path(model).name,
        "sequences": sequences,
        "options": option or [],
        "estimate": foreseen,
        "seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "seconds_clock": clock,
        "seconds_stages": stages,
        "memory_bytes": 1024 * after.ru_maxrss,
        "disk_bytes": largest,
        "machine": _machine(),
    }
    _save(f"check-{row['model']}-{sequences}{''.join(option or [])}", row)


def _size(folder: Path) -> int:
    """Bytes of the files in a folder that others are writing to."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(path) / name).stat().st_size
            except OSError:
                continue
    return total


@app.command()
def run(
    width: Annotated[list[int] | None, typer.Option(help="repeatable")] = None,
    depth: Annotated[list[int] | None, typer.Option(help="repeatable")] = None,
) -> None:
    """Compress random Llamas: one block of growing width, and more blocks."""
    torch.set_num_threads(1)
    fields = {"sequences": 16, "gradient_sequences": 4, "refine": 20}
    for one in width or WIDTHS:
        _grown("width", one, one, 1, fields)
    for one in depth or DEPTHS:
        _grown("depth", one, 128, one, fields)


def _grown(series: str, size: int, width: int, depth: int, fields: dict[str, Any]) -> None:
    if (RESULTS / f"{series}-{size}.json").exists():
        return
    recipe = Recipe.build(fields, calibration="builtin", length=256, ratio=0.3)
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense"
        _random_llama(dense, width, depth)
        stages = Stages()
        plan = outlook(dense, recipe).plan
        foreseen = estimating.estimate(dense, recipe, plan)
        assert foreseen.seconds is not None
        start = time.process_time()
        result = compress(dense, recipe, Path(folder) / "output", stages=stages)
        seconds = time.process_time() - start
    spent = {stage: flops.total for stage, flops in foreseen.flops.items()}
    row = {
        "series": series,
        "size": size,
        "seconds": seconds,
        "seconds_estimated": sum(foreseen.seconds.values()) - foreseen.seconds["load"],
        "seconds_loading": result.seconds["load"],
        "flops": sum(spent.values()),
        "flops_stages": spent,
        "groups": sorted({(group.d1, sum(group.d2s), group.k) for group in plan.groups}),
        "machine": _machine(),
    }
    _save(f"{series}-{size}", row)


def _random_llama(folder: Path, width: int, depth: int) -> None:
    """A Llama of random weights, four times as wide inside, that speaks the demo's bytes."""
    demo = load.resolve(load.DEMO)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=load.read_config(demo).vocab_size, max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for path in demo.glob("token*"):
        shutil.copy(path, folder)


@app.command()
def table() -> None:
    """Print the rows as Markdown."""
    checks = [row for row in _rows() if "estimate" in row]
    print("| model | n | | estimated | measured | estimated / measured |\n|---|---|---|---|---|---|")
    for row in checks:
        name = f"| {' '.join([row['model'], *row['options']])} | {row['sequences']} |"
        found = row["estimate"]
        for what, form, scale in (("seconds", ".1f", 1.0), ("memory_bytes", ".0f", 1e6), ("disk_bytes", ".2f", 1e6)):
            if what not in row:  # nobody watched the disk
                continue
            unit = "processor seconds" if scale == 1 else f"{what.partition('_')[0]}, MB"
            ours, theirs = found[what] / scale, row[what] / scale
            print(f"{name} {unit} | {ours:{form}} | {theirs:{form}} | {ours / theirs:.2f} |")
    for series in ("width", "depth"):
        rows = [row for row in _rows() if row.get("series") == series]
        print(f"\n| {series} | FLOPs | seconds | estimated | estimated / measured |\n|---|---|---|---|---|")
        for row in rows:
            measured, ours = _measured(row), row["seconds_estimated"]
            print(f"| {row['size']} | {row['flops']:.3g} | {measured:.2f} | {ours:.2f} | {ours / measured:.2f} |")
        if len(rows) > 1:
            print(f"\nSlope of the last three: seconds {_slope(rows[-3:], _measured):.2f}, ", end="")
            print(f"FLOPs {_slope(rows[-3:], lambda row: row['flops']):.2f}")


def _measured(row: dict[str, Any]) -> float:
    """Seconds of a grown run, less those of opening the model."""
    return float(row["seconds"] - row["seconds_loading"])


def _slope(rows: list[dict[str, Any]], value: Any) -> float:
    """Slope of the least-squares line through the logarithms of sizes and values."""
    xs, ys = [math.log(row["size"]) for row in rows], [math.log(value(row)) for row in rows]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


@app.command()
def figure(output: Path = FIGURE) -> None:
    """Draw seconds and estimates against width and depth, both axes logarithmic, with the slopes of the last three."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(1, 2, figsize=(8.4, 3.6))
    labels = {"width": "hidden size of one block (d1, d2, k grow with it)", "depth": "decoder blocks"}
    for axis, (series, label) in zip(axes, labels.items(), strict=True):
        rows = [row for row in _rows() if row.get("series") == series]
        sizes = [row["size"] for row in rows]
        slope, wanted = _slope(rows[-3:], _measured), _slope(rows[-3:], lambda row: row["flops"])
        axis.plot(sizes, [_measured(row) for row in rows], "o-", label=f"measured, slope {slope:.2f}")
        axis.plot(sizes, [row["seconds_estimated"] for row in rows], "x--", label="estimated")
        flops = [row["flops"] / rows[-1]["flops"] * _measured(rows[-1]) for row in rows]
        axis.plot(sizes, flops, ":", color="grey", label=f"FLOPs, slope {wanted:.2f}")
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="seconds on one core")
        axis.set_xticks(sizes, [str(size) for size in sizes], fontsize=7)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    drawing.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None, dpi=150)
    print(output)


@app.command()
def extrapolate(
    tflops: Annotated[float, typer.Option(help="10^12 FLOPs a second that a node sustains in products")] = 100.0,
    factor_tflops: Annotated[float, typer.Option(help="the same in factorizations, float64")] = 2.0,
    gigabytes: Annotated[float, typer.Option(help="10^9 bytes a second that the disk reads or writes")] = 2.0,
) -> None:
    """Costs of large Llamas by the default recipe, at assumed speeds."""
    print("| model | stage | products | factorizations | time |\n|---|---|---|---|---|")
    totals = []
    for name, sizes in LARGE.items():
        seconds, flops, memory, disk = _large(Recipe(), sizes, tflops, factor_tflops, gigabytes)
        for stage, spent in flops.items():
            print(f"| {name} | {stage} | {spent.products:.2g} | {spent.others:.2g} | {duration(seconds[stage])} |")
        print(f"| {name} | disk | - | - | {duration(seconds['disk'])} |")
        totals.append((name, sum(seconds.values()), memory, disk))
    print("\n| model | time | memory | disk |\n|---|---|---|---|")
    for name, time_of_all, memory, disk in totals:
        print(f"| {name} | {duration(time_of_all)} | {memory / 1e9:,.0f} GB | {disk / 1e9:,.0f} GB |")


def _large(
    recipe: Recipe, sizes: tuple[int, int, int, int], tflops: float, factor_tflops: float, gigabytes: float
) -> tuple[dict[str, float], dict[str, Flops], int, int]:
    """Seconds and FLOPs of every stage, and seconds of "disk"; bytes of memory and of disk."""
    hidden, inside, depth, heads = sizes
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inside, num_hidden_layers=depth, num_attention_heads=heads,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    projections, recipe = find_projections(model), recipe.settled()
    owner = owner_without_weights(model, projections)
    plan = make_plan(projections, recipe, owner)
    shape, text = estimating.shape_of(model, owner, set(owner)), estimating.text_of(recipe, 8192)
    stored = sum(parameter.nbytes for parameter in model.parameters())
    output = stored + sum(group.parts.total - group.dense_bytes for group in plan.compressed)
    costs = list(estimating.costs_of(shape, recipe, plan, text, stored, output))
    flops = {stage: spent for stage, spent in estimating.flops_of(costs).items() if spent.total}
    memory = estimating.memory_of(shape, recipe, plan, text, CACHE_BYTES)
    disk = estimating.disk_of(shape, recipe, plan, text, CACHE_BYTES, output)
    traffic = sum(cost.nbytes for cost in costs)
    seconds = {
        stage: spent.products / tflops / 1e12 + spent.others / factor_tflops / 1e12 for stage, spent in flops.items()
    }
    return seconds | {"disk": traffic / gigabytes / 1e9}, flops, memory, disk


def _rows() -> list[dict[str, Any]]:
    rows = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return sorted(rows, key=lambda row: (row.get("series", ""), row.get("size", 0)))


def _machine() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.machine(), "torch": torch.__version__}


def _save(name: str, row: dict[str, Any]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(row, indent=1, sort_keys=True) + "\n")
    print(name, json.dumps({key: value for key, value in row.items() if not isinstance(value, list)}), flush=True)


if __name__ == "__main__":
    app()
