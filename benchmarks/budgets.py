"""What the short solver runs of the budgets are worth: ln(ppl / dense) with longer, shorter or fewer ones.

    python benchmarks/budgets.py MODEL --calibration FILE --text FILE --short-runs 16
    python benchmarks/budgets.py MODEL --calibration FILE --text FILE --coarse --seed 1

Plain calibration, because compensation has nothing to do with budgets. The seed sets the order of the text, which tells
how much of a difference is chance.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer

import cospadi
from cospadi.calibration.text import read_text
from cospadi.commands import evaluate
from cospadi.model import load
from cospadi.recipe import Recipe
from cospadi.stages import budgets as spreading

COARSE_RHOS = (1.6, 2.5, 4.2)


def coarse_ratios(recipe: Recipe) -> list[float]:
    """Three ratios in place of `budgets.measured_ratios`."""
    r = recipe.ratio
    return [0.3 * r, r, r + 0.4 * (1 - r)]


def main(
    model: Path,
    calibration: Annotated[str, typer.Option()],
    text: Annotated[Path, typer.Option()],
    ratio: Annotated[list[float] | None, typer.Option()] = None,
    seed: Annotated[list[int] | None, typer.Option()] = None,
    short_runs: Annotated[int, typer.Option(help="iterations of a short run")] = 8,
    coarse: Annotated[bool, typer.Option("--coarse", help="three ratios and three rho in place of four")] = False,
    threads: int = 1,
) -> None:
    """Print a line a ratio and seed."""
    torch.set_num_threads(threads)
    if coarse:
        spreading.RHOS, spreading.measured_ratios = COARSE_RHOS, coarse_ratios
    tokenizer = load.load_tokenizer(model)
    dense = load.load_model(model, torch.device("cpu"))
    windows = evaluate.text_windows(tokenizer, read_text(text), min(1024, load.positions(dense.config)))
    before = evaluate.perplexity(dense, windows).value
    for one_seed in seed or [42, 1]:
        for one_ratio in ratio or [0.2, 0.3, 0.4, 0.5]:
            recipe = Recipe.build(
                ratio=one_ratio, calibration=calibration, compensate=False, seed=one_seed, budget_iterations=short_runs
            )
            with tempfile.TemporaryDirectory() as scratch:
                result = cospadi.compress(model, recipe, Path(scratch) / "compressed")
                after = evaluate.perplexity(result.model, windows).value
            budgets = f"{result.seconds['budgets']:.1f} s of budgets"
            print(f"seed {one_seed}, ratio {one_ratio:g}: {math.log(after / before):.4f}, {budgets}", flush=True)


if __name__ == "__main__":
    typer.run(main)
