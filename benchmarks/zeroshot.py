"""Perplexity and zero-shot accuracy of a real model by every method: a row a (method, ratio), a file a row.

    python benchmarks/zeroshot.py run MODEL --calibration FILE --text FILE --include-path FOLDER --tasks A,B --limit N \
        --ratio 0.3 --method sparse --method wanda --output FOLDER
    python benchmarks/zeroshot.py table --output docs/smollm2.md
    python benchmarks/zeroshot.py summary

`run` is a call of `cospadi.compare` with tasks, whose rows it copies to results/smollm2; a row that is there stays as
it is. Tasks are lm-eval's (extra `eval`), the first N documents of each, the same for all rows; rows keep which were
right (a digit a document), so that differences from dense have the paired standard error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import cospadi
from cospadi.commands.comparison import (
    DENSE,
    average,
    dense_row,
    json_text,
    loss,
    markdown_table,
    paired_error,
    standard_error,
)
from cospadi.format.form import DENSE_BITS

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
    output: Annotated[Path, typer.Option(help="folder of the comparison, in which a run that was stopped resumes")],
    ratio: Annotated[list[float] | None, typer.Option(help="repeatable")] = None,
    bits: Annotated[list[float] | None, typer.Option(help="repeatable")] = None,
    include_path: Annotated[Path | None, typer.Option(help="folder with more task files")] = None,
    limit: int = 200,
    batch_size: int = 16,
    device: str = "auto",
) -> None:
    """Compute the rows that are missing. Models run with their weights unpacked, which is faster for many tokens."""
    rows = cospadi.compare(
        model, text, output, ratios=ratio or [], bits=bits or [], methods=method, tasks=tasks.split(","),
        recipe={"calibration": calibration, "batch_size": batch_size, "device": device},
        include_path=include_path, limit=limit, runtime="dense",
    )  # fmt: skip
    for row in rows:
        path = RESULTS / f"{row['method']}-{row['ratio_asked']:g}.json"
        if "perplexity" in row and not path.exists():
            kept = {name: value for name, value in row.items() if name not in ("of", "relative_errors")}
            for name in ("right", "accuracy", "documents"):
                kept[name] = {task.removeprefix("local_"): value for task, value in row[name].items()}
            path.write_text(json_text(kept))


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
    rows = _rows()
    dense = dense_row(rows)
    found = {(row["ratio_asked"], row["method"]): loss(row, dense) for row in rows}
    lines = []
    for ratio in sorted({ratio for ratio, name in found if ratio and name in SUMMARY}):
        shown = [f"{found[ratio, name]:.4f}" if (ratio, name) in found else "-" for name in SUMMARY]
        lines.append([f"{ratio:g}", *shown])
    return markdown_table(["ratio", *SUMMARY], lines).splitlines()


def table_lines() -> list[str]:
    """A row a (ratio, method), the lowest perplexity first; bits a weight as reached, where a row says it; accuracies
    in per cent."""
    rows = _rows()
    dense = dense_row(rows)
    tasks = list(dense["accuracy"])
    head = ["ratio", "bits", "method", "perplexity", "ln(ppl / dense)", "KL", "average", "from dense"]
    head += [*tasks, "seconds"]
    lines = []
    for row in sorted(rows, key=lambda row: (row["ratio_asked"], row["perplexity"])):
        of_dense = row["method"] == DENSE
        gain = f"{average(row) - average(dense):+.2f} ± {paired_error(row, dense):.2f}"
        shown = [
            "-" if of_dense else f"{row['ratio_asked']:g}",
            "16" if of_dense else f"{DENSE_BITS * (1 - row.get('ratio_reached', row['ratio_asked'])):.2f}",
            row["method"],
            f"{row['perplexity']:.2f}",
            "-" if of_dense else f"{loss(row, dense):.4f}",
            f"{row['kl']:.4f}" if "kl" in row else "-",
            f"{average(row):.2f} ± {standard_error(row):.2f}",
            "-" if of_dense else gain,
            *(f"{100 * row['accuracy'][task]:.1f}" for task in tasks),
            "-" if of_dense else f"{row['seconds_compress']:.0f}{_elsewhere(row, dense)}",
        ]
        lines.append(shown)
    return markdown_table(head, lines).splitlines()


def _rows() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


def _elsewhere(row: dict[str, Any], dense: dict[str, Any]) -> str:
    """Where a row was measured, if not where the dense model's was."""
    return "" if row["device"] == dense["device"] else f" ({row['device']})"


if __name__ == "__main__":
    app()
