"""Tables for people and mappings for machines, from what the job returns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from cospadi.budget.plan import Group, Plan
from cospadi.commands.bench import Benched
from cospadi.commands.demo import Row
from cospadi.commands.doctor import Examination
from cospadi.commands.estimate import Estimate
from cospadi.commands.evaluate import Perplexity
from cospadi.compress import Compressed
from cospadi.format.form import dense_bytes
from cospadi.format.safetensors import StoredTensor
from cospadi.format.schema import StoredProjection
from cospadi.recipe import Recipe


def megabytes(nbytes: int | None) -> str:
    """Bytes in MB of 10^6 bytes, for reading."""
    return "unknown" if nbytes is None else f"{nbytes / 1e6:,.2f} MB"


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in ("projection", "", "model", "layout") else "right")
    return table


def plan_json(
    plan: Plan, recipe: Recipe, stored_bytes: int | None, left: int | None, final: bool = True
) -> dict[str, Any]:
    """The plan for machines; bytes are exact. `final`: whether `compress` would follow it as it stands."""
    return {
        "final": final,
        "ratio_asked": recipe.ratio,
        "ratio_reached": plan.ratio,
        "dense_bytes": plan.dense_bytes,
        "compressed_bytes": plan.bytes,
        "checkpoint_bytes_before": stored_bytes,
        "checkpoint_bytes_after": left,
        "groups": [
            {
                "members": [member.name for member in group.members],
                "layout": group.layout,
                "d1": group.d1,
                "d2": group.d2s,
                "k": group.k,
                "s": group.s,
                "value_bits": group.value_bits,
                "dense_bytes": group.dense_bytes,
                "bytes": group.parts.total,
                "dictionary_bytes": group.parts.dictionary,
                "support_bytes": group.parts.support,
                "values_bytes": group.parts.values,
            }
            for group in plan.groups
        ],
    }


def estimate_json(found: Estimate) -> dict[str, Any]:
    """What a job will cost, for machines: FLOPs, bytes, seconds; null where nothing was timed."""
    seconds = found.seconds
    return {
        "flops": sum(flops.total for flops in found.flops.values()),
        "seconds": None if seconds is None else round(sum(seconds.values()), 3),
        "memory_bytes": found.memory_bytes,
        "disk_bytes": found.disk_bytes,
        "stages": {
            stage: {
                "flops_products": flops.products,
                "flops_others": flops.others,
                "seconds": None if seconds is None else round(seconds[stage], 3),
            }
            for stage, flops in found.flops.items()
        },
    }


def estimate_table(found: Estimate) -> Table:
    """A line a stage: FLOPs and time; then memory and disk."""
    seconds = found.seconds or {}
    table = _table("compress would take", "FLOPs", "time")
    table.columns[0].justify = "left"
    for stage, flops in found.flops.items():
        if flops.total or seconds.get(stage):
            table.add_row(stage, _flops(flops.total), duration(seconds[stage]) if seconds else "-")
    total = sum(flops.total for flops in found.flops.values())
    table.add_section()
    table.add_row("all", _flops(total), duration(sum(seconds.values())) if seconds else "-")
    table.add_row("peak memory", "", gigabytes(found.memory_bytes))
    table.add_row("disk, beside the source", "", gigabytes(found.disk_bytes))
    return table


def _flops(count: float) -> str:
    """FLOPs with a prefix, for reading."""
    for unit in ("", "k", "M", "G", "T", "P", "E"):
        if count < 1000:
            return f"{count:.3g} {unit}".rstrip()
        count /= 1000
    return f"{count:,.0f} Z"


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days, for reading."""
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def gigabytes(nbytes: int) -> str:
    """Bytes in MB of 10^6 or GB of 10^9 bytes, for reading."""
    return megabytes(nbytes) if nbytes < 10**9 else f"{nbytes / 1e9:,.2f} GB"


def plan_table(plan: Plan) -> Table:
    """A line a group: layout, shape, k, s, bytes before and after."""
    table = _table("projection", "layout", "d1 x d2", "k", "s", "dense bytes", "bytes", "ratio")
    for group in plan.groups:
        names = group.members[0].name + (f" (+{len(group.members) - 1})" if len(group.members) > 1 else "")
        shape = f"{group.d1} x {'+'.join(map(str, group.d2s))}"
        table.add_row(
            names,
            group.layout,
            shape,
            str(group.k) if group.k else "-",
            _nonzeros_a_column(group),
            f"{group.dense_bytes:,}",
            f"{group.parts.total:,}",
            f"{1 - group.parts.total / group.dense_bytes:.4f}",
        )
    table.add_section()
    table.add_row("all", "", "", "", "", f"{plan.dense_bytes:,}", f"{plan.bytes:,}", f"{plan.ratio:.4f}")
    return table


def _nonzeros_a_column(group: Group) -> str:
    """s, or the mean with one decimal where columns differ."""
    if not group.nonzeros:
        return "-"
    return f"{group.s:.1f}" if group.nonzeros % sum(group.d2s) else f"{group.s:.0f}"


def compressed_json(result: Compressed, recipe: Recipe) -> dict[str, Any]:
    """The closing report for machines."""
    errors = list(result.errors.values())
    return {
        "ratio_asked": recipe.ratio,
        "ratio_reached": result.plan.ratio,
        "dense_bytes": result.plan.dense_bytes,
        "compressed_bytes": result.plan.bytes,
        "checkpoint_bytes_before": result.bytes_before,
        "checkpoint_bytes_after": result.bytes_after,
        "mean_relative_error": sum(errors) / len(errors),
        "relative_errors": result.errors,
        "left_dense": [projection.name for projection in result.plan.left_dense],
        "seconds": {stage: round(seconds, 3) for stage, seconds in result.seconds.items()},
    }


def compressed_table(result: Compressed, recipe: Recipe) -> Table:
    """The closing table of `compress`."""
    report = compressed_json(result, recipe)
    table = _table("", "value")
    table.add_row("selected projections, dense", megabytes(report["dense_bytes"]))
    table.add_row("selected projections, compressed", megabytes(report["compressed_bytes"]))
    if report["left_dense"]:
        table.add_row("of them left dense by the budget", str(len(report["left_dense"])))
    table.add_row("ratio asked", f"{report['ratio_asked']:.4f}")
    table.add_row("ratio reached", f"{report['ratio_reached']:.4f}")
    table.add_row("whole checkpoint, before", megabytes(report["checkpoint_bytes_before"]))
    table.add_row("whole checkpoint, after", megabytes(report["checkpoint_bytes_after"]))
    table.add_row("mean relative error", f"{report['mean_relative_error']:.4f}")
    for stage, seconds in result.seconds.items():
        table.add_row(f"time, {stage}", duration(seconds))
    return table


def inspect_json(
    entries: Mapping[str, StoredProjection],
    manifest: Mapping[str, Any] | None,
    tensors: Mapping[str, StoredTensor],
) -> dict[str, Any]:
    """What is in a checkpoint: a mapping a projection, those that the budget left dense included, and totals."""
    recorded = (manifest or {}).get("projections", {})
    projections: dict[str, dict[str, Any]] = {
        name: {
            "layout": entry.form.layout,
            "d1": entry.d1,
            "d2": entry.d2,
            "k": entry.k,
            "nnz": entry.nnz,
            "value_bits": entry.form.codec.bits,
            "dictionary": entry.owner,
            "dense_bytes": dense_bytes(entry.d1, entry.d2),
            "bytes": sum(tensors[tensor].nbytes for tensor in entry.tensors(name)),
            "relative_error": recorded.get(name, {}).get("relative_error"),
        }
        for name, entry in entries.items()
    }
    for name, nbytes in (manifest or {}).get("dense", {}).items():
        d2, d1 = tensors[f"{name}.weight"].shape
        projections[name] = {
            "layout": "dense", "d1": d1, "d2": d2, "k": None, "nnz": 0, "value_bits": None, "dictionary": None,
            "dense_bytes": nbytes, "bytes": nbytes, "relative_error": None,
        }  # fmt: skip
    dense = sum(item["dense_bytes"] for item in projections.values())
    compressed = sum(item["bytes"] for item in projections.values())
    return {
        "projections": projections,
        "dense_bytes": dense,
        "compressed_bytes": compressed,
        "ratio": (dense - compressed) / dense if dense else 0.0,
        "checkpoint_bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "recipe": (manifest or {}).get("recipe"),
    }


def inspect_table(report: Mapping[str, Any]) -> Table:
    """A line a projection: layout, shape, bytes, ratio, error; totals."""
    table = _table("projection", "layout", "d1 x d2", "k", "nonzeros", "dense bytes", "bytes", "ratio", "error")
    for name, item in report["projections"].items():
        error = item["relative_error"]
        shared = "" if item["dictionary"] in (name, None) else " (shared)"
        table.add_row(
            name,
            item["layout"] + shared,
            f"{item['d1']} x {item['d2']}",
            str(item["k"] or "-"),
            f"{item['nnz']:,}" if item["nnz"] else "-",
            f"{item['dense_bytes']:,}",
            f"{item['bytes']:,}",
            f"{1 - item['bytes'] / item['dense_bytes']:.4f}",
            "-" if error is None else f"{error:.4f}",
        )
    table.add_section()
    table.add_row(
        "all", "", "", "", "", f"{report['dense_bytes']:,}", f"{report['compressed_bytes']:,}", f"{report['ratio']:.4f}"
    )
    return table


def perplexity_json(results: Sequence[tuple[str, Perplexity]]) -> dict[str, Any]:
    """Perplexity of each model; of two, also the difference and ln of the ratio, first against second."""
    data: dict[str, Any] = {
        "models": [
            {"model": name, "perplexity": _finite(result.value), "windows": result.windows, "length": result.length}
            for name, result in results
        ]
    }
    if len(results) == 2:
        first, second = (result.value for _, result in results)
        data |= {"difference": _finite(first - second), "log_ratio": _finite(math.log(first / second))}
    return data


def _finite(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None


def perplexity_lines(results: Sequence[tuple[str, Perplexity]]) -> list[str]:
    """A line a model, and a line for the difference."""
    lines = [
        f"{name}: perplexity {result.value:.4f} ({result.windows} windows of {result.length} tokens)"
        for name, result in results
    ]
    data = perplexity_json(results)
    if data.get("difference") is not None:
        lines.append(f"difference {data['difference']:+.4f}, ln of the ratio {data['log_ratio']:+.4f}")
    return lines


def demo_table(rows: Sequence[Row]) -> Table:
    """dense against SVD-LLM, the paper's K-SVD and CoSpaDi."""
    table = _table("model", "projections", "ratio", "perplexity", "seconds")
    for row in rows:
        dense = row.ratio == 0
        table.add_row(
            row.name,
            megabytes(row.nbytes),
            "-" if dense else f"{row.ratio:.4f}",
            f"{row.perplexity:.2f}",
            "-" if dense else f"{row.seconds:.0f}",
        )
    return table


def doctor_table(found: Examination) -> Table:
    """A line a fact."""
    table = _table("", "value")
    table.columns[1].justify = "left"
    for name, number in found.versions.items():
        table.add_row(name, number)
    table.add_row("machine", found.machine)
    table.add_row("torch's threads", str(found.threads))
    table.add_row("CPU kernel", found.cpu_kernel or "not built: the reference runs")
    if found.cpu_levels:
        table.add_row("CPU kernels that run here", ", ".join(found.cpu_levels))
        table.add_row("threads from", found.openmp or "one thread only")
    table.add_row("GPUs", ", ".join(found.devices) or "none")
    for name, ok in found.checks.items():
        table.add_row(f"self-check, {name}", "right" if ok else "WRONG")
    return table


def bench_json(results: Sequence[Benched]) -> dict[str, Any]:
    """Figures of `cospadi bench` for machines; the first model is the one that others are compared with."""
    return {
        "models": [
            {
                "model": result.name,
                "load_seconds": round(result.memory.load_seconds, 3),
                "tensor_bytes": result.memory.tensors,
                "resident_weight_bytes": result.memory.weights,
                "peak_resident_bytes": result.memory.peak,
                "speeds": [
                    {
                        "kind": speed.kind,
                        "size": speed.size,
                        "tokens_per_second": round(speed.median, 3),
                        "spread": round(speed.spread, 4),
                        "against_first": round(speed.median / first.median, 4),
                        "runs": [round(run, 3) for run in speed.tokens_per_second],
                    }
                    for speed, first in zip(result.speeds, results[0].speeds, strict=True)
                ],
            }
            for result in results
        ]
    }


def bench_table(results: Sequence[Benched]) -> Table:
    """A line a kind of work: median tokens a second of each model, the spread, and the ratio to the first."""
    table = _table("", *(result.name for result in results))
    for index, first in enumerate(results[0].speeds):
        what = f"{first.size} tokens" if first.kind == "prefill" else f"batch {first.size}"
        cells = []
        for result in results:
            speed = result.speeds[index]
            ratio = "" if result is results[0] else f"  {speed.median / first.median:.2f}x"
            cells.append(f"{speed.median:,.1f} ± {100 * speed.spread:.0f}%{ratio}")
        table.add_row(f"{first.kind}, {what}, tokens/s", *cells)
    table.add_section()
    table.add_row("weights, as stored in memory", *(megabytes(result.memory.tensors) for result in results))
    table.add_row("resident after one token", *(megabytes(result.memory.weights) for result in results))
    table.add_row("peak resident", *(megabytes(result.memory.peak) for result in results))
    table.add_row("loading and one token", *(f"{result.memory.load_seconds:.1f} s" for result in results))
    return table
