"""Perplexity and zero-shot accuracy of a real model by every method: a row a (method, ratio), a file a row.

    python benchmarks/zeroshot.py run MODEL --calibration FILE --text FILE --include-path FOLDER --tasks A,B --limit N \
        --ratio 0.3 --method sparse --method wanda
    python benchmarks/zeroshot.py table --output docs/smollm2.md
    python benchmarks/zeroshot.py summary

Methods are named as in benchmarks/quality.py; the dense model's row is measured first. Tasks are lm-eval's (extra
`eval`), the first N documents of each, the same for all rows; rows keep which were right (a digit a document), so that
differences from dense have the paired standard error. A row that has its file is not computed again.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import cospadi
from cospadi.commands import evaluate
from cospadi.model import load
from cospadi.recipe import Recipe

RESULTS = Path(__file__).parent / "results" / "smollm2"
SUMMARY = (
    *("svd-llm", "paper+iterations=2", "rocket", "compot", "mod-htp", "wanda", "sparsegpt", "alps"),
    *("sparse (64 x 2048)", "sparse"),
)
HEAD = """\
# SmolLM2-135M-Instruct: perplexity and zero-shot accuracy by every method

Written by `python benchmarks/zeroshot.py table --output docs/smollm2.md` from `benchmarks/results/smollm2`.
[What was measured, and how](results.md#a-real-model-smollm2-135m-instruct); [what methods
mean](results.md#methods-and-columns).

"""
app = typer.Typer(add_completion=False)


@app.command()
def run(
    model: Path,
    calibration: Annotated[str, typer.Option()],
    text: Annotated[Path, typer.Option()],
    tasks: Annotated[str, typer.Option(help="lm-eval's names, with commas between")],
    method: Annotated[list[str], typer.Option(help="repeatable")],
    ratio: Annotated[list[float], typer.Option(help="repeatable")],
    include_path: Annotated[Path | None, typer.Option(help="folder with more task files")] = None,
    limit: int = 200,
    batch_size: int = 16,
    device: str = "auto",
) -> None:
    """Compute the rows that are missing. Models run with their weights unpacked, which is faster for many tokens."""
    from quality import frame

    from cospadi.commands import accuracy  # needs lm-eval, which the table does not

    RESULTS.mkdir(parents=True, exist_ok=True)
    suite = accuracy.open_suite(tasks.split(","), include_path)
    for name, one in [("dense", 0.0), *((name, one) for one in ratio for name in method)]:
        path = RESULTS / f"{name}-{one:g}.json"
        if path.exists():
            continue
        row: dict[str, Any] = {"model": model.name, "method": name, "ratio_asked": one, "device": _machine(device)}
        with tempfile.TemporaryDirectory() as scratch:
            folder = model
            if one:
                folder = Path(scratch) / "model"
                recipe = Recipe.build(frame(name), ratio=one, calibration=calibration, device=device)
                result = cospadi.compress(model, recipe, folder)
                row |= {
                    "ratio_reached": result.plan.ratio,
                    "bytes": result.plan.bytes,
                    "seconds_stages": result.seconds,
                }
                row |= {"seconds_compress": sum(result.seconds.values()), "pass_seconds": result.pass_seconds}
            if one:
                compared = evaluate.compare_models(folder, model, text, 1024, device=device, runtime="dense")
                both, row["kl"] = compared.results, compared.divergence
            else:
                both = evaluate.evaluate_models([folder], text, 1024, device=device)
            row["perplexity"] = both[0][1].value
            ((_, found),) = accuracy.measure_accuracies([folder], suite, limit, batch_size, device, runtime="dense")
        right = {task.removeprefix("local_"): metrics["acc"] for task, metrics in found.items()}
        digits = {task: "".join(f"{one:.0f}" for one in each) for task, each in right.items()}
        row |= {"right": digits, "accuracy": {task: sum(each) / len(each) for task, each in right.items()}}
        row["documents"] = {task: len(each) for task, each in right.items()}
        path.write_text(json.dumps(row, indent=2, sort_keys=True) + "\n")


def _machine(device: str) -> str:
    where = load.pick_device(device)
    return torch.cuda.get_device_name(where) if where.type == "cuda" else f"{platform.machine()} CPU"


@app.command()
def table(output: Annotated[Path | None, typer.Option(help="the page; without it, it is printed")] = None) -> None:
    """Every row there is as Markdown."""
    if output is None:
        print(page(), end="")
    else:
        output.write_text(page(), encoding="utf-8")


def page() -> str:
    """All rows on a page."""
    return HEAD + "\n".join(table_lines()) + "\n"


@app.command()
def summary() -> None:
    """ln(ppl / dense) of the methods that matter most, as Markdown."""
    print("\n".join(summary_lines()))


def summary_lines() -> list[str]:
    """A row a ratio, a column a method; "-" where it was not measured."""
    rows = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    dense = next(row for row in rows if row["method"] == "dense")["perplexity"]
    found = {(row["ratio_asked"], row["method"]): math.log(row["perplexity"] / dense) for row in rows}
    lines = [f"| ratio | {' | '.join(SUMMARY)} |", f"|---|{'---|' * len(SUMMARY)}"]
    for ratio in sorted({ratio for ratio, name in found if ratio and name in SUMMARY}):
        shown = [f"{found[ratio, name]:.4f}" if (ratio, name) in found else "-" for name in SUMMARY]
        lines.append(f"| {ratio:g} | {' | '.join(shown)} |")
    return lines


def table_lines() -> list[str]:
    """A row a (ratio, method), the lowest perplexity first; accuracies in per cent."""
    rows = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    dense = next(row for row in rows if row["method"] == "dense")
    tasks = list(dense["accuracy"])
    lines = [
        "| ratio | method | perplexity | ln(ppl / dense) | KL | average | from dense | "
        f"{' | '.join(tasks)} | seconds |",
        "|---|---|---|---|---|---|---|" + "---|" * len(tasks) + "---|",
    ]
    for row in sorted(rows, key=lambda row: (row["ratio_asked"], row["perplexity"])):
        is_dense = row is dense
        average = _average(row)
        shown = [
            "-" if is_dense else f"{row['ratio_asked']:g}",
            row["method"],
            f"{row['perplexity']:.2f}",
            "-" if is_dense else f"{math.log(row['perplexity'] / dense['perplexity']):.4f}",
            f"{row['kl']:.4f}" if "kl" in row else "-",
            f"{average:.2f} ± {_standard_error(row):.2f}",
            "-" if is_dense else f"{average - _average(dense):+.2f}{_paired(row, dense)}",
            *(f"{100 * row['accuracy'][task]:.1f}" for task in tasks),
            "-" if is_dense else f"{row['seconds_compress']:.0f}{_elsewhere(row, dense)}",
        ]
        lines.append(f"| {' | '.join(shown)} |")
    return lines


def _elsewhere(row: dict[str, Any], dense: dict[str, Any]) -> str:
    """Where a row was measured, if not where the dense model's was."""
    return "" if row["device"] == dense["device"] else f" ({row['device']})"


def _average(row: dict[str, Any]) -> float:
    """Of all tasks, each counting once, in per cent."""
    average: float = sum(row["accuracy"].values()) / len(row["accuracy"])
    return 100 * average


def _standard_error(row: dict[str, Any]) -> float:
    """Of the average over documents, in per cent: tasks are independent."""
    squares = [value * (1 - value) / (row["documents"][task] - 1) for task, value in row["accuracy"].items()]
    return 100 * math.sqrt(sum(squares)) / len(squares)


def _paired(row: dict[str, Any], dense: dict[str, Any]) -> str:
    """The standard error of the difference from dense over the same documents."""
    gains = [
        [int(one) - int(other) for one, other in zip(row["right"][task], dense["right"][task], strict=True)]
        for task in dense["right"]
    ]
    squares = [statistics.variance(each) / len(each) for each in gains]
    return f" ± {100 * math.sqrt(sum(squares)) / len(squares):.2f}"


if __name__ == "__main__":
    app()
