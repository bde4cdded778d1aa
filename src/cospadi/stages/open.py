"""What all stages of a job share: the model's blocks, the text, the ledger, the workers, the walk over the blocks."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from cospadi.budget.plan import Group
from cospadi.calibration import walk as sequence
from cospadi.calibration.grams import IDENTITY, Whitening, accumulate_grams, whiten
from cospadi.calibration.spill import Shelf
from cospadi.calibration.text import token_sequences
from cospadi.calibration.walk import Calls
from cospadi.errors import UserError
from cospadi.jobs.ledger import Ledger, Piece
from cospadi.jobs.pool import Pool, Task
from cospadi.jobs.progress import Stages
from cospadi.model import load
from cospadi.model.blocks import Blocks
from cospadi.recipe import CACHE_BYTES as CACHE_BYTES
from cospadi.recipe import Recipe
from cospadi.solvers import find_solver
from cospadi.stages.solve import Work, memory_of, work_of

log = logging.getLogger("cospadi")

R = TypeVar("R")


@dataclass
class Job:
    """What all stages of one compression look at.

    Attributes:
        owner: projection -> the first reader of its input.
        cache_bytes: CACHE_BYTES, or what was asked instead.
        keep_grams: write whitenings that do not fit in memory to the ledger, where they are computed again otherwise.
        sequences: calibration tokens, int64 (sequences, tokens); None without calibration.
        calls: how blocks are called; None for a model whose blocks do not simply follow each other, which runs whole.
        metrics: inputs of a group -> their whitening, kept if all of them fit.
    """

    recipe: Recipe
    blocks: Blocks
    owner: Mapping[str, str]
    stages: Stages
    ledger: Ledger
    shelf: Shelf
    pool: Pool
    cache_bytes: int = CACHE_BYTES
    keep_grams: bool = False
    sequences: Tensor | None = None
    calls: Calls | None = None
    metrics: dict[tuple[str, ...], Whitening] = field(default_factory=dict)

    def compensates(self) -> bool:
        """Whether projections make up for the errors before them."""
        return self.calls is not None and wants_compensation(self.recipe)

    def inputs(self, group: Group) -> tuple[str, ...]:
        """The tensors that a group's members read, each by its first reader."""
        return tuple(dict.fromkeys(self.owner[member.name] for member in group.members))

    def weight(self, group: Group) -> Tensor:
        """W of a group's members side by side, (d1, sum of d2)."""
        return torch.cat([self.blocks.weight(member.name).T for member in group.members], dim=1)

    def work(
        self, group: Group, metric: Whitening, fisher: Mapping[str, Tensor] | None, weight: Tensor | None = None
    ) -> Work:
        """A group's problem, of its own weight unless another is given."""
        of_group = None if fisher is None else torch.cat([fisher[member.name] for member in group.members])
        weight = self.weight(group) if weight is None else weight
        return Work(self.recipe, group, metric, weight, of_group, weighs_columns(self.recipe), self.blocks.device)

    def task(self, work: Work, *more: Any) -> Task:
        """The same for the pool; what leaves this process travels through the CPU."""
        if not self.pool.here:
            work = replace(work.on(torch.device("cpu")), device=torch.device(work.device.type))
        return Task((work, *more), memory_of(work.group))


def needs_text(recipe: Recipe) -> bool:
    """Whether a recipe is calibrated on text."""
    return not recipe.data_free and find_solver(recipe.solver).whitened


def allocation_of(recipe: Recipe) -> str:
    """How a recipe spreads bytes."""
    if recipe.allocate in ("fisher", "output") and not needs_text(recipe):
        raise UserError(f"solver {recipe.solver} uses no calibration text to allocate by. Use --allocate uniform")
    if recipe.allocate is not None:
        return recipe.allocate
    return "fisher" if needs_text(recipe) and recipe.accounting == "exact" else "uniform"


def weighs_columns(recipe: Recipe) -> bool:
    """Whether a recipe's solver weighs outputs by what they cost in the loss."""
    if recipe.weight_columns == "fisher" and not needs_text(recipe):
        raise UserError(f"solver {recipe.solver} uses no calibration text to weigh by. Use --weight-columns none")
    if recipe.weight_columns is not None:
        return recipe.weight_columns == "fisher"
    return needs_text(recipe) and recipe.allocate != "output"


def wants_compensation(recipe: Recipe) -> bool:
    """Whether projections of a recipe are to make up for the errors before them."""
    possible = needs_text(recipe) and recipe.layers_shared == 1
    if recipe.compensate and not possible:
        why = "a dictionary serves several blocks" if needs_text(recipe) else "there is no text"
        raise UserError(f"compensate is not possible: {why}. Use --no-compensate, or leave it out")
    return possible and recipe.compensate is not False


def read_text(job: Job, tokenizer: Any, folder: Path | None) -> None:
    """Read the calibration text and find out how the model's blocks are called with it.

    A job that goes on has its tokens already; a local text is then checked to be the one they were read from.

    Args:
        folder: where a model that turns out to be needed whole is loaded from.

    Raises:
        UserError: no tokenizer, no text, or another one than before.
    """
    recipe = job.recipe
    if tokenizer is None:
        raise UserError("calibration needs the model's tokenizer: pass tokenizer=, or make the recipe data_free")
    local = Path(recipe.calibration or "").expanduser()
    with job.stages.stage("text", 1):
        digest = None
        if local.is_file():
            with local.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        piece = job.ledger.get("text")
        if piece is None:
            model = job.blocks.model
            job.sequences = token_sequences(tokenizer, recipe, load.positions(model.config), load.vocabulary(model))
            job.ledger.put("text", {"sha256_of_file": digest}, {"tokens": job.sequences})
        else:
            if piece.record.get("sha256_of_file") != digest:
                raise UserError(
                    f"calibration text {recipe.calibration} is not the one that the unfinished job in "
                    f"{job.ledger.folder} has read. Bring it back, or pass --no-resume to begin anew"
                )
            job.sequences = piece.tensors()["tokens"]
    texts = [(job.sequences, recipe.batch_size)]
    if allocation_of(recipe) != "uniform" or weighs_columns(recipe):
        texts += [(check_text(job), 1), (check_text(job), recipe.batch_size)]
    try:
        job.calls = sequence.learn_calls(job.blocks, texts)
    except (RuntimeError, NotImplementedError) as error:  # a model that uses weights outside of their modules
        if job.blocks.stored is None:
            raise
        log.debug("no forward pass by blocks: %s", error)
    if job.calls is None:
        notes = ["solved without compensation"] if wants_compensation(recipe) else []
        if job.blocks.stored is not None:
            assert folder is not None
            finite = job.blocks.finite
            job.blocks = Blocks(load.load_model(folder, job.blocks.device), job.blocks.device)
            for name in finite:
                job.blocks.weight(name)
            notes.insert(0, "loaded whole")
        if notes:
            log.warning("blocks of this model read more than the block before them gives: %s", " and ".join(notes))


def check_text(job: Job) -> Tensor:
    """The calibration sequences that gradients and losses are taken on."""
    assert job.sequences is not None
    return job.sequences[: job.recipe.fisher_sequences]


def each_group(
    job: Job,
    stage: str,
    key: str,
    groups: Sequence[Group],
    function: Callable[..., R],
    make_task: Callable[[Group, Whitening], Task],
    keep: Callable[[R], tuple[dict[str, Any], Mapping[str, Tensor] | None]],
) -> list[Piece]:
    """Give every group's problem to the workers and its result to the ledger; what is there already stays.

    Args:
        key: of the pieces: "key/first member".
        make_task: group, whitening of its input -> task for `function`.
        keep: result -> record and tensors of the piece.
    """
    keys = {group: f"{key}/{group.members[0].name}" for group in groups}
    missing = [group for group in groups if job.ledger.get(keys[group]) is None]
    tasks = (
        (group, make_task(group, metrics[job.inputs(group)])) for some, metrics in walk(job, missing) for group in some
    )
    run_tasks(job, stage, keys, function, tasks, keep)
    return pieces_of(job, keys)


def run_tasks(
    job: Job,
    stage: str,
    keys: Mapping[Group, str],
    function: Callable[..., R],
    tasks: Iterable[tuple[Group, Task]],
    keep: Callable[[R], tuple[dict[str, Any], Mapping[str, Tensor] | None]],
) -> None:
    """Give some groups' problems to the workers and the results to the ledger, showing how much of all groups is there.

    Args:
        keys: of all groups' pieces.
        keep: result -> record and tensors of the piece.
    """
    given: list[Group] = []

    def noted() -> Iterator[Task]:
        for group, task in tasks:
            given.append(group)
            yield task

    with job.stages.stage(stage, sum(map(work_of, keys))) as progress:
        finished = sum(work_of(group) for group, key in keys.items() if job.ledger.get(key) is not None)
        shares: dict[int, float] = {}

        def on_progress(index: int, share: float, note: str) -> None:
            shares[index] = share * work_of(given[index])
            progress.reach(finished + sum(shares.values()), note)

        for index, result in job.pool.map(function, noted(), on_progress):
            on_progress(index, 1.0, "")
            job.ledger.put(keys[given[index]], *keep(result))


def pieces_of(job: Job, keys: Mapping[Group, str]) -> list[Piece]:
    """The finished pieces of groups, all of which are there."""
    pieces = [job.ledger.get(key) for key in keys.values()]
    assert None not in pieces
    return [piece for piece in pieces if piece is not None]


def walk(job: Job, groups: Sequence[Group]) -> Iterator[tuple[Sequence[Group], Mapping[tuple[str, ...], Whitening]]]:
    """The decoder blocks in order, with the text running through them.

    Yields:
        Groups whose last block has been passed, and the whitening of each by its inputs (`Job.inputs`).
    """
    if not groups:
        return
    if job.sequences is None:
        yield groups, {job.inputs(group): IDENTITY for group in groups}
        return
    by_end: dict[int, list[Group]] = {}
    for group in groups:
        by_end.setdefault(group.members[-1].block, []).append(group)
    if all(job.inputs(group) in job.metrics for group in groups):
        for end in sorted(by_end):
            yield by_end[end], job.metrics
        return
    kept = {inputs: _kept_metric(job, inputs) for inputs in map(job.inputs, groups)}
    if None not in kept.values():
        for end in sorted(by_end):
            yield by_end[end], {inputs: _read_metric(job, kept[inputs]) for inputs in map(job.inputs, by_end[end])}
        return
    nbytes = sum(8 * group.d1**2 for group in {job.inputs(group): group for group in groups}.values())
    fits = nbytes <= job.cache_bytes // 2
    parts = _grams_by_block(job, by_end) if job.calls is not None else _grams_of_whole_model(job, by_end)
    for some, grams in parts:
        metrics = {}
        for inputs in dict.fromkeys(map(job.inputs, some)):
            gram = grams[inputs[0]]
            for name in inputs[1:]:
                gram = gram + grams[name]
            gram = gram / len(inputs) if len(inputs) > 1 else gram
            if job.recipe.layers_shared == 1:
                del grams[inputs[0]]  # has done its work
            metrics[inputs] = whiten(gram, job.sequences.numel(), job.recipe.damping)
            if metrics[inputs].factor is None:
                log.warning("%s reads only zeros on the calibration text: solved without whitening", inputs[0])
            if job.keep_grams and not fits:
                _keep_metric(job, inputs, metrics[inputs])
        if fits:
            job.metrics.update(metrics)
        yield some, metrics


def _grams_by_block(
    job: Job, by_end: Mapping[int, Sequence[Group]]
) -> Iterator[tuple[Sequence[Group], dict[str, Tensor]]]:
    """Groups and the Grams of what they read, when their last block has been passed; one block in memory at a time."""
    assert job.sequences is not None
    assert job.calls is not None
    flow = sequence.embed(job.blocks, job.sequences, job.recipe.batch_size, job.shelf)
    last, count = max(by_end), len(job.sequences)
    grams: dict[str, Tensor] = {}
    for index in range(last + 1):
        readers = dict.fromkeys(
            job.owner[member.name]
            for groups in by_end.values()
            for group in groups
            for member in group.members
            if member.block == index
        )
        with job.blocks.loaded(index) as block, job.stages.stage("calibrate", (last + 1) * count) as progress:
            progress.reach(index * count, f"block {index + 1} of {last + 1}")
            modules = {name: job.blocks.model.get_submodule(name) for name in readers}
            grams |= sequence.grams(block, index, job.calls, flow, modules, progress.advance)
        if index in by_end:
            log.info("calibrated block %d on %d sequences of %d tokens", index, *job.sequences.shape)
            yield by_end[index], grams
            for group in by_end[index]:
                for name in job.inputs(group):
                    grams.pop(name, None)
    flow.close()


def _grams_of_whole_model(
    job: Job, by_end: Mapping[int, Sequence[Group]]
) -> Iterator[tuple[Sequence[Group], dict[str, Tensor]]]:
    """The same for a model in memory that runs whole, again for as many blocks as have Grams that fit in memory."""
    assert job.sequences is not None
    for groups in _ranges(job, by_end):
        readers = list(dict.fromkeys(job.owner[member.name] for group in groups for member in group.members))
        last = max(member.block for group in groups for member in group.members)
        log.info("calibrating up to block %d on %d sequences of %d tokens", last, *job.sequences.shape)
        with job.stages.stage("calibrate", len(job.sequences)) as progress:
            stop, size = job.blocks.modules[last], job.recipe.batch_size
            grams = accumulate_grams(job.blocks.model, readers, job.sequences, size, stop, progress.advance)
        yield groups, grams


def _ranges(job: Job, by_end: Mapping[int, Sequence[Group]]) -> Iterator[list[Group]]:
    """Consecutive groups whose distinct Gram matrices fit in memory; never splits what ends in the same block."""
    current: list[Group] = []
    readers: set[str] = set()
    size = 0
    for block in sorted(by_end):
        needed = {job.owner[m.name]: m for group in by_end[block] for m in group.members}
        nbytes = sum(8 * member.d1**2 for name, member in needed.items() if name not in readers)
        if current and size + nbytes > job.cache_bytes:
            yield current
            current, readers, size = [], set(), 0
            nbytes = sum(8 * member.d1**2 for member in needed.values())
        current += by_end[block]
        readers |= set(needed)
        size += nbytes
    if current:
        yield current


def _keep_metric(job: Job, inputs: tuple[str, ...], metric: Whitening) -> None:
    tensors = None if metric.factor is None else {"factor": metric.factor}
    job.ledger.put(f"whitening/{inputs[0]}", {"shift": metric.shift, "scale": metric.scale}, tensors)


def _kept_metric(job: Job, inputs: tuple[str, ...]) -> Piece | None:
    return job.ledger.get(f"whitening/{inputs[0]}")


def _read_metric(job: Job, piece: Piece | None) -> Whitening:
    assert piece is not None
    factor = piece.tensors().get("factor")
    factor = None if factor is None else factor.to(job.blocks.device)
    return Whitening(factor, piece.record["shift"], piece.record["scale"])
