"""What `compress` tells when it is done."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from cospadi.commands import tables
from cospadi.compress import Compressed
from cospadi.recipe import Recipe
from cospadi.solvers import find_solver


def compressed_json(result: Compressed, recipe: Recipe) -> dict[str, Any]:
    """The closing report for machines."""
    errors = list(result.errors.values())
    return {
        "covered": result.covered,
        "ratio_asked": recipe.ratio,
        "ratio_reached": result.plan.ratio,
        "bits": result.plan.bits,
        "dense_bytes": result.plan.dense_bytes,
        "compressed_bytes": result.plan.bytes,
        "checkpoint_bytes_before": result.bytes_before,
        "checkpoint_bytes_after": result.bytes_after,
        "mean_relative_error": sum(errors) / len(errors),
        "relative_errors": result.errors,
        "left_out": result.left_out,
        "left_dense": [projection.name for projection in result.plan.left_dense],
        "seconds": {stage: round(seconds, 3) for stage, seconds in result.seconds.items()},
        "pass_seconds": result.pass_seconds and round(result.pass_seconds, 3),
    }


def compressed_parts(result: Compressed, recipe: Recipe) -> list[Table | str]:
    """The closing table, and what else the same bytes could hold."""
    bits = result.plan.bits
    if find_solver(recipe.solver).levels or recipe.bits is not None or bits < 2:
        return [compressed_table(result, recipe)]
    instead = f"--bits {bits:.4g} takes no more bytes, keeps every weight, and loses less on every model measured."
    return [compressed_table(result, recipe), instead]


def compressed_table(result: Compressed, recipe: Recipe) -> Table:
    """The closing table of `compress`. A pass is a plain forward pass of the calibration text in the dense model."""
    report = compressed_json(result, recipe)
    table = tables.new_table("", "value", *(["passes"] if result.pass_seconds else []))
    table.add_row("parameters in selected projections", f"{result.covered:.1%}")
    if left := result.left_out:
        parts = dict.fromkeys(".".join(name.split(".")[:2]) for name in left)
        table.add_row(f"left out of {', '.join(parts)}", f"{len(left)} tensors, {tables.megabytes(sum(left.values()))}")
    table.add_row("selected projections, dense", tables.megabytes(report["dense_bytes"]))
    table.add_row("selected projections, compressed", tables.megabytes(report["compressed_bytes"]))
    if report["left_dense"]:
        table.add_row("of them left dense by the budget", str(len(report["left_dense"])))
    table.add_row("ratio asked", f"{report['ratio_asked']:.4f}")
    table.add_row("ratio reached", f"{report['ratio_reached']:.4f}")
    table.add_row("bits a weight", f"{report['bits']:.3f}")
    table.add_row("whole checkpoint, before", tables.megabytes(report["checkpoint_bytes_before"]))
    table.add_row("whole checkpoint, after", tables.megabytes(report["checkpoint_bytes_after"]))
    table.add_row("mean relative error", f"{report['mean_relative_error']:.4f}")
    for stage, seconds in [*result.seconds.items(), ("all", sum(result.seconds.values()))]:
        passes = [f"{seconds / result.pass_seconds:.2f}"] if result.pass_seconds else []
        table.add_row(f"time, {stage}", tables.duration(seconds), *passes)
    return table
