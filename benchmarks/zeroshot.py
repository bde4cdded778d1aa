"""The table of docs/results.md of a real model: perplexity and zero-shot accuracy, from benchmarks/results/smollm2.

python benchmarks/zeroshot.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "smollm2"


def table_lines() -> list[str]:
    """A row a (ratio, method), the lowest perplexity first; accuracies in per cent."""
    rows = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    dense = next(row for row in rows if row["method"] == "dense")
    tasks = list(dense["accuracy"])
    lines = [
        f"| ratio | method | perplexity | ln(ppl / dense) | average | from dense | {' | '.join(tasks)} | seconds |",
        "|---|---|---|---|---|---|" + "---|" * len(tasks) + "---|",
    ]
    for row in sorted(rows, key=lambda row: (row["ratio_asked"], row["perplexity"])):
        is_dense = row is dense
        average = _average(row)
        shown = [
            "-" if is_dense else f"{row['ratio_asked']:g}",
            row["method"],
            f"{row['perplexity']:.2f}",
            "-" if is_dense else f"{math.log(row['perplexity'] / dense['perplexity']):.4f}",
            f"{average:.2f} ± {_standard_error(row):.2f}",
            "-" if is_dense else f"{average - _average(dense):+.2f}",
            *(f"{100 * row['accuracy'][task]:.1f}" for task in tasks),
            "-" if is_dense else f"{row['seconds_compress']:.0f}",
        ]
        lines.append(f"| {' | '.join(shown)} |")
    return lines


def _average(row: dict[str, Any]) -> float:
    """Of all tasks, each counting once, in per cent."""
    average: float = sum(row["accuracy"].values()) / len(row["accuracy"])
    return 100 * average


def _standard_error(row: dict[str, Any]) -> float:
    """Of the average over documents, in per cent: tasks are independent."""
    squares = [value * (1 - value) / (row["documents"][task] - 1) for task, value in row["accuracy"].items()]
    return 100 * math.sqrt(sum(squares)) / len(squares)


if __name__ == "__main__":
    print("\n".join(table_lines()))
