"""What a job will cost, before it runs: FLOPs, memory and disk by formula, time as FLOPs over this machine's speed.

All formulas but the solvers' stand here; docs/scaling.md explains them. Names: n calibration sequences of L tokens are
N tokens, and those that gradients are taken on M; a decoder block multiplies every token with P parameters and its
attention is w wide; hidden states are h wide and the vocabulary has V tokens; a group is W (d1 x d2). A multiplication
with an addition counts as two FLOPs.
"""

from __future__ import annotations

import math
import os
import resource
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cospadi.budget.plan import Group, Plan, owner_without_weights
from cospadi.calibration.gradients import gamma_shape, output_widths
from cospadi.calibration.text import sequence_length
from cospadi.commands.speed import Rates, measure_speed, size_of, solver_flops
from cospadi.experts import parameter_of
from cospadi.model import companions, load
from cospadi.model.projections import Projection, decoder_blocks, find_projections
from cospadi.recipe import CACHE_BYTES, Recipe
from cospadi.solvers import find_solver
from cospadi.solvers.flops import Flops, cholesky, triangular
from cospadi.solvers.htp import COLUMNS
from cospadi.solvers.products import self_product_flops
from cospadi.stages.measure import PAIRED_TOKENS
from cospadi.stages.prove import WITHOUT_TEXT
from cospadi.stages.refine import CHECKS, HELD_OUT, STEP_TOKENS

STAGES = ("load", "text", "gradients", "calibrate", "solve", "refine", "prove", "write")


@dataclass(frozen=True)
class Estimate:
    """What a job will cost.

    Attributes:
        flops: stage -> FLOPs.
        seconds: stage -> seconds; None where nothing was timed.
        memory_bytes: largest resident memory; on a GPU the host's and the device's together, which bounds either.
        disk_bytes: the job directory and the output together at their largest; the source is not counted.
    """

    flops: dict[str, Flops]
    seconds: dict[str, float] | None
    memory_bytes: int
    disk_bytes: int


def estimate(
    model: str | Path, recipe: Recipe, plan: Plan, *, cache_bytes: int = CACHE_BYTES, timing: bool = True
) -> Estimate:
    """Look ahead at the costs of `compress` for a model, from its config and headers, with one worker.

    What only the text or the weights can tell is taken as asked: that the text has all sequences, that blocks follow
    each other, that no Gram is singular.

    Args:
        plan: what each group gets; the uniform one costs as much as any other.
        timing: run pieces of the job for some seconds on the recipe's device; else nothing is said about time.

    Raises:
        UserError: as `compress` would.
    """
    recipe, skeleton = (
        recipe.settled(),
        load.load_skeleton(model, recipe.revision, recipe.text_only, recipe.merge_adapter),
    )
    selected = {projection.name for projection in plan.projections}
    owner = owner_without_weights(skeleton.model, find_projections(skeleton.model))
    shape = shape_of(skeleton.model, owner, selected)
    text = text_of(recipe, load.positions(skeleton.model.config))
    stored = sum(parameter.nbytes for parameter in skeleton.model.parameters())
    stored = sum(skeleton.sizes.values()) if skeleton.sizes else stored
    output = stored + sum(group.parts.total - shape.item * group.dense_bytes // 2 for group in plan.compressed)
    costs = list(costs_of(shape, recipe, plan, text, stored, output))
    folder = load.resolve(model, recipe.revision, weights=False, merge_adapter=recipe.merge_adapter)
    others = sum(path.stat().st_size for pattern in companions.COMPANIONS for path in folder.glob(pattern))
    memory = memory_of(shape, recipe, plan, text, cache_bytes)
    disk = disk_of(shape, recipe, plan, text, cache_bytes, output + others)
    if recipe.merge_adapter:  # all of the model at once, before anything else
        memory, disk = max(memory, stored), disk + stored
    seconds = None
    if timing:
        started = time.process_time()  # what `compress` imports is what this process has imported
        sizes = [size_of(group) for group in plan.compressed]
        forward = forward_flops(shape, 1, text.length, [0])
        backward = 4.0 * shape.parameters[0] + 10.0 * text.length * shape.attention
        rates = measure_speed(skeleton.model, recipe, text.batch, text.length, (forward, forward + backward), sizes)
        if rates is not None:
            seconds = seconds_of(costs, rates)
            seconds["load"] += started
    return Estimate(flops_of(costs), seconds, memory, disk)


# What the formulas ask of a model and a text


@dataclass(frozen=True)
class Reader:
    """A distinct input of width d1 that selected projections of a block read.

    Attributes:
        before: parameters of the block's projections that a token has met when it is there.
        after: the same and those of its readers.
        share: of the tokens that come there; of an expert's input those that the router sends it, on average.
        siblings: experts beside it, itself too, which are measured in the same pass.
    """

    block: int
    d1: int
    before: float
    after: float
    share: float = 1.0
    siblings: int = 1


@dataclass(frozen=True)
class Shape:
    """What the formulas ask of a model.

    Attributes:
        parameters: P of each block; of several experts those that a token meets.
        attention: w, heads times their width.
        hidden, vocabulary: h and V.
        block_bytes: of the largest block's parameters.
        outside_bytes: of all parameters outside the blocks.
        dtype: of the model.
        readers: distinct inputs of selected projections, in running order.
        projections: the selected ones.
    """

    parameters: tuple[int, ...]
    attention: int
    hidden: int
    vocabulary: int
    block_bytes: int
    outside_bytes: int
    dtype: torch.dtype
    readers: tuple[Reader, ...]
    projections: tuple[Projection, ...]

    @property
    def item(self) -> int:
        """Bytes of a hidden state's entry."""
        return self.dtype.itemsize

    @property
    def blocks(self) -> range:
        """Those up to the last one with something to compress."""
        return range(1 + max(projection.block for projection in self.projections))

    @property
    def widest(self) -> int:
        """The largest input."""
        return max(reader.d1 for reader in self.readers)


def shape_of(model: Any, owner: Mapping[str, str], selected: Set[str]) -> Shape:
    """What the formulas ask of a model, which may be on the meta device.

    Args:
        owner: projection -> the first reader of its input, of all projections in running order.
        selected: the projections to compress.
    """
    prefix, blocks = decoder_blocks(model)
    config = model.config.get_text_config(decoder=True)
    hidden, heads = int(config.hidden_size), int(getattr(config, "num_attention_heads", 1))
    met = int(getattr(config, "num_experts_per_tok", 0) or 0)

    def active(parameter: Tensor) -> int:
        fraction = min(1.0, met / parameter.shape[0]) if parameter.ndim == 3 and met else 1.0
        return int(parameter.numel() * fraction) if parameter.ndim > 1 else 0

    projections = {projection.name: projection for projection in find_projections(model)}
    read = {owner[name] for name in owner if name in selected}
    inputs: dict[str, Reader] = {}  # of all projections
    done = dict.fromkeys(range(len(blocks)), 0.0)
    beside = Counter(map(parameter_of, owner))  # experts
    for name, first in owner.items():
        p, stack = projections[name], parameter_of(name)
        share = min(1.0, met / beside[stack]) if stack and met else 1.0
        before = done[p.block]
        done[p.block] += share * p.d1 * p.d2
        before = inputs[first].before if first in inputs else before
        inputs[first] = Reader(p.block, p.d1, before, done[p.block], share, beside[stack] if stack else 1)
    return Shape(
        parameters=tuple(sum(map(active, block.parameters())) for block in blocks),
        attention=heads * int(getattr(config, "head_dim", None) or hidden // heads),
        hidden=hidden,
        vocabulary=int(config.vocab_size),
        block_bytes=max(sum(parameter.nbytes for parameter in block.parameters()) for block in blocks),
        outside_bytes=sum(
            parameter.nbytes for name, parameter in model.named_parameters() if not name.startswith(f"{prefix}.")
        ),
        dtype=next(blocks.parameters()).dtype,
        readers=tuple(reader for first, reader in inputs.items() if first in read),
        projections=tuple(projections[name] for name in owner if name in selected),
    )


@dataclass(frozen=True)
class Text:
    """Text that a job runs: `sequences` of `length` tokens in batches, `checked` of them for gradients."""

    sequences: int
    length: int
    batch: int
    checked: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def checked_tokens(self) -> int:
        return self.checked * self.length

    @property
    def batch_tokens(self) -> int:
        return self.batch * self.length

    @property
    def paired_tokens(self) -> int:
        """Tokens of the first batches, which compensation looks at in both models."""
        return min(self.tokens, -(-PAIRED_TOKENS // self.batch_tokens) * self.batch_tokens)

    @property
    def learned(self) -> int:
        """Tokens that the whole model runs: two batches and two sequences to learn how blocks are called, and two
        batches to time a pass; one more sequence twice, block by block and as the model does it."""
        return (2 * min(2 * self.batch, self.sequences) + min(2, self.sequences) + 2) * self.length


def text_of(recipe: Recipe, positions: int) -> Text:
    """The text that a settled recipe asks for; none for a recipe without calibration."""
    if recipe.data_free:
        return Text(0, 1, recipe.batch_size, 0)
    checked = min(recipe.gradient_sequences, recipe.sequences) if recipe.wants_gradients else 0
    length, batch = sequence_length(recipe.length, positions), min(recipe.batch_size, recipe.sequences)
    return Text(recipe.sequences, length, batch, checked)


# FLOPs and time

DISK_BYTES_A_SECOND = 1e9
"""Of files that are hashed, or copied by way of the page cache."""


@dataclass(frozen=True)
class Cost:
    """A piece of a job.

    Attributes:
        kind: what is done, for the speed: "forward" (through the model), "backward" (forward and back), "grams",
            "factors" (float64), a group's shape (its solver), "disk".
        nbytes: read or written.
    """

    stage: str
    kind: str | tuple[int, ...]
    flops: Flops = Flops()  # noqa: RUF009
    nbytes: float = 0.0


def flops_of(costs: list[Cost]) -> dict[str, Flops]:
    """Stage -> FLOPs."""
    return {stage: sum((cost.flops for cost in costs if cost.stage == stage), Flops()) for stage in STAGES}


def seconds_of(costs: list[Cost], rates: Rates) -> dict[str, float]:
    """Stage -> seconds."""
    seconds = dict.fromkeys(STAGES, 0.0)
    for cost in costs:
        seconds[cost.stage] += cost.nbytes / DISK_BYTES_A_SECOND + cost.flops.total * rates.get(cost.kind, 0.0)
    return seconds


def costs_of(shape: Shape, recipe: Recipe, plan: Plan, text: Text, stored: int, output: int) -> Iterator[Cost]:
    """All that a job by a settled recipe does, as compress.py and the stages do it.

    Args:
        stored, output: bytes of the checkpoint's tensors before and after.
    """
    reads = 5 + 2 * (text.checked > 0) + 5 * (text.sequences > 0)  # each weight by whatever loads its block
    yield Cost("load", "disk", nbytes=reads * stored)
    if text.sequences:
        tokens = text.learned
        yield Cost("text", "forward", Flops(forward_flops(shape, tokens, text.length) + head_flops(shape, tokens)))
        yield from gradients_of(shape, recipe, text)
        yield from walks_of(shape, recipe, text)
    for group in plan.compressed:
        yield from solve_of(recipe, group)
    if recipe.refine:
        yield from refinement_of(shape, recipe, plan, text)
    tokens = 2 * (text.length if text.sequences else WITHOUT_TEXT)  # of the job's model and of the output
    yield Cost("prove", "forward", Flops(forward_flops(shape, tokens, tokens // 2) + head_flops(shape, tokens)))
    yield Cost("write", "disk", nbytes=6 * output)


def forward_flops(shape: Shape, tokens: float, length: int, blocks: range | list[int] | None = None) -> float:
    """Of a forward pass through blocks: 2 P a token, and 4 L w for attention, as if no token were masked."""
    some = range(len(shape.parameters)) if blocks is None else blocks
    return sum(tokens * (2 * shape.parameters[index] + 4 * length * shape.attention) for index in some)


def head_flops(shape: Shape, tokens: float) -> float:
    """Of the logits: 2 h V a token."""
    return 2.0 * tokens * shape.hidden * shape.vocabulary


def gradients_of(shape: Shape, recipe: Recipe, text: Text) -> Iterator[Cost]:
    """Blocks run twice, and back for activations only, with two and a half the attention; Gamma of every output."""
    m, length = text.checked_tokens, text.length
    back = sum(m * (2 * p + 10 * length * shape.attention) for p in shape.parameters)
    yield Cost("gradients", "forward", Flops(forward_flops(shape, m, length) + 2 * head_flops(shape, m)))
    yield Cost("gradients", "backward", Flops(forward_flops(shape, m, length) + back))
    if recipe.metric == "two-sided":
        widths = [width for p in shape.projections for width in output_widths(p.d2)]
        yield Cost("gradients", "grams", Flops(sum(self_product_flops(m, width) for width in widths)))
    if recipe.spreads_levels:
        yield Cost(
            "gradients",
            "grams",
            Flops(sum(self_product_flops(reader.share * m, reader.d1) for reader in shape.readers)),
        )
        factored = sum(cholesky(reader.d1) + triangular(reader.d1, reader.d1) for reader in shape.readers)
        yield Cost("gradients", "factors", Flops(0, factored))


def walks_of(shape: Shape, recipe: Recipe, text: Text) -> Iterator[Cost]:
    """Text through the dense model, and where blocks need it through the model compressed so far; Grams on the way.

    With compensation the first of it passes up to each input again in both, for G and C.
    """
    n, some, length = text.tokens, text.paired_tokens, text.length
    passed = forward_flops(shape, n, length, shape.blocks)
    grams = sum(self_product_flops(reader.share * n, reader.d1) for reader in shape.readers)
    if recipe.refine or recipe.compensate:
        passed += forward_flops(shape, n if recipe.refine else some, length, shape.blocks[:-1])
    if recipe.compensate:
        attended = 4.0 * length * shape.attention
        for reader in shape.readers:
            passed += 2 * some * (2.0 * reader.before + (attended if reader.before else 0)) / reader.siblings
            grams += reader.share * (self_product_flops(some, reader.d1) + 2.0 * some * reader.d1**2)
    yield Cost("calibrate", "forward", Flops(passed))
    yield Cost("calibrate", "grams", Flops(grams))


def solve_of(recipe: Recipe, group: Group) -> Iterator[Cost]:
    """One group: its solver, and in float64 what stands around it: W' or L W, the way back, the error of the result."""
    solver, d1, d2, k = find_solver(recipe.solver), group.d1, sum(group.d2s), group.k
    whitened, around = not recipe.data_free, Flops()
    if whitened:
        around += Flops(4.0 * d1**2 * d2)
        if recipe.compensate:
            around += Flops(2.0 * d1**2 * d2, cholesky(d1) + 2 * triangular(d1, d2))
        if not solver.identity:
            around += Flops(2.0 * d1**2 * d2, cholesky(d1) + triangular(d1, k))
    if not solver.identity:  # D S is multiplied out for the error, and for what follows in the walk
        around += Flops(2.0 * d1 * k * d2) * (1 + bool(recipe.compensate or recipe.refine) + bool(recipe.refine))
    yield Cost("solve", "factors", around)
    yield Cost("solve", size_of(group).shape, solver_flops(recipe, size_of(group)))


def refinement_of(shape: Shape, recipe: Recipe, plan: Plan, text: Text) -> Iterator[Cost]:
    """Steps of all blocks: forward, and back to the selected weights, but not beyond the first one's input."""
    steps, looks, checked = tuned_tokens(recipe, text)
    selected = {block: sum(p.d1 * p.d2 for p in shape.projections if p.block == block) for block in shape.blocks}
    for block in sorted({reader.block for reader in shape.readers}):
        first = next(reader for reader in shape.readers if reader.block == block)
        back = 2 * (shape.parameters[block] - first.after + selected[block])
        back += 0 if first.before else 10 * text.length * shape.attention
        forward = forward_flops(shape, steps, text.length, [block])
        yield Cost("refine", "backward", Flops(forward + steps * back))
        yield Cost("refine", "forward", Flops(forward_flops(shape, checked, text.length, [block])))
    if not find_solver(recipe.solver).identity:  # D S of every look and step, and its gradient
        products = sum(2.0 * group.d1 * group.k * sum(group.d2s) for group in plan.compressed)
        yield Cost("refine", "grams", Flops(products * (looks + 2 * (recipe.refine or 0))))


def tuned_tokens(recipe: Recipe, text: Text) -> tuple[int, int, int]:
    """Tokens of all steps of one block, how often it looks at what was set aside, and tokens of all these looks."""
    steps, batches = recipe.refine or 0, -(-text.sequences // text.batch)
    kept = max(1, batches // HELD_OUT)
    every = math.ceil(steps / CHECKS)
    looks = 1 + steps // every + (steps % every > 0)
    step = min(max(1, STEP_TOKENS // text.length), text.batch * max(1, batches - kept))
    return steps * step * text.length, looks, looks * kept * text.batch_tokens


# Memory and disk


def memory_of(shape: Shape, recipe: Recipe, plan: Plan, text: Text, cache_bytes: int) -> int:
    """What is outside the blocks, and the largest of what the stages hold, in bytes: each one block, its text in the
    cache, and its own working set."""
    batch, length, item = text.batch_tokens, text.length, shape.item
    flows = min(cache_bytes, flow_bytes(shape, recipe, text))

    def activations(tokens: int) -> int:
        """Hidden states, queries and the like, three tensors of the widest, its copy in float32, the product."""
        return tokens * (item * (4 * shape.hidden + 3 * shape.widest) + 4 * shape.widest) + 4 * shape.widest**2

    solving = max(solving_bytes(recipe, group) for group in plan.compressed)
    stages = [solving]  # without text the whole job
    if text.sequences:
        seen = 2 * len(shape.parameters) * batch * shape.hidden * item
        stages.append(seen + batch * shape.vocabulary * item)
        grams = max(sum(8 * r.d1**2 for r in shape.readers if r.block == index) for index in shape.blocks)
        paired = grams + 16 * shape.widest**2 + shape.block_bytes if recipe.compensate else grams
        stages.append(flows + shape.block_bytes + paired + max(activations(batch), solving))
    if text.checked:
        inputs = min(cache_bytes, (len(shape.parameters) + 2) * text.checked_tokens * shape.hidden * item)
        tape = 2 * activations(length) + length * shape.vocabulary * (2 * item + 12)
        gammas = 5 * max(gamma_bytes(shape, recipe, index) for index in shape.blocks)
        if recipe.spreads_levels:  # Grams, and one of them in float64 with its factors
            gammas += max(sum(4 * r.d1**2 for r in shape.readers if r.block == index) for index in shape.blocks)
            gammas += 32 * shape.widest**2
        stages.append(inputs + max(shape.block_bytes + gammas + 2 * activations(length), tape))
    if recipe.refine:
        selected = max(sum(p.d1 * p.d2 for p in shape.projections if p.block == index) for index in shape.blocks)
        # W, S, its support, gradient, two moments, the best state and one before it; W again with its gradient
        stages.append(flows + shape.block_bytes + (36 + 2 * item) * selected + 6 * activations(batch))
    return base_bytes() + shape.outside_bytes + max(stages)


def flow_bytes(shape: Shape, recipe: Recipe, text: Text) -> int:
    """Bytes of hidden states: of the dense model, and of the one compressed so far where it is there. Of what is looked
    at in both the dense ones wait, too, until their block is done."""
    some = text.paired_tokens if recipe.compensate else 0
    tokens = text.tokens + some + (text.tokens if recipe.refine else some)
    return tokens * shape.hidden * shape.item


def gamma_bytes(shape: Shape, recipe: Recipe, block: int) -> int:
    """Bytes of what a block's gradients leave, float32: Gamma of its projections."""
    outputs = [p.d2 for p in shape.projections if p.block == block]
    return 4 * sum(math.prod(gamma_shape(d2, recipe.metric == "two-sided")) for d2 in outputs)


def solving_bytes(recipe: Recipe, group: Group) -> int:
    """Bytes of a solver run and of packing what it finds: W in its dtype and in float64, and the solver's own."""
    d1, d2, k = group.d1, sum(group.d2s), group.k
    if find_solver(recipe.solver).identity:
        tied = recipe.metric == "two-sided"
        gammas = sum(width**2 for member in group.d2s for width in output_widths(member)) if tied else 0
        return 28 * d1 * d2 + (28 if tied else 12) * d1 * min(d2, COLUMNS) + 10 * (d1**2 + gammas)
    start = 28 * d1 * d2 + 32 * min(d1, d2) ** 2
    iterating = 4 * (d1 + d2) * min(d1, d2) + 16 * k * d2 + 20 * k**2
    packing = 4 * d1 * min(d1, d2) + 16 * d1 * k + 24 * k * d2 + 8 * d1 * d2
    return (16 + 8 * bool(recipe.compensate)) * d1 * d2 + max(start, iterating, packing)


TEXT_LIBRARIES = 80_000_000
"""Bytes of what reading a text and a tokenizer load beside the package."""


def base_bytes() -> int:
    """Resident bytes of this process, which has loaded what `compress` loads, but for what reads the text."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) + TEXT_LIBRARIES
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak if os.uname().sysname == "Darwin" else 1024 * peak) + TEXT_LIBRARIES


def disk_of(shape: Shape, recipe: Recipe, plan: Plan, text: Text, cache_bytes: int, output: int) -> int:
    """The job directory and the output together at their largest, in bytes.

    The job directory keeps tokens and Gamma, hidden states beyond the cache, and the factors, refined ones beside those
    that were solved, in the end beside the output.
    """
    checked = text.checked_tokens * shape.hidden * shape.item
    kept = 8 * text.tokens
    if text.checked:
        inputs = 4 * sum(projection.d1 for projection in shape.projections)
        inputs += 4 * sum(reader.d1 for reader in shape.readers) if recipe.spreads_levels else 0
        kept += inputs + sum(gamma_bytes(shape, recipe, index) for index in range(len(shape.parameters)))
    factors = sum(group.parts.total for group in plan.compressed) * (1 + bool(recipe.refine))
    taped = max(0, (len(shape.parameters) + 2) * checked - cache_bytes)
    return kept + max(taped, factors + max(output, max(0, flow_bytes(shape, recipe, text) - cache_bytes)))
