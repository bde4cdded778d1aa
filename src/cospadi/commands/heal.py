"""What `heal` tells when it is done."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table

from cospadi.calibration.loss import perplexity_of
from cospadi.commands import tables
from cospadi.heal import Healed


def healed_json(result: Healed) -> dict[str, Any]:
    """The closing report for machines."""
    report = asdict(result) | {"folder": str(result.folder), "better": result.better}
    for name, quality in (("before", result.before), ("after", result.after)):
        divergence = quality.divergence if result.top else None
        report[name] = {"perplexity": perplexity_of(quality.loss), "kl_divergence": divergence}
    report["dense"] = {"perplexity": perplexity_of(report.pop("dense_loss"))}
    report["seconds"] = {stage: round(seconds, 3) for stage, seconds in result.seconds.items()}
    return report


def healed_table(result: Healed) -> Table:
    """What the folder was worth on the text that was set aside, what it is worth now, and the dense model."""
    table = tables.new_table(f"{result.held_out} sequences that were set aside", "before", "after", "dense")
    losses = (result.before.loss, result.after.loss, result.dense_loss)
    table.add_row("perplexity", *(f"{perplexity_of(loss):.4f}" for loss in losses))
    table.add_row("ln(ppl / dense)", *(f"{loss - result.dense_loss:.4f}" for loss in losses[:2]), "")
    if result.top:
        name = f"KL divergence from dense, its {result.top:,} likeliest"
        table.add_row(name, *(f"{one.divergence:.5f}" for one in (result.before, result.after)), "")
    return table


def healed_lines(result: Healed) -> list[str]:
    """What was done, in sentences."""
    if not result.steps:
        teacher, judge = (tables.duration(result.seconds.get(stage, 0.0)) for stage in ("teacher", "judge"))
        return [
            f"The time was over before the first step: the dense model's predictions took {teacher} of this run, "
            f"judging the folder {judge}, which is done once more at the end. {result.folder} is a copy of the folder. "
            "Give more --minutes or a smaller --length."
        ]
    read = f"{result.sequences:,} sequences of {result.length} tokens"
    if not result.better:
        return [f"None of {result.steps:,} steps on {read} was better: {result.folder} is a copy of the folder."]
    taken = f"{result.steps:,} steps" if result.best == result.steps else f"step {result.best:,} of {result.steps:,}"
    gone = f"{1 - result.after.divergence / result.before.divergence:.0%} of the divergence is gone"
    if not result.top:
        gone = f"the loss is {result.before.loss - result.after.loss:.4f} nats a token less"
    return [f"After {taken} on {read} {gone}; the bytes are the same."]
