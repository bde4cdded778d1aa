"""Perplexity of dense, low-rank and sparse-dictionary models at equal bytes: a row a (method, ratio), a file a row.

    python benchmarks/quality.py run MODEL --calibration FILE --text FILE
    python benchmarks/quality.py run MODEL --calibration FILE --text FILE --ratio 0.2 --ratio 0.3 --method ksvd
    python benchmarks/quality.py table --output docs/results
    python benchmarks/quality.py summary

A method is a solver alone, in the paper's frame (a dictionary a projection, the same ratio everywhere, rho 2, plain
calibration), or SOLVER+ALLOCATE: that solver in this package's frame (shared-input dictionaries, budgets by ALLOCATE,
compensation), to which +once adds plain calibration and +T20 that many iterations. The package's default is
mod-htp+fisher.

A row that has its file is not computed again, so an interrupted run resumes where it stopped.
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
from cospadi.calibration.text import read_text
from cospadi.commands import evaluate
from cospadi.model import load
from cospadi.recipe import Recipe

DEFAULT = "mod-htp+fisher"
SUMMARY = ("svd-llm", "ksvd", DEFAULT)
PEERS = ("svd-llm", "eigen", "procrustes")
METHODS = (
    *(*PEERS, "ksvd", "mod-htp"),
    *(f"{solver}+{allocate}" for allocate in ("fisher", "uniform", "output") for solver in (*PEERS, "mod-htp")),
    *(f"{DEFAULT}+once", f"{DEFAULT}+T20", "mod-htp+uniform+T20"),
)
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
    method: Annotated[list[str] | None, typer.Option()] = None,
    iterations: int = 60,
    threads: int = 1,
) -> None:
    """Compute the rows that are missing."""
    torch.set_num_threads(threads)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for one_ratio in [0.0] + (ratio or [0.2, 0.3, 0.4, 0.5]):
        for one_method in ["dense"] if one_ratio == 0 else (method or METHODS):
            path = RESULTS / f"{model.name}-{one_method}-{one_ratio:g}.json"
            if path.exists():
                continue
            row = _row(model, calibration, text, one_ratio, one_method, iterations, threads)
            path.write_text(json.dumps(row, indent=2, sort_keys=True) + "\n")
            print(json.dumps({key: value for key, value in row.items() if key != "relative_errors"}), flush=True)


def frame(method: str) -> dict[str, Any]:
    """The recipe fields that a method's name stands for."""
    solver, *words = method.split("+")
    if not words:
        return PAPER | {"solver": solver}
    fields: dict[str, Any] = {"solver": solver, "allocate": words[0], "compensate": "once" not in words}
    for word in words[1:]:
        if word.startswith("T"):
            fields["iterations"] = int(word[1:])
    return fields


def _row(
    model: Path, calibration: str, text: Path, ratio: float, method: str, iterations: int, threads: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"model": model.name, "method": method, "ratio_asked": ratio, "text": text.name}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = model
        if method != "dense":
            recipe = Recipe.build(
                {"ratio": ratio, "calibration": calibration, "iterations": iterations} | frame(method)
            )
            folder = Path(scratch) / "compressed"
            result = cospadi.compress(model, recipe, folder)
            row |= {
                "ratio_reached": result.plan.ratio,
                "bytes": result.plan.bytes,
                "mean_relative_error": sum(result.errors.values()) / len(result.errors),
                "relative_errors": result.errors,
                "iterations": recipe.iterations if recipe.solver in ("mod-htp", "ksvd", "procrustes") else None,
                "seconds_solve": round(result.seconds["solve"], 1),
                "seconds_stages": {stage: round(seconds, 1) for stage, seconds in result.seconds.items()},
                "calibration": result.manifest["recipe"]["calibration"],
                "sequences": result.manifest["calibration"]["sequences"],
            }
        loaded = load.load_model(folder, torch.device("cpu"))
        tokenizer = load.load_tokenizer(folder)
        windows = evaluate.text_windows(tokenizer, read_text(text), min(1024, load.positions(loaded.config)))
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
def table(
    output: Annotated[
        Path | None, typer.Option(help="folder of the pages, one a model; without it they are printed")
    ] = None,
) -> None:
    """Every row there is as Markdown, a page a model."""
    for model, text in pages().items():
        if output is None:
            print(text)
        else:
            output.mkdir(parents=True, exist_ok=True)
            (output / f"{model}.md").write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Model -> its page."""
    rows = _rows()
    models = [row["model"] for row in rows if row["method"] == "dense"]
    return {model: _page(model, [row for row in rows if row["model"] == model]) for model in models}


def _page(model: str, rows: list[dict[str, Any]]) -> str:
    dense = next(row for row in rows if row["method"] == "dense")
    lines = [
        f"# {model}: every method at equal bytes",
        "",
        "Written by `python benchmarks/quality.py table --output docs/results` from `benchmarks/results/quality`.",
        "[What methods and columns mean](../results.md#methods-and-columns).",
        "",
        f"Dense perplexity {dense['perplexity']:.2f} on {dense['text']}",
        f"({dense['windows']} windows of {dense['length']} tokens).",
        "",
        "| ratio | method | T | perplexity | ln(ppl / dense) | of ksvd's | error | ratio reached | solving, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    paper = {row["ratio_asked"]: _loss(row, dense) for row in rows if row["method"] == "ksvd"}
    compressed = [row for row in rows if row["method"] != "dense"]
    for row in sorted(compressed, key=lambda row: (row["ratio_asked"], -_loss(row, dense))):
        ratio, loss = row["ratio_asked"], _loss(row, dense)
        error, reached = row["mean_relative_error"], row["ratio_reached"]
        of_paper = f"{loss / paper[ratio]:.3f}" if ratio in paper else "-"
        lines.append(
            f"| {ratio:g} | {row['method']} | {row['iterations'] or '-'} | {row['perplexity']:.2f} | {loss:.4f} "
            f"| {of_paper} | {error:.4f} | {reached:.4f} | {row['seconds_solve']:.0f} |"
        )
    return "\n".join(lines) + "\n"


@app.command()
def summary() -> None:
    """Print one line a model and ratio: perplexity of dense, SVD-LLM, the paper's K-SVD and the package's default."""
    print("\n".join(summary_lines()))


def summary_lines() -> list[str]:
    """The table that README.md and docs/results.md begin with."""
    found = {(row["model"], row["method"], row["ratio_asked"]): row["perplexity"] for row in _rows()}
    lines = [
        "| model | ratio | dense | SVD-LLM | the paper's (`ksvd`) | `cospadi compress` |",
        "|---|---|---|---|---|---|",
    ]
    for model, method, ratio in sorted(found):
        if method == DEFAULT:
            values = [found[model, "dense", 0.0], *(found[model, name, ratio] for name in SUMMARY)]
            lines.append(f"| {model} | {ratio:g} | {' | '.join(f'{value:.2f}' for value in values)} |")
    return lines


def _rows() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


def _loss(row: dict[str, Any], dense: dict[str, Any]) -> float:
    return math.log(row["perplexity"] / dense["perplexity"])


if __name__ == "__main__":
    app()
