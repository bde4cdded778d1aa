"""The demo: the whole job on the built-in model: dense, low rank, the paper's dictionaries, SparseGPT, and ours."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from cospadi import demo
from cospadi.calibration.text import text_windows
from cospadi.commands import evaluate, tables
from cospadi.compress import compress
from cospadi.jobs.progress import Stages
from cospadi.model import load
from cospadi.recipe import Recipe

ITERATIONS = 4
"""T of K-SVD in the demo: as many as fit its two minutes on two slow cores; the paper runs 60."""
SEQUENCES = 64
WINDOWS = 64
OURS: dict[str, Any] = {"refine": 80}
"""The default recipe, refined in fewer steps."""


@dataclass(frozen=True)
class Row:
    """A line of the demo's table: bytes are of the compressed projections on disk."""

    name: str
    nbytes: int
    ratio: float
    perplexity: float
    seconds: float


def run_demo(ratio: float, iterations: int, stages: Stages) -> list[Row]:
    """Compress the demo model four ways at one ratio, load each checkpoint from disk, measure it on held-out text."""
    folder = demo.model_path()
    tokenizer = load.load_tokenizer(folder)
    device = load.pick_device("auto")
    dense = load.load_model(folder, device)
    length = min(1024, load.positions(dense.config))
    windows = text_windows(tokenizer, ["\n".join(demo.stdlib_documents("heldout"))], length)
    windows = windows[:: max(1, len(windows) // WINDOWS)]

    def measure(model: nn.Module) -> float:
        with stages.stage("evaluate", len(windows)) as progress:
            return evaluate.perplexity(model, windows, on_batch=progress.advance).value

    rows: list[Row] = []
    dense_perplexity = measure(dense)
    methods: dict[str, dict[str, Any]] = {
        "SVD-LLM": {"method": "svd-llm"},
        f"CoSpaDi's paper (ksvd, T = {iterations})": {"method": "paper", "iterations": iterations},
        "SparseGPT": {"method": "sparsegpt"},
        "CoSpaDi": OURS,
    }
    for name, fields in methods.items():
        recipe = Recipe.build(fields, ratio=ratio, calibration="builtin", sequences=SEQUENCES)
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch) / "model"
            result = compress(folder, recipe, output, stages=stages)
            seconds = time.perf_counter() - start
            loaded = load.load_model(output, device)
            rows.append(Row(name, result.plan.bytes, result.plan.ratio, measure(loaded), seconds))
    plan = result.plan
    return [Row("dense", plan.dense_bytes, 0.0, dense_perplexity, 0.0), *rows]


def demo_table(rows: Sequence[Row]) -> Table:
    """dense against SVD-LLM, the paper's K-SVD, SparseGPT and CoSpaDi."""
    table = tables.new_table("model", "projections", "ratio", "perplexity", "seconds")
    for row in rows:
        dense = row.ratio == 0
        table.add_row(
            row.name,
            tables.megabytes(row.nbytes),
            "-" if dense else f"{row.ratio:.4f}",
            f"{row.perplexity:.2f}",
            "-" if dense else f"{row.seconds:.0f}",
        )
    return table
