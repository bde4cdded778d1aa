"""The method, top to bottom: text, what errors cost, budgets, Gram matrices, solved and refined groups, checkpoint."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cospadi.budget.plan import Plan, check_plan, read_plan, read_plan_recipe
from cospadi.format import safetensors
from cospadi.jobs.ledger import JobDirectory, Ledger
from cospadi.jobs.pool import Engine
from cospadi.jobs.progress import Stages
from cospadi.model import load
from cospadi.recipe import CACHE_BYTES, Recipe
from cospadi.stages.budgets import allocate
from cospadi.stages.costs import estimate_costs
from cospadi.stages.measure import WalkedBlock, blocks_to_solve
from cospadi.stages.open import begin, check_space, inputs_of, open_ledger, opened
from cospadi.stages.refine import Refinement
from cospadi.stages.solve import as_stored, factorize, record
from cospadi.stages.tasks import Tasks, keys_of
from cospadi.stages.text import read_text
from cospadi.stages.write import finish


def compress(
    model: str | Path | nn.Module,
    recipe: Recipe | Path | str | dict[str, Any] | None = None,
    output: str | Path | None = None,
    *,
    plan: Plan | Path | str | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    resume: bool | None = None,
    engine: Engine | None = None,
    cache_bytes: int = CACHE_BYTES,
    shared: JobDirectory | None = None,
    stages: Stages | None = None,
) -> Compressed:
    """Compress a causal language model after training.

    With a folder or hub name and an output the model is never in memory whole, and finished pieces are kept in
    OUTPUT.work until the output is there: the same call resumes where one that died has stopped.

    Args:
        model: folder, hub name, "demo", or a loaded transformers model on one device (which is changed in place, and
            for which the recipe's device and revision mean nothing).
        recipe: a Recipe, a YAML file, or a mapping of its fields.
        output: folder to write the checkpoint to; None leaves the result in memory.
        plan: groups and their sizes from `measure_plan`, or the file they were saved to, whose recipe is followed
            where `recipe` is None; None measures them here.
        tokenizer: needed with a loaded model, unless the recipe is data-free.
        overwrite: replace an output folder that is not empty.
        resume: False restarts where an unfinished job of this output lies; else it is resumed if it is the same job.
        engine: who solves; None is this process.
        cache_bytes: of hidden states kept in memory; the rest lies on disk.
        shared: tokens, Grams and gradients of the dense model are taken from there, and put there where they are not;
            jobs of the same model, of the same fields `recipe.CALIBRATED`, can have it in common. The model is one on
            disk.
        stages: where to show progress.

    Raises:
        UserError: a request that cannot be met; nothing was written to the output.
    """
    if recipe is None and isinstance(plan, (str, Path)):
        recipe = read_plan_recipe(Path(plan))
    recipe, engine, stages = Recipe.build(recipe), engine or Engine(), stages or Stages()
    target, loaded = Path(output) if output is not None else None, isinstance(model, nn.Module)
    given = plan if isinstance(plan, (str, Path)) else None
    inputs = inputs_of(model, calibration=recipe.calibration, plan=given) if target is not None else {}
    with ExitStack() as stack:
        ledger = open_ledger(target, not loaded, overwrite, resume, inputs)
        stack.callback(ledger.close)
        job = stack.enter_context(
            opened(model, recipe, tokenizer, stages, engine, ledger, cache_bytes, target is None, shared)
        )
        parameters = sum(parameter.numel() for parameter in job.blocks.model.parameters())
        before = safetensors.tensor_sizes(job.folder) if job.folder else {}
        left_out = {name: before.pop(name) for name in job.blocks.unknown} if job.recipe.text_only else {}
        if isinstance(plan, (str, Path)):
            plan = read_plan(Path(plan), job.uniform.projections, recipe)
        if plan is not None:
            check_plan(plan, job.uniform, recipe)
        if target is not None:
            check_space(job, plan or job.uniform, target)
        begin(job, plan)

        # Calibration text, and how the blocks are called with it.
        read_text(job)

        # What errors at the outputs cost in the loss.
        costs = estimate_costs(job) if job.recipe.wants_gradients else None

        # Bytes for each group: k and s.
        plan = plan or allocate(job, costs)

        # D and S of each group, block by block and input by input. `factorize` runs in a worker: the recipe's solver,
        # by default solvers/htp.py, then both factors as they are stored. The values of a whole block are then tuned.
        with Tasks(job, "solve", keys_of("factors", plan.compressed), factorize, record) as tasks:
            refinement = Refinement(job, costs) if job.refines else None
            unfinished = refinement.missing(plan.compressed) if refinement else tasks.missing()
            missing = set(tasks.missing()).intersection(unfinished)
            for block in blocks_to_solve(job, plan.compressed, unfinished):
                for groups in block.sets:  # those that read the same tensor
                    tasks.give(
                        (group, job.task(group, whitening, costs.of(group) if costs else None, weight=weight))
                        for group, whitening, weight in block.measure([group for group in groups if group in missing])
                    )
                    if isinstance(block, WalkedBlock):
                        block.swap_in(tasks.weights(groups))
                if isinstance(block, WalkedBlock) and refinement:
                    block.swap_in(refinement.refine(block, tasks.pieces(block.groups)))
            tasks.finish()
            pieces = refinement.pieces(plan.compressed) if refinement else tasks.pieces(plan.compressed)
            plan = as_stored(plan, pieces)

        # config.json, the factors, everything else as it was, hashes.
        manifest = finish(job, plan, pieces, target)

        errors = {name: error for piece in pieces for name, error in piece.record["errors"].items()}
        after = safetensors.tensor_bytes(target) if target is not None else None
        if isinstance(ledger, JobDirectory):
            ledger.remove()
        in_memory = job.blocks.model if target is None or loaded else None
        seconds, device = stages.seconds, job.blocks.device
        covered = sum(projection.d1 * projection.d2 for projection in plan.projections) / parameters
        return Compressed(
            plan,
            manifest,
            errors,
            covered,
            left_out,
            before,
            after,
            seconds,
            job.pass_seconds,
            target,
            device,
            in_memory,
        )


def measure_plan(
    model: str | Path | nn.Module,
    recipe: Recipe | Path | str | dict[str, Any] | None = None,
    *,
    tokenizer: Any = None,
    directory: Path | None = None,
    resume: bool | None = None,
    engine: Engine | None = None,
    cache_bytes: int = CACHE_BYTES,
    stages: Stages | None = None,
) -> Plan:
    """The plan that `compress` would follow: calibrates, and spreads the bytes, but compresses nothing.

    Args:
        model, recipe, tokenizer, engine, cache_bytes, stages: as of `compress`; a loaded model is left as it was.
        directory: for finished pieces, from which the same call resumes if it died; removed at the end.

    Raises:
        UserError: a request that cannot be met.
    """
    training = isinstance(model, nn.Module) and model.training
    recipe, engine, stages = Recipe.build(recipe), engine or Engine(), stages or Stages()
    with ExitStack() as stack:
        ledger = Ledger() if directory is None else JobDirectory(directory, resume)
        stack.callback(ledger.close)
        job = stack.enter_context(opened(model, recipe, tokenizer, stages, engine, ledger, cache_bytes))
        stack.callback(job.blocks.model.train, training)
        begin(job, None)
        read_text(job)
        costs = estimate_costs(job) if job.recipe.allocate != "uniform" else None
        plan = allocate(job, costs)
        if isinstance(ledger, JobDirectory):
            ledger.remove()
        return plan


@dataclass(frozen=True)
class Compressed:
    """What `compress` gives back.

    Attributes:
        plan: groups, k, s and bytes.
        manifest: what `cospadi.json` holds (hashes of files only if it was written).
        errors: projection -> relative error in the whitened metric, of the stored factors.
        covered: what part of the model's parameters lies in projections that the ratio counts.
        left_out: tensors of the source that the text-only class does not know, where that was asked for -> bytes.
        before: tensors of the source, but for those left out -> bytes as stored; none where nothing was read.
        bytes_after: of all tensors that were written; None where none were.
        seconds: stage -> seconds.
        pass_seconds: of one plain forward pass of the calibration text through the dense model; None without text.
        folder: where it was written; None for a result in memory.
        device: where the model computes.
        in_memory: the model, if it was made in memory.
    """

    plan: Plan
    manifest: dict[str, Any]
    errors: dict[str, float]
    covered: float
    left_out: dict[str, int]
    before: dict[str, int]
    bytes_after: int | None
    seconds: dict[str, float]
    pass_seconds: float | None
    folder: Path | None
    device: torch.device
    in_memory: nn.Module | None = None

    @property
    def bytes_before(self) -> int | None:
        """Of the source's tensors together; None where nothing was read."""
        return sum(self.before.values()) or None

    @cached_property
    def model(self) -> nn.Module:
        """The compressed model, ready to run and to save; read from what was written when it is first asked for."""
        if self.in_memory is not None:
            return self.in_memory
        assert self.folder is not None
        return load.load_model(self.folder, self.device)
