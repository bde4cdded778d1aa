"""What `compress` would do, planned or measured: groups, sizes, bytes, and what it would cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from cospadi.budget.plan import Group, Outlook, Plan, check_plan_file, outlook, write_plan
from cospadi.commands import tables
from cospadi.commands.estimate import Estimate, estimate
from cospadi.compress import measure_plan
from cospadi.jobs.pool import Engine
from cospadi.jobs.progress import Stages
from cospadi.recipe import CACHE_BYTES, Recipe
from cospadi.stages.open import check_place, inputs_of, job_directory


@dataclass(frozen=True)
class Planned:
    """What `cospadi plan` prints.

    Attributes:
        found: the groups and bytes, for every group the same ratio where nothing was measured.
        costs: what the job would take.
        final: whether `compress` would follow the plan as it stands.
        notes: sentences below the table.
    """

    recipe: Recipe
    found: Outlook
    costs: Estimate
    final: bool
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """The same for machines."""
        data = plan_json(self.found.plan, self.recipe, self.found.before, self.found.after, self.final)
        return data | {"estimate": estimate_json(self.costs)}

    def parts(self) -> list[Table | str]:
        """Tables and lines."""
        return [plan_table(self.found.plan), *self.notes, "", estimate_table(self.costs)]


def plan(
    model: str,
    recipe: Recipe,
    measure: Path | None = None,
    timing: bool = True,
    stages: Stages | None = None,
    *,
    resume: bool | None = None,
    engine: Engine | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Planned:
    """What compressing a model would do, from its config and headers alone, or measured.

    Args: as of `cospadi.measure_plan`.
        measure: where to save a measured plan; None measures nothing.
        timing: run pieces of the job to tell its time.

    Raises:
        UserError: a request that cannot be met.
    """
    measured = None
    if measure:
        check_place(measure, inputs_of(model, calibration=recipe.calibration), "plan")
        check_plan_file(measure)
        measured = measure_plan(
            model, recipe, directory=job_directory(measure), resume=resume, engine=engine,
            cache_bytes=cache_bytes, stages=stages,
        )  # fmt: skip
        write_plan(measured, recipe, measure)
    found = outlook(model, recipe, measured)
    costs = estimate(model, recipe, found.plan, cache_bytes=cache_bytes, timing=timing)
    notes = [f"{found.covered:.1%} of the model's parameters are in selected projections."]
    notes += [f"Whole checkpoint: {tables.megabytes(found.before)} before, {tables.megabytes(found.after)} after."]
    notes += [f"{left[0].upper()}{left[1:]}." for left in found.left]
    if measure:
        notes.append(f"Saved to {measure}: cospadi compress {model} --plan {measure} --output DIR")
    allocate = recipe.settled().allocate
    final = measured is not None or allocate == "uniform"
    if not final:
        notes.append(
            f"This is the uniform budget. Under --allocate {allocate} only the groups and the total are "
            "final: what each group gets is measured with calibration text, which --measure FILE does."
        )
    return Planned(recipe, found, costs, final, notes)


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
                "values": group.values,
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


def plan_table(plan: Plan) -> Table:
    """A line a group: layout, codec, shape, k, s, bytes before and after."""
    table = tables.new_table("projection", "layout", "values", "d1 x d2", "k", "s", "dense bytes", "bytes", "ratio")
    for group in plan.groups:
        names = group.members[0].name + (f" (+{len(group.members) - 1})" if len(group.members) > 1 else "")
        shape = f"{group.d1} x {'+'.join(map(str, group.d2s))}"
        table.add_row(
            names,
            group.layout,
            group.values or "-",
            shape,
            str(group.k) if group.k else "-",
            _nonzeros_a_column(group),
            f"{group.dense_bytes:,}",
            f"{group.parts.total:,}",
            f"{1 - group.parts.total / group.dense_bytes:.4f}",
        )
    table.add_section()
    table.add_row("all", "", "", "", "", "", f"{plan.dense_bytes:,}", f"{plan.bytes:,}", f"{plan.ratio:.4f}")
    return table


def _nonzeros_a_column(group: Group) -> str:
    """s, or the mean with one decimal where columns differ."""
    if not group.nonzeros:
        return "-"
    return f"{group.s:.1f}" if group.nonzeros % sum(group.d2s) else f"{group.s:.0f}"


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
    table = tables.new_table("compress would take", "FLOPs", "time")
    table.columns[0].justify = "left"
    for stage, flops in found.flops.items():
        if flops.total or seconds.get(stage):
            table.add_row(stage, _flops(flops.total), tables.duration(seconds[stage]) if seconds else "-")
    total = sum(flops.total for flops in found.flops.values())
    table.add_section()
    table.add_row("all", _flops(total), tables.duration(sum(seconds.values())) if seconds else "-")
    table.add_row("peak memory", "", tables.gigabytes(found.memory_bytes))
    table.add_row("disk, beside the source", "", tables.gigabytes(found.disk_bytes))
    return table


def _flops(count: float) -> str:
    """FLOPs with a prefix, for reading."""
    for unit in ("", "k", "M", "G", "T", "P", "E"):
        if count < 1000:
            return f"{count:.3g} {unit}".rstrip()
        count /= 1000
    return f"{count:,.0f} Z"
