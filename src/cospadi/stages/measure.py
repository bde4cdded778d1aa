"""What groups read: Gram matrices of their inputs in the dense model, and what compensation takes of the compressed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from cospadi.budget.plan import Group
from cospadi.calibration import walk
from cospadi.calibration.grams import IDENTITY, Whitening, accumulate_grams, whiten
from cospadi.calibration.walk import Flow, Stream
from cospadi.jobs.progress import Stage
from cospadi.model.projections import Projection, kinds_of
from cospadi.stages.open import Job

log = logging.getLogger("cospadi")

PAIRED_TOKENS = 65536
"""Tokens, the first of the text, that are looked at in both models for compensation."""


@dataclass
class Block:
    """What a set of groups is solved from, without compensation: the dense model's inputs and weights.

    Attributes:
        sets: groups that can be solved at the same time.
        whitenings: inputs of a group (`Job.inputs`) -> their whitening.
    """

    job: Job
    sets: Sequence[Sequence[Group]]
    whitenings: Mapping[tuple[str, ...], Whitening]

    def measure(self, groups: Sequence[Group]) -> Iterator[tuple[Group, Whitening, Tensor]]:
        """Of each group of a set the whitening of its input, and the weight (d1, sum of d2) that is approximated."""
        for group in groups:
            yield group, self.whitenings[self.job.inputs(group)], self.job.weight(group)


@dataclass
class WalkedBlock:
    """A decoder block of the model that is compressed so far, its weights in memory.

    Attributes:
        sets: in running order; with compensation the inputs of each depend on those before it.
        dense: the text in the dense model, behind the block once `pass_dense` was called.
        compressed: the text before the block in the model that is compressed so far, as much as is needed of it.
        paired: with compensation, the first of the text before the block in the dense model.
        count: blocks of the walk, for the progress bar.
    """

    job: Job
    sets: Sequence[Sequence[Group]]
    dense: Stream
    compressed: Stream
    paired: Flow | None
    index: int
    module: nn.Module
    count: int
    _grams: dict[str, Tensor] = field(default_factory=dict)

    @property
    def groups(self) -> list[Group]:
        """All of them."""
        return [group for groups in self.sets for group in groups]

    @property
    def name(self) -> str:
        return self.job.blocks.name_of(self.index)

    def measure(self, groups: Sequence[Group]) -> Iterator[tuple[Group, Whitening, Tensor]]:
        """Of each group of a set the whitening of its input, and the weight (d1, sum of d2) that is approximated. With
        compensation that is W', which makes up for the errors before it, and the metric is the mean of that of the
        dense model and that of the compressed one."""
        if not groups:
            return
        readers = self._readers(groups)
        if self.job.shares_grams:
            self._grams = shared_grams(self.job, self.index, [f"{self.name}.{name}" for name in readers])
        elif self.dense.block <= self.index:  # one pass measures all inputs of the block
            inside = self.pass_dense(self._readers(self.groups))
            self._grams = {f"{self.name}.{name}": gram for name, gram in inside.items()}
        pairs = None if self.paired is None else self._pairs(self.paired, readers)
        whitenings = {name: self._whitening(name, None if pairs is None else pairs[name][0]) for name in readers}
        for group in groups:
            weight, name = self.job.weight(group), self._reader(group)
            yield group, whitenings[name], weight if pairs is None else walk.corrected(weight, *pairs[name])

    def _reader(self, group: Group) -> str:
        """The name in the block of what first reads the input of a group."""
        return self.job.inputs(group)[0].removeprefix(f"{self.name}.")

    def _readers(self, groups: Sequence[Group]) -> dict[str, nn.Module]:
        return {name: self.module.get_submodule(name) for name in map(self._reader, groups)}

    def _whitening(self, name: str, compressed: Tensor | None) -> Whitening:
        """Of what a module reads.

        Args:
            compressed: the Gram in the compressed model of the tokens that both are looked at on.
        """
        job, gram = self.job, self._grams.pop(f"{self.name}.{name}")
        assert job.sequences is not None
        tokens = job.sequences.numel()
        if compressed is not None and self.paired is not None:
            some = job.sequences[: len(self.paired) * job.recipe.batch_size].numel()
            gram = (gram + compressed * (tokens / some)) / 2
        whitening = whiten(gram, tokens, job.recipe.damping)
        if whitening.gram is None:
            log.warning("%s.%s reads only zeros on the calibration text: not whitened", self.name, name)
        return whitening

    def _pairs(self, dense: Flow, readers: Mapping[str, nn.Module]) -> dict[str, tuple[Tensor, Tensor | None]]:
        assert self.job.calls is not None
        with self._stage(1):
            return walk.paired_grams(
                self.module, self.index, self.job.calls, dense, self.compressed.flow,
                self.compressed.inside(self.name), readers,
            )  # fmt: skip

    def pass_dense(self, readers: Mapping[str, nn.Module] | None = None) -> dict[str, Tensor]:
        """Carry the text of the dense model through the block, and take the Grams of what some modules read on the way;
        nothing where that was done."""
        if self.dense.block > self.index:
            return {}
        assert self.job.calls is not None
        with self._stage(0) as progress:
            grams = walk.grams(
                self.module, self.index, self.job.calls, self.dense.flow, readers or {}, lambda _: progress.advance(1)
            )
        self.dense.block = self.index + 1
        return grams

    def pass_compressed(self) -> None:
        """Carry the text of the compressed model through the block."""
        assert self.job.calls is not None
        with self._stage(1):
            self.compressed.advance(self.module, self.name, self.index, self.job.calls)

    @contextmanager
    def _stage(self, passed: int) -> Iterator[Stage]:
        """The progress bar, which counts the dense model's batches; `passed` is 1 once they are through the block."""
        batches = len(self.dense.flow)
        with self.job.stages.stage("calibrate", self.count * batches) as progress:
            progress.reach((self.index + passed) * batches, f"block {self.index + 1} of {self.count}")
            yield progress

    def swap_in(self, weights: Mapping[str, Tensor]) -> None:
        """Have what comes after read what these replacement weights (d2, d1), by full layer name, make of it."""
        blocks = self.job.blocks
        for name, weight in weights.items():
            self.compressed.weights[name] = weight.to(blocks.device, blocks.dtype(name))


def blocks_to_solve(job: Job, groups: Sequence[Group], missing: Sequence[Group]) -> Iterator[Block | WalkedBlock]:
    """The decoder blocks in order, with the text running through them.

    With compensation or refinement the text runs through the dense model and beside it through the one that is
    compressed so far; compensation alone needs the first PAIRED_TOKENS of it there.

    Args:
        groups: all that are compressed. missing: those that are not done yet; the others only take part in running the
            text through the model.
    """
    if not missing:
        return
    if job.shares_grams:
        share_grams(job)
    if not job.walks:
        # All of a block, since experts' Grams are filled up from each other's.
        blocks = {group.members[-1].block for group in missing}
        yield from measured_groups(job, [group for group in groups if group.members[-1].block in blocks], set(missing))
        return
    assert job.sequences is not None
    assert job.calls is not None
    paired = -(-PAIRED_TOKENS // (job.recipe.batch_size * job.sequences.shape[1]))  # batches
    text = job.sequences
    if job.shares_grams and not job.refines:  # nothing else needs all of it in the dense model
        text = text[: paired * job.recipe.batch_size]
    dense = Stream(walk.embed(job.blocks, text, job.recipe.batch_size, job.spill))
    compressed = Stream(dense.flow.copy(None if job.refines else paired))
    count = max(group.members[0].block for group in missing) + 1
    log.info("calibrating block by block on %d sequences of %d tokens", *text.shape)
    for index, module in walk.walk(job.blocks, range(count)):
        sets = _sets(job, groups, index)
        if not job.compensates:  # one pass measures all of them
            sets = [[group for groups in sets for group in groups]]
        before = dense.flow.copy(paired) if job.compensates else None
        block = WalkedBlock(job, sets, dense, compressed, before, index, module, count)
        yield block
        if before is not None:
            before.close()
        if index + 1 < count:
            block.pass_dense()
            block.pass_compressed()
    dense.flow.close()
    compressed.flow.close()


def _sets(job: Job, groups: Sequence[Group], index: int) -> list[list[Group]]:
    """The groups of a block in running order: those that read the same tensor together, and so what cannot depend on
    each other, experts."""
    place = {name: number for number, name in enumerate(job.owner)}
    here = [group for group in groups if group.members[0].block == index]
    sets: dict[str, dict[str, list[Group]]] = {}
    for group in sorted(here, key=lambda group: place[group.members[0].name]):
        reader = job.inputs(group)[0]
        sets.setdefault(kinds_of([reader]), {}).setdefault(reader, []).append(group)
    return [[group for some in by_reader.values() for group in some] for by_reader in sets.values()]


def measured_groups(job: Job, groups: Sequence[Group], wanted: Collection[Group] | None = None) -> Iterator[Block]:
    """Of some groups those that are wanted, or all, when their last block has been passed, and what they read in the
    dense model, in one walk over the blocks."""
    wanted = groups if wanted is None else wanted
    by_end: dict[int, list[Group]] = {}
    for group in groups:
        by_end.setdefault(group.members[-1].block, []).append(group)
    if job.sequences is None:
        if groups:
            now = [group for group in groups if group in wanted]
            yield Block(job, [now], dict.fromkeys(map(job.inputs, now), IDENTITY))
        return
    for some, grams, uses in _by_block(job, by_end) if job.calls is not None else _by_whole_model(job, by_end):
        found = {}
        for inputs in dict.fromkeys(map(job.inputs, some)):
            gram = grams[inputs[0]]
            for name in inputs[1:]:
                gram = gram + grams[name]
            gram = gram / len(inputs) if len(inputs) > 1 else gram
            uses.subtract(inputs)
            for name in inputs:
                if not uses[name]:  # no later group reads it
                    del grams[name]
            found[inputs] = whiten(gram, job.sequences.numel(), job.recipe.damping)
            if found[inputs].gram is None:
                log.warning("%s reads only zeros on the calibration text: solved without whitening", inputs[0])
        yield Block(job, [[group for group in some if group in wanted]], found)


Grams = tuple[Sequence[Group], dict[str, Tensor], Counter[str]]
"""Groups, the Grams of all that they read, by first reader, and how many groups' inputs each is still to go into."""


def _uses(job: Job, by_end: Mapping[int, Sequence[Group]]) -> Counter[str]:
    return Counter(
        name for groups in by_end.values() for inputs in dict.fromkeys(map(job.inputs, groups)) for name in inputs
    )


def _by_block(job: Job, by_end: Mapping[int, Sequence[Group]]) -> Iterator[Grams]:
    """Groups and the Grams of what they read, when their last block has been passed."""
    members = [member for groups in by_end.values() for group in groups for member in group.members]
    readers = _readers(job, members, max(by_end) + 1)
    grams: dict[str, Tensor] = {}
    uses = _uses(job, by_end)
    kept = ((index, shared_grams(job, index, names)) for index, names in enumerate(readers))
    for index, some in kept if job.shares_grams else _walked_grams(job, readers):
        grams |= some
        if index in by_end:
            yield by_end[index], grams, uses


def _readers(job: Job, members: Sequence[Projection], blocks: int) -> list[list[str]]:
    """Of each of the first blocks the first readers of what some projections in it read."""
    return [
        list(dict.fromkeys(job.owner[member.name] for member in members if member.block == index))
        for index in range(blocks)
    ]


def _walked_grams(job: Job, readers: Sequence[Sequence[str]]) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Index of a block, and the Grams of what some of its modules read, by their full names: one block in memory at a
    time, and none while the caller has the Grams.

    Args:
        readers: these modules of each of the first blocks.
    """
    assert job.sequences is not None
    assert job.calls is not None
    flow = walk.embed(job.blocks, job.sequences, job.recipe.batch_size, job.spill)
    count = len(job.sequences)
    for index, block in walk.walk(job.blocks, range(len(readers))):
        with job.stages.stage("calibrate", len(readers) * count) as progress:
            progress.reach(index * count, f"block {index + 1} of {len(readers)}")
            modules = {name: job.blocks.model.get_submodule(name) for name in readers[index]}
            grams = walk.grams(block, index, job.calls, flow, modules, progress.advance)
        if modules:
            log.info("calibrated block %d on %d sequences of %d tokens", index + 1, *job.sequences.shape)
        job.blocks.release(index)
        yield index, grams
    flow.close()


def share_grams(job: Job) -> None:
    """Keep the Grams of all inputs in the dense model where other jobs find them, too, in one walk over the blocks."""
    assert job.shared is not None
    projections = job.uniform.projections
    readers = _readers(job, projections, max(p.block for p in projections) + 1)
    missing = [index for index, names in enumerate(readers) if names and job.shared.get(_grams_key(index)) is None]
    if missing:
        wanted = [names if index in missing else [] for index, names in enumerate(readers[: missing[-1] + 1])]
        for index, grams in _walked_grams(job, wanted):
            if index in missing:
                job.shared.put(_grams_key(index), {}, grams)


def shared_grams(job: Job, index: int, readers: Collection[str]) -> dict[str, Tensor]:
    """The Grams of what some modules of a block read, by their full names, out of what is shared."""
    if not readers:
        return {}
    piece = job.shared.get(_grams_key(index)) if job.shared is not None else None
    assert piece is not None
    return {name: gram.to(job.blocks.device) for name, gram in piece.tensors(readers).items()}


def _grams_key(index: int) -> str:
    return f"grams/{index:04}"


def _by_whole_model(job: Job, by_end: Mapping[int, Sequence[Group]]) -> Iterator[Grams]:
    """The same for a model in memory that runs whole, again for as many blocks as have Grams that fit in memory."""
    assert job.sequences is not None
    for groups in _ranges(job, by_end):
        readers = list(dict.fromkeys(job.owner[member.name] for group in groups for member in group.members))
        last = max(member.block for group in groups for member in group.members)
        log.info("calibrating up to block %d on %d sequences of %d tokens", last, *job.sequences.shape)
        with job.stages.stage("calibrate", len(job.sequences)) as progress:
            stop, size = job.blocks.modules[last], job.recipe.batch_size
            grams = accumulate_grams(job.blocks.model, readers, job.sequences, size, stop, progress.advance)
        yield groups, grams, _uses(job, {last: groups})


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
