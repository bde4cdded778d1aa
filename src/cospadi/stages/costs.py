"""What an error at each output of a projection costs in the loss."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cospadi.budget.plan import Group, Plan
from cospadi.calibration.fisher import output_fisher, output_fisher_by_blocks
from cospadi.calibration.walk import in_block, replaced_weights
from cospadi.jobs.ledger import Piece
from cospadi.stages.measure import whitenings
from cospadi.stages.open import Job
from cospadi.stages.solve import approximate
from cospadi.stages.tasks import Tasks, keys_of
from cospadi.stages.text import check_text


def estimate_fisher(job: Job) -> dict[str, Tensor]:
    """F of every output of every selected projection (`output_fisher`).

    Taken at the model that a uniform budget and short solver runs make of it: in a damaged model early projections
    matter more than they do in the whole one, and that is the model that is going to be.

    Returns:
        name -> float64 (d2,), on the CPU.
    """
    if (piece := job.ledger.get("fisher/2")) is not None:
        return piece.tensors()
    first = job.ledger.get("fisher/1")
    if first is None:
        first = job.ledger.put("fisher/1", {}, _fisher(job, {}))
    fisher = job.ledger.put("fisher/2", {}, _fisher(job, quick_weights(job, job.uniform, first.tensors()))).tensors()
    job.ledger.drop("quick/")
    return fisher


def quick_weights(job: Job, plan: Plan, fisher: Mapping[str, Tensor]) -> dict[Group, Piece]:
    """The weights (d2, d1) that short solver runs make of a plan's groups, in the model's dtype: a piece a group."""
    groups = plan.compressed
    with Tasks(job, "budgets", keys_of("quick", groups), approximate, lambda weights: ({}, weights)) as tasks:
        for found in whitenings(job, tasks.missing()):
            tasks.give((g, job.task(g, found.whitenings[job.inputs(g)], fisher)) for g in found.groups)
        tasks.finish()
        return dict(zip(groups, tasks.pieces(), strict=True))


def _fisher(job: Job, quick: Mapping[Group, Piece]) -> dict[str, Tensor]:
    """F of all projections in the model that some groups' replacement weights make."""
    text, blocks, projections = check_text(job), job.blocks, job.uniform.projections

    def replacement(index: int) -> dict[str, Tensor]:
        touching = [piece for group, piece in quick.items() if any(m.block == index for m in group.members)]
        weights = [item for piece in touching for item in piece.tensors().items()]
        return {name: weight.to(blocks.device) for name, weight in in_block(blocks.name_of(index), weights).items()}

    with job.stages.stage("fisher", len(text)) as progress:
        if job.calls is None:
            everything = {name: weight for piece in quick.values() for name, weight in piece.tensors().items()}
            everything = {name: weight.to(blocks.device) for name, weight in everything.items()}
            with replaced_weights(blocks.model, everything):
                fisher = output_fisher(blocks.model, projections, text, progress.advance)
        else:
            fisher = output_fisher_by_blocks(
                blocks, job.calls, projections, text, job.spill, replacement, progress.advance
            )
    return {name: values.cpu() for name, values in fisher.items()}
