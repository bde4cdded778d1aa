"""Perplexity of dense, low-rank and sparse-dictionary models at equal bytes: a row a (solver, ratio), a file a row.

    python benchmarks/quality.py run MODEL --calibration FILE --text FILE --ratio 0.2 --ratio 0.3 --solver ksvd
    python benchmarks/quality.py table

A row that has its file is not computed again, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import platform
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

import cospadi
from cospadi import evaluate, source
from cospadi.calibration.text import read_text
from cospadi.recipe import Recipe

PAPER = {"share": "none", "allocate": "uniform", "weight_columns": "none", "compensate": False, "rho": 2}
"""The paper's own recipe, whatever this package's defaults are."""
RESULTS = Path(__file__).parent / "results" / "quality"
app = typer.Typer(add_completion=False)


@app.command()
def run(
    model: Path,
    calibration: Annotated[str, typer.Option()],
    text: Annotated[Path, typer.Option()],
    ratio: Annotated[list[float] | None, typer.Option()] = None,
    solver: Annotated[list[str] | None, typer.Option()] = None,
    iterations: int = 60,
    threads: int = 1,
) -> None:
    """Compute the rows that are missing."""
    torch.set_num_threads(threads)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for one_ratio in [0.0] + (ratio or [0.2, 0.3, 0.4, 0.5]):
        for one_solver in ["dense"] if one_ratio == 0 else (solver or ["svd-llm", "ksvd"]):
            path = RESULTS / f"{model.name}-{one_solver}-{one_ratio:g}.json"
            if path.exists():
                continue
            row = _row(model, calibration, text, one_ratio, one_solver, iterations, threads)
            path.write_text(json.dumps(row, indent=2, sort_keys=True) + "\n")
            print(json.dumps({key: value for key, value in row.items() if key != "relative_errors"}), flush=True)


def _row(
    model: Path, calibration: str, text: Path, ratio: float, solver: str, iterations: int, threads: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"model": model.name, "solver": solver, "ratio_asked": ratio, "text": text.name}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = model
        if solver != "dense":
            fields = {"ratio": ratio, "solver": solver, "calibration": calibration}
            recipe = Recipe.build(fields | PAPER, iterations=iterations)
            folder = Path(scratch) / "compressed"
            result = cospadi.compress(model, recipe, folder)
            row |= {
                "ratio_reached": result.plan.ratio,
                "bytes": result.plan.bytes,
                "mean_relative_error": sum(result.errors.values()) / len(result.errors),
                "relative_errors": result.errors,
                "iterations": iterations if solver in ("ksvd", "procrustes") else None,
                "seconds_solve": round(result.seconds["solve"], 1),
                "calibration": result.manifest["recipe"]["calibration"],
                "sequences": result.manifest["calibration"]["sequences"],
            }
        loaded = source.load_model(folder, torch.device("cpu"))
        tokenizer = source.load_tokenizer(folder)
        windows = evaluate.text_windows(tokenizer, read_text(text), min(1024, source.positions(loaded)))
        measured = evaluate.perplexity(loaded, windows)
    return row | {
        "perplexity": measured.value,
        "windows": measured.windows,
        "length": measured.length,
        "seconds": round(time.perf_counter() - start, 1),
        "threads": threads,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


@app.command()
def table() -> None:
    """Print every row there is as Markdown, a table a model."""
    rows = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    for model in sorted({row["model"] for row in rows}):
        of_model = [row for row in rows if row["model"] == model]
        dense = next((row for row in of_model if row["solver"] == "dense"), None)
        if dense is None:
            continue
        print(f"\n{model}: dense perplexity {dense['perplexity']:.2f} on {dense['text']}")
        print(f"({dense['windows']} windows of {dense['length']} tokens)\n")
        print("| ratio | solver | T | perplexity | ln(ppl / dense) | mean error | ratio reached | solving, s |")
        print("|---|---|---|---|---|---|---|---|")
        compressed = [row for row in of_model if row["solver"] != "dense"]
        for row in sorted(compressed, key=lambda row: (row["ratio_asked"], row["solver"] != "svd-llm")):
            print(
                f"| {row['ratio_asked']:g} | {row['solver']} | {row['iterations'] or '-'} | {row['perplexity']:.2f} "
                f"| {math.log(row['perplexity'] / dense['perplexity']):.3f} | {row['mean_relative_error']:.4f} "
                f"| {row['ratio_reached']:.4f} | {row['seconds_solve']:.0f} |"
            )


@app.command()
def summary() -> None:
    """Print one line a model and ratio: perplexity of dense, SVD-LLM and K-SVD."""
    rows = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    found = {(row["model"], row["solver"], row["ratio_asked"]): row["perplexity"] for row in rows}
    print("| model | ratio | dense | SVD-LLM | CoSpaDi (`ksvd`, T = 60) |\n|---|---|---|---|---|")
    for model, solver, ratio in sorted(found):
        if solver == "ksvd":
            values = [found[model, "dense", 0.0], found[model, "svd-llm", ratio], found[model, solver, ratio]]
            print(f"| {model} | {ratio:g} | {' | '.join(f'{value:.2f}' for value in values)} |")


if __name__ == "__main__":
    app()
