"""What a job will cost, before it runs: FLOPs, memory and disk by formula, time from a short run of the same pieces.

All formulas stand here; docs/scaling.md explains them. Names: n calibration sequences of L tokens are N tokens, and
those that gradients and losses are taken on M; a decoder block multiplies every token with P parameters and its
attention is w wide; hidden states are h wide and the vocabulary has V tokens; a group is A (d1 x d2) with k atoms and
T iterations. A multiplication with an addition counts as two FLOPs.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import resource
import tempfile
import time
from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cospadi.budget import accounting
from cospadi.budget.plan import Group, Plan, even_group, free_group, owner_without_weights, size_group
from cospadi.calibration import walk as sequence
from cospadi.calibration.fisher import output_fisher_by_blocks, summed_loss
from cospadi.calibration.grams import IDENTITY, whiten
from cospadi.calibration.spill import Shelf
from cospadi.calibration.text import sequence_length
from cospadi.model import companions, load
from cospadi.model.blocks import Blocks
from cospadi.model.projections import decoder_blocks, find_projections, shared_inputs
from cospadi.recipe import Recipe
from cospadi.solvers import Factorization, find_solver
from cospadi.solvers.mod_htp import EXACT_SHARE
from cospadi.solvers.products import bf16_is_fast, self_product_flops
from cospadi.stages.budgets import SPANS, measured_ratios, measured_rhos
from cospadi.stages.open import CACHE_BYTES, allocation_of, needs_text, wants_compensation, weighs_columns
from cospadi.stages.solve import QUICK_ITERATIONS, Work, dense_weights, pack, pose, solve

log = logging.getLogger("cospadi")

STAGES = ("load", "fisher", "calibrate", "budgets", "solve", "write")


@dataclass(frozen=True)
class Flops:
    """Floating-point operations.

    Attributes:
        products: of matrix products and attention.
        others: of factorizations and triangular solves, which run at a fraction of the speed.
    """

    products: float = 0.0
    others: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.products + other.products, self.others + other.others)

    def __mul__(self, count: float) -> Flops:
        return Flops(self.products * count, self.others * count)

    @property
    def total(self) -> float:
        return self.products + self.others


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


@dataclass(frozen=True)
class Reader:
    """A distinct input that projections of a block read.

    Attributes:
        block: index of the block.
        d1: its width.
        before: parameters of the block's projections that have run when it is there.
    """

    block: int
    d1: int
    before: int


@dataclass(frozen=True)
class Shape:
    """What the formulas ask of a model.

    Attributes:
        parameters: P of each block; of several experts those that a token meets.
        attention: w, heads times their width.
        hidden, vocabulary: h and V.
        block_bytes: of each block's parameters.
        edge_bytes: of the largest module outside the blocks.
        item: bytes of a hidden state's entry.
        readers: distinct inputs of selected projections, in running order.
    """

    parameters: tuple[int, ...]
    attention: int
    hidden: int
    vocabulary: int
    block_bytes: tuple[int, ...]
    edge_bytes: int
    item: int
    readers: tuple[Reader, ...]


@dataclass(frozen=True)
class Text:
    """Text that a job runs: `sequences` of `length` tokens in batches, `checked` of them for gradients and losses."""

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


@dataclass(frozen=True)
class Run:
    """Solver runs of one group: `sizes` one after the other, T iterations each, for one and the same A."""

    stage: str
    sizes: tuple[Group, ...]
    iterations: int
    count: float = 1.0


@dataclass(frozen=True)
class Agenda:
    """What a job does how often.

    Attributes:
        learned: sequences run through the whole model to see how blocks are called.
        rounds: times that gradients are taken on the M tokens.
        walks: times that the N tokens run through all blocks for their Grams.
        candidates: models whose loss on the M tokens is taken.
        compensated: whether Grams are taken anew, in pairs, in the model compressed so far.
        kept: whether whitenings of all blocks stay in memory.
    """

    learned: int
    rounds: int
    walks: int
    candidates: int
    compensated: bool
    kept: bool
    runs: tuple[Run, ...]


def estimate(
    model: str | Path,
    recipe: Recipe,
    plan: Plan,
    *,
    final: bool = False,
    cache_bytes: int = CACHE_BYTES,
    keep_grams: bool = False,
    timing: bool = True,
) -> Estimate:
    """Look ahead at the costs of `compress` for a model, from its config and headers, with one worker.

    What only the text or the weights can tell is taken as asked or as likely: that the text has all sequences, that
    blocks follow each other, that budgets choose each rho as often, that no Gram is singular.

    Args:
        plan: the uniform plan, or the one that is to be followed.
        final: whether it is to be followed, so that no budgets are measured.
        timing: run the pieces for some seconds on the recipe's device; else nothing is said about time.

    Raises:
        UserError: as `compress` would.
    """
    skeleton = load.load_skeleton(model, recipe.revision)
    projections = find_projections(skeleton.model)
    selected = {member.name for group in plan.compressed for member in group.members}
    shape = shape_of(skeleton.model, owner_without_weights(skeleton.model, projections), selected)
    text = text_of(recipe, load.positions(skeleton.model.config))
    agenda = agenda_of(recipe, plan, shape, text, final, cache_bytes, keep_grams)
    folder = load.resolve(model, recipe.revision, weights=False)
    others = sum(path.stat().st_size for pattern in companions.COMPANIONS for path in folder.glob(pattern))
    stored = sum(parameter.nbytes for parameter in skeleton.model.parameters())
    stored = sum(skeleton.sizes.values()) if skeleton.sizes else stored
    output = stored + sum(group.parts.total - shape.item * group.dense_bytes // 2 for group in plan.compressed)
    seconds = None
    if timing:
        pace = measure(skeleton.model, recipe, text, agenda)
        seconds = times(shape, recipe, text, agenda, pace, cache_bytes, stored, output)
    return Estimate(
        flops_of(shape, recipe, text, agenda),
        seconds,
        memory_of(shape, recipe, plan, text, agenda, cache_bytes),
        disk_of(shape, plan, text, agenda, cache_bytes, keep_grams, output + others),
    )


def shape_of(model: Any, owner: Mapping[str, str], selected: Set[str] | None = None) -> Shape:
    """What the formulas ask of a model, which may be on the meta device.

    Args:
        owner: projection -> the first reader of its input, of all projections in running order.
        selected: the projections to compress; None is all of them.
    """
    prefix, blocks = decoder_blocks(model)
    config = model.config.get_text_config(decoder=True)
    hidden = int(config.hidden_size)
    heads = int(getattr(config, "num_attention_heads", 1))
    met = int(getattr(config, "num_experts_per_tok", 0) or 0)

    def active(parameter: Tensor) -> int:
        share = min(1.0, met / parameter.shape[0]) if parameter.ndim == 3 and met else 1.0
        return int(parameter.numel() * share) if parameter.ndim > 1 else 0

    edges = [
        sum(parameter.nbytes for parameter in module.parameters(recurse=False))
        for name, module in model.named_modules()
        if not name.startswith(f"{prefix}.")
    ]
    projections = {projection.name: projection for projection in find_projections(model)}
    read = {owner[name] for name in owner if selected is None or name in selected}
    readers, before, block = [], 0, -1
    for name in owner:
        projection = projections[name]
        if projection.block != block:
            block, before = projection.block, 0
        if name in read:
            readers.append(Reader(block, projection.d1, before))
        before += projection.d1 * projection.d2
    return Shape(
        parameters=tuple(sum(map(active, block.parameters())) for block in blocks),
        attention=heads * int(getattr(config, "head_dim", None) or hidden // heads),
        hidden=hidden,
        vocabulary=int(config.vocab_size),
        block_bytes=tuple(sum(parameter.nbytes for parameter in block.parameters()) for block in blocks),
        edge_bytes=max(edges),
        item=next(blocks.parameters()).element_size(),
        readers=tuple(readers),
    )


def text_of(recipe: Recipe, positions: int) -> Text:
    """The text that a recipe asks for; none for a recipe without calibration."""
    if not needs_text(recipe):
        return Text(0, 1, recipe.batch_size, 0)
    length = sequence_length(recipe.length, positions)
    return Text(recipe.sequences, length, recipe.batch_size, min(recipe.fisher_sequences, recipe.sequences))


def agenda_of(
    recipe: Recipe, plan: Plan, shape: Shape, text: Text, final: bool, cache_bytes: int, keep_grams: bool
) -> Agenda:
    """What `compress` will do, as compress.py and measuring.py do it."""
    spreads = allocation_of(recipe) != "uniform" and not final
    fisher = weighs_columns(recipe) or (spreads and allocation_of(recipe) == "fisher")
    compensated = wants_compensation(recipe)
    kept = sum(8 * reader.d1**2 for reader in shape.readers) <= cache_bytes // 2
    runs: list[Run] = []
    for group in plan.compressed:
        likely = _likely(group, recipe) if spreads else [group]
        if fisher:
            runs.append(Run("quick", (group,), QUICK_ITERATIONS))
        if spreads:
            sizes = [
                size_group(group.members, ratio, rho, recipe)
                for ratio in measured_ratios(recipe)
                for rho in measured_rhos(recipe)
            ]
            runs.append(Run("curves", tuple(size for size in sizes if size), QUICK_ITERATIONS))
            runs.append(Run("candidates", (group,), QUICK_ITERATIONS))
            runs += [Run("candidates", (size,), QUICK_ITERATIONS, len(SPANS) / len(likely)) for size in likely]
        runs += [Run("solve", (size,), recipe.iterations, 1 / len(likely)) for size in likely]
    phases = 2 * spreads + fisher + (text.sequences > 0 and not compensated)
    return Agenda(
        learned=_learned(text, fisher or spreads),
        rounds=2 * fisher,
        walks=phases if not (kept or keep_grams) else min(1, phases),
        candidates=(1 + len(SPANS)) * spreads,
        compensated=compensated,
        kept=kept and phases > 0,
        runs=tuple(runs),
    )


def _likely(group: Group, recipe: Recipe) -> list[Group]:
    """The sizes that budgets may give a group, at the asked ratio."""
    sizes = [size_group(group.members, recipe.ratio, rho, recipe) for rho in measured_rhos(recipe)]
    return [size for size in sizes if size] or [group]


def _learned(text: Text, checked: bool) -> int:
    """Sequences that `sequence.learn_calls` runs: two batches of each size that occurs."""
    wanted = [(text.sequences, text.batch)] + ([(text.checked, 1), (text.checked, text.batch)] if checked else [])
    runs: dict[int, int] = {}
    for count, batch in wanted:
        for start in range(0, count, batch):
            size = min(batch, count - start)
            runs[size] = min(2, runs.get(size, 0) + 1)
    return sum(size * times for size, times in runs.items())


def forward_flops(shape: Shape, tokens: float, length: int, blocks: slice = slice(None)) -> float:
    """Of a forward pass through blocks: 2 P a token, and 4 L w for attention, as if no token were masked."""
    return sum(tokens * (2 * p + 4 * length * shape.attention) for p in shape.parameters[blocks])


def head_flops(shape: Shape, tokens: float) -> float:
    """Of the logits: 2 h V a token."""
    return 2.0 * tokens * shape.hidden * shape.vocabulary


def fisher_flops(shape: Shape, tokens: float, length: int) -> float:
    """Of one round of gradients: blocks run twice, and back for activations only, with two and a half the attention."""
    back = sum(tokens * (2 * p + 10 * length * shape.attention) for p in shape.parameters)
    return 2 * forward_flops(shape, tokens, length) + back + 2 * head_flops(shape, tokens)


def walk_flops(shape: Shape, text: Text) -> Flops:
    """Of one walk of the text through all blocks: forward, a Gram and a Cholesky factor for each input."""
    return Flops(forward_flops(shape, text.tokens, text.length) + gram_flops(shape, text.tokens), _cholesky(shape))


def gram_flops(shape: Shape, tokens: float) -> float:
    """Of G = X^T X for each input."""
    return sum(self_product_flops(tokens, reader.d1) for reader in shape.readers)


def cross_flops(shape: Shape, tokens: float) -> float:
    """Of C = X'^T X for each input."""
    return sum(2.0 * tokens * reader.d1**2 for reader in shape.readers)


def paired_flops(shape: Shape, text: Text) -> Flops:
    """Of the walk in the model compressed so far.

    For each input two passes up to it, for the dense and for the compressed model, G and C; behind each block but
    the last two passes through all of it; a Cholesky factor an input.
    """
    n, length = text.tokens, text.length
    attended = 4.0 * length * shape.attention
    passes = sum(2 * n * (2.0 * reader.before + (attended if reader.before else 0)) for reader in shape.readers)
    grams = gram_flops(shape, n) + cross_flops(shape, n)
    return Flops(passes + grams + 2 * forward_flops(shape, n, length, slice(0, -1)), _cholesky(shape))


def _cholesky(shape: Shape) -> float:
    return sum(reader.d1**3 / 3 for reader in shape.readers)


DIRECTED = ("mod-htp", "procrustes", "eigen")
"""Solvers that start from the left singular vectors of A."""


def shared_flops(solver: str, d1: int, d2: int) -> Flops:
    """Of what runs at different sizes share: the left singular vectors of A, by a QR decomposition if A is tall."""
    if solver not in DIRECTED:
        return Flops()
    if d1 > d2:
        return Flops(2.0 * d1 * d2**2 + 2.0 * d2**3, 4.0 * d1 * d2**2 + 9.0 * d2**3)
    return Flops(2.0 * d1**2 * d2, 9.0 * d1**3)


def start_flops(solver: str, d1: int, d2: int, k: int) -> Flops:
    """Of what a solver does once."""
    if solver in ("svd-llm", "svd"):
        small, large = min(d1, d2), max(d1, d2)
        return Flops(2.0 * d1 * k * d2, 6.0 * large * small**2 + 20.0 * small**3)
    if solver == "eigen":  # the coding, the pseudo-inverse, the error
        return Flops(2.0 * d1**2 * k + 6.0 * d1 * k * d2 + 4.0 * k**2 * d2, 9.0 * k**3)
    if solver == "mod-htp":
        turned = Flops(2.0 * d1 * d2**2 + 2.0 * d1 * d2 * k if d1 > d2 else 0.0)
        d1 = min(d1, d2)
        if k > d1:
            return turned + Flops(2.0 * d1**2 * k + 2.0 * d1 * k * d2, 2.0 * d1**2 * d2)
        return turned + Flops(2.0 * d1 * k * d2)
    return Flops(2.0 * d1 * k * d2 if solver == "procrustes" else 0.0)


def iteration_flops(solver: str, d1: int, d2: int, k: int, s: float) -> Flops:
    """Of one iteration.

    mod-htp, with d1 no more than d2: D^T A, S A^T: 4 d1 k d2. Four products of S and G: 8 k^2 d2. D^T D, S S^T:
    2 k^2 (d1 + d2), of which five eighths from k = 512 on. Cholesky factor and its solve: k^3 / 3 + 2 k^2 d1.
    ksvd: products of OMP, 2 k^2 d2 an atom; 8 power iterations on s d2 columns.
    procrustes: three products of A, D and S, and the SVD of A S^T.
    """
    if solver == "mod-htp":
        d1 = min(d1, d2)
        products = 4.0 * d1 * k * d2 + 8.0 * k**2 * d2 + self_product_flops(d1 + d2, k)
        return Flops(products, k**3 / 3 + 2.0 * k**2 * d1)
    if solver == "ksvd":
        return Flops(2.0 * (s + 1) * k**2 * d2 + 4.0 * d1 * k * d2 + 40.0 * d1 * s * d2)
    if solver == "procrustes":
        return Flops(6.0 * d1 * k * d2 + 2.0 * d1 * k**2, 6.0 * d1 * k**2 + 20.0 * k**3)
    return Flops()


def run_flops(run: Run, recipe: Recipe, whitened: bool, compensated: bool) -> Flops:
    """Of solver runs, with L W before them and D S after each of them."""
    group = run.sizes[0]
    d1, d2 = group.d1, sum(group.d2s)
    total = Flops(2.0 * d1**2 * d2 if whitened else 0.0) + shared_flops(recipe.solver, d1, d2)
    for size in run.sizes:
        once, each = start_flops(recipe.solver, d1, d2, size.k), iteration_flops(recipe.solver, d1, d2, size.k, size.s)
        total += once + each * run.iterations + Flops(2.0 * d1 * size.k * d2)
        if run.stage != "curves" and whitened:
            total += Flops(0, 1.0 * d1**2 * size.k)
        if run.stage == "solve":
            total += Flops((2.0 * d1**2 * size.k if whitened else 0) + 2.0 * d1 * size.k * d2 * compensated)
    if run.stage == "solve" and compensated:  # the corrected weight
        total += Flops(2.0 * d1**2 * d2, d1**3 / 3 + 2.0 * d1**2 * d2)
    return total * run.count


def flops_of(shape: Shape, recipe: Recipe, text: Text, agenda: Agenda) -> dict[str, Flops]:
    """FLOPs of every stage."""

    def whole(tokens: float) -> Flops:
        return Flops(forward_flops(shape, tokens, text.length) + head_flops(shape, tokens))

    whitened = text.sequences > 0
    spent = {
        "load": whole(agenda.learned * text.length),
        "fisher": Flops(agenda.rounds * fisher_flops(shape, text.checked_tokens, text.length)),
        "calibrate": walk_flops(shape, text) * agenda.walks + paired_flops(shape, text) * agenda.compensated,
        "budgets": whole(agenda.candidates * text.checked_tokens),
        "solve": Flops(),
        "write": Flops(),
    }
    for run in agenda.runs:
        spent[_shown(run)] += run_flops(run, recipe, whitened, agenda.compensated)
    return spent


def _shown(run: Run) -> str:
    return "solve" if run.stage == "solve" else "budgets"


def memory_of(shape: Shape, recipe: Recipe, plan: Plan, text: Text, agenda: Agenda, cache_bytes: int) -> int:
    """The largest of what the stages hold, in bytes, beyond what the process has without a model.

    Each holds one block, its text on a shelf that keeps half of the cache in memory, and its own working set.
    """
    block, shelf = max(shape.block_bytes), cache_bytes // 2
    batch, length = min(text.batch, text.sequences) * text.length, text.length
    flow, checked = text.tokens * shape.hidden * shape.item, text.checked_tokens * shape.hidden * shape.item
    widest = max(reader.d1 for reader in shape.readers)
    by_block: dict[int, list[int]] = {}
    for reader in shape.readers:
        by_block.setdefault(reader.block, []).append(8 * reader.d1**2)
    grams = max(sum(sizes) for sizes in by_block.values())
    metrics = sum(8 * reader.d1**2 for reader in shape.readers) if agenda.kept else grams
    solving = max(solving_bytes(size, agenda.compensated) for run in agenda.runs for size in run.sizes)

    def activations(tokens: int) -> int:
        """Hidden states, queries and the like, three tensors of the widest, its copy in float32, the product."""
        return tokens * (shape.item * (4 * shape.hidden + 3 * widest) + 4 * widest) + 4 * widest**2

    def losses(tokens: int) -> int:
        """Logits in float32 and their softmax."""
        return shape.edge_bytes + 8 * tokens * shape.vocabulary

    # Without text the whole job is the solving.
    stages = [solving]
    if text.sequences:
        seen = 2 * len(shape.parameters) * batch * shape.hidden * shape.item
        stages.append(seen + shape.edge_bytes + batch * shape.vocabulary * shape.item)
        stages.append(min(flow, shelf) + block + grams + metrics * agenda.kept + activations(batch))
        stages.append(min(flow, shelf) + metrics + solving)
    if agenda.rounds:
        inputs = min((len(shape.parameters) + 2) * checked, shelf)
        tape = 2 * activations(length) + length * shape.vocabulary * (2 * shape.item + 12) + shape.edge_bytes
        stages.append(inputs + metrics * agenda.kept + max(block + 2 * activations(length), tape))
    if agenda.candidates:
        weights = shape.item * sum(group.dense_bytes // 2 for group in plan.compressed)
        some = weights if agenda.kept else max(shape.block_bytes)
        flows = min(agenda.candidates * checked, shelf)
        stages.append(flows + agenda.candidates * some + metrics + max(solving, losses(batch)))
    if agenda.compensated:
        flows, square = min(2 * flow, shelf), 8 * widest**2
        stages.append(flows + 2 * block + 2 * square + 2 * activations(batch))
        stages.append(flows + 2 * block + 7 * square + solving)
    return base_bytes() + prepared_bytes(recipe, agenda) + max(stages)


PRODUCTS, PRODUCT_BYTES, MOST_PRODUCTS = 5, 550_000, 1024
"""Products of mod-htp that differ between sizes; bytes of what torch's CPU library keeps of one, and of how many."""


def prepared_bytes(recipe: Recipe, agenda: Agenda) -> int:
    """Bytes of prepared bf16 products: torch's CPU library keeps the code that it made for each shape.

    A size that groups are measured at counts once for equal groups; the sizes that budgets then choose all differ.
    """
    cpu = torch.device("cpu")
    if recipe.solver != "mod-htp" or load.pick_device(recipe.device).type != "cpu" or not bf16_is_fast(cpu):
        return 0
    sizes = {(_key(size), size.k) for run in agenda.runs for size in run.sizes if run.stage != "candidates"}
    groups = len({run.sizes[0].members for run in agenda.runs})
    chosen = (len(SPANS) - 1) * groups if agenda.candidates else 0
    return PRODUCT_BYTES * min(MOST_PRODUCTS, PRODUCTS * (len(sizes) + chosen))


def solving_bytes(group: Group, compensated: bool) -> int:
    """Bytes of a solver run: W, A in two precisions, its decomposition or the codes; W' where it has one."""
    d1, d2, k = group.d1, sum(group.d2s), group.k
    small = min(d1, d2)
    start = 28 * d1 * d2 + 32 * small**2
    iterating = 4 * (d1 + d2) * small + 16 * k * d2 + 20 * k**2
    packing = 4 * d1 * small + 16 * d1 * k + 24 * k * d2 + 8 * d1 * d2
    return (16 + 8 * compensated) * d1 * d2 + max(start, iterating, packing)


TEXT_LIBRARIES = 80_000_000
"""Bytes of what reading a text and a tokenizer load beside the package."""


def base_bytes() -> int:
    """Resident bytes of this process, which has loaded what `compress` loads, but for what reads the text."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) + TEXT_LIBRARIES
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak if os.uname().sysname == "Darwin" else 1024 * peak) + TEXT_LIBRARIES


def disk_of(
    shape: Shape, plan: Plan, text: Text, agenda: Agenda, cache_bytes: int, keep_grams: bool, output: int
) -> int:
    """The job directory and the output together at their largest, in bytes.

    The job directory keeps tokens and F (float64), for a while the weights that short runs make, the candidates' hidden
    states behind the last block and the one before it, hidden states beyond half of the cache, in the end the factors
    beside the output.
    """

    def beyond(flow: int) -> int:
        return max(0, flow - cache_bytes // 2)

    flow, checked = text.tokens * shape.hidden * shape.item, text.checked_tokens * shape.hidden * shape.item
    small = 8 * text.tokens + (2 if agenda.rounds else 0) * 8 * sum(sum(group.d2s) for group in plan.groups)
    quick = shape.item * sum(group.dense_bytes // 2 for group in plan.compressed) if agenda.rounds else 0
    kept = sum(8 * reader.d1**2 for reader in shape.readers) if keep_grams and not agenda.kept else 0
    factors = sum(group.parts.total for group in plan.compressed)
    flows = agenda.candidates * checked
    passed = min(2, len(shape.parameters) - 1) * flows
    inputs = beyond((len(shape.parameters) + 2) * checked) if agenda.rounds else 0
    return small + max(
        quick + kept + max(beyond(flow), inputs),
        kept + passed + beyond(flow + flows),
        kept + factors + max(output, beyond((1 + agenda.compensated) * flow)),
    )


def weight_reads(agenda: Agenda) -> float:
    """How often each weight is read from the disk: by whatever loads its block, and for each problem it is part of."""
    first = agenda.runs[0].sizes[0].members
    problems = sum(run.count for run in agenda.runs if run.sizes[0].members == first)
    return 5 + agenda.walks + 2 * agenda.rounds + 2 * (agenda.candidates > 0) + agenda.compensated + problems


def spilled_bytes(shape: Shape, text: Text, agenda: Agenda, cache_bytes: int) -> tuple[int, int]:
    """Bytes of hidden states, beyond half of the cache, that are read from the disk and written to it."""

    def beyond(flow: int) -> int:
        return max(0, flow - cache_bytes // 2)

    blocks = len(shape.parameters)
    flow, checked = text.tokens * shape.hidden * shape.item, text.checked_tokens * shape.hidden * shape.item
    moved = blocks * (agenda.walks * beyond(flow) + beyond(agenda.candidates * checked))
    paired = agenda.compensated * beyond(2 * flow)
    inputs = agenda.rounds * beyond((blocks + 2) * checked)
    return moved + (blocks + len(shape.readers)) * paired + 2 * inputs, moved + blocks * paired + 2 * inputs


@dataclass(frozen=True)
class SolverPace:
    """Seconds of a solver run of one shape, at one size.

    Attributes:
        flops: of an iteration; 0 for a solver that has none.
        shared: of what runs at all sizes have in common.
        start, quick, exact: of the start, of an iteration, of one of the last ones, in full precision.
        rounding: of packing the result, and of the weights it stands for.
    """

    flops: float
    shared: float
    start: float
    quick: float
    exact: float
    rounding: float

    def seconds(self, iterations: int) -> float:
        """Of a run without what comes before and after it."""
        last = iterations - int(iterations * (1 - EXACT_SHARE))
        return self.start + (iterations - last) * self.quick + last * self.exact


@dataclass(frozen=True)
class Pace:
    """How fast this device is.

    Attributes:
        forward, backward, head, gram: seconds a FLOP of a block's forward pass, of gradients of blocks, of the logits
            and their loss, and of Grams.
        whitening: d1 -> seconds of a Cholesky factor.
        target, corrected: (d1, d2s) -> seconds of L W, and of a corrected weight.
        solver: (d1, d2s) -> the smallest and the largest size that was timed, both at this shape.
        read, hashed, written: seconds a byte.
        piece: seconds to finish a piece of the job directory.
        start: seconds until a process has what it imports.
    """

    forward: float
    backward: float
    head: float
    gram: float
    whitening: dict[int, float]
    target: dict[tuple[int, ...], float]
    corrected: dict[tuple[int, ...], float]
    solver: dict[tuple[int, ...], tuple[SolverPace, ...]]
    read: float
    hashed: float
    written: float
    piece: float
    start: float


STAND_IN = {"cpu": 1024, "cuda": 4096}
"""Hidden size of the block that is timed in place of one that would take too long."""

PROBE_FLOPS = {"cpu": 1.5e10, "cuda": 5e12}
"""FLOPs that one timed piece may take: a part of a second."""


def measure(model: Any, recipe: Recipe, text: Text, agenda: Agenda) -> Pace:
    """Time the pieces of a job on the recipe's device, at its own shapes or, where they are large, at smaller ones.

    Args:
        model: on the meta device.
    """
    start = time.process_time()  # what `compress` imports is what this process has imported
    device = load.pick_device(recipe.device)
    of_text = _time_block(model, text, device) if text.sequences else (0.0, 0.0, 0.0, 0.0)
    whitening: dict[int, float] = {}
    target: dict[tuple[int, ...], float] = {}
    corrected: dict[tuple[int, ...], float] = {}
    solver: dict[tuple[int, ...], tuple[SolverPace, ...]] = {}
    by_shape: dict[tuple[int, ...], list[Group]] = {}
    for run in agenda.runs:
        by_shape.setdefault(_key(run.sizes[0]), []).extend(run.sizes)
    for key, sizes in by_shape.items():
        ends = {size.k: size for size in (min(sizes, key=lambda s: s.k), max(sizes, key=lambda s: s.k))}
        timed = [_time_group(size, recipe, text, agenda, device) for size in ends.values()]
        whitening[key[0]], target[key], corrected[key], _ = timed[0]
        solver[key] = tuple(pace for *_, pace in timed)
    return Pace(*of_text, whitening, target, corrected, solver, *_time_disk(), start)


def _key(group: Group) -> tuple[int, ...]:
    return (group.d1, *group.d2s)


def _seconds(function: Callable[[], object], device: torch.device, least: float = 0.1) -> float:
    """The shortest of some runs, the first of which warms up unless it takes long: other work can only add to it."""
    best, spent = float("inf"), 0.0
    for repeat in range(6):
        start = _now(device)
        function()
        took = _now(device) - start
        spent += took
        best = took if repeat == 1 and spent < 2 * least else min(best, took)
        if repeat and spent > least:
            break
        if took > 5 * least:
            break
    return best


def _now(device: torch.device) -> float:
    """Seconds of work: on one thread those of the processor, which other processes do not add to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def _time_block(model: Any, text: Text, device: torch.device) -> tuple[float, float, float, float]:
    """Seconds a FLOP of a forward pass, of gradients, of the head, of Grams, in a model of one block."""
    blocks, calls, tokens = _block_to_time(model, text, device)
    one, block = blocks.model, blocks.modules[0]
    batch, length = tokens.shape
    projections = find_projections(one)
    owner = shared_inputs(one, projections, device)
    shape = shape_of(one, owner)
    readers = {name: one.get_submodule(name) for name in owner.values()}
    for parameter in one.parameters():
        parameter.requires_grad_(False)
    shelf = Shelf(2**40)
    alone = sequence.embed(blocks, tokens[:1], 1, shelf)[0]

    def forward() -> None:
        sequence.advance(block, 0, calls, sequence.embed(blocks, tokens, batch, shelf), {})

    def grams() -> None:
        sequence.grams(block, 0, calls, sequence.embed(blocks, tokens, batch, shelf), readers)

    def gradients() -> None:
        output_fisher_by_blocks(blocks, calls, projections, tokens[:1], shelf)

    def losses() -> None:
        with torch.enable_grad():
            hidden = alone.detach().clone().requires_grad_()
            summed_loss(one, sequence.logits(blocks, calls, hidden, tokens[:1]), tokens[:1]).backward()  # type: ignore[no-untyped-call]

    seconds = {function: _seconds(function, device) for function in (forward, grams, gradients, losses)}
    of_head = 2 * head_flops(shape, length)
    return (
        seconds[forward] / forward_flops(shape, tokens.numel(), length),
        max(seconds[gradients] - seconds[losses], 0.1 * seconds[gradients])
        / (fisher_flops(shape, length, length) - of_head),
        seconds[losses] / of_head,
        max(seconds[grams] - seconds[forward], 0.1 * seconds[grams]) / gram_flops(shape, tokens.numel()),
    )


def _block_to_time(model: Any, text: Text, device: torch.device) -> tuple[Blocks, sequence.Calls, Tensor]:
    """A model of one block like a model's own, with random weights, and tokens; of a Llama where that is too large."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    own: Any = copy.deepcopy(model.config)
    inner = own.get_text_config(decoder=True)
    inner.num_hidden_layers = 1
    if getattr(inner, "layer_types", None):
        inner.layer_types = inner.layer_types[:1]
    width = STAND_IN[device.type]
    llama = LlamaConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=1, num_attention_heads=width // 64,
        num_key_value_heads=width // 64, vocab_size=8192, max_position_embeddings=max(2048, text.length),
    )  # fmt: skip
    _, blocks = decoder_blocks(model)
    count = sum(p.numel() for p in blocks[0].parameters()) + 2 * inner.vocab_size * inner.hidden_size
    tried = [(own, text.batch, text.length)] if 2.0 * count * text.length < PROBE_FLOPS[device.type] else []
    for config, batch, length in [*tried, (llama, 1, min(512, text.length))]:
        try:
            one = Blocks(AutoModelForCausalLM.from_config(config, dtype=model.dtype).to(device).eval(), device)
            vocabulary = config.get_text_config(decoder=True).vocab_size
            generator = torch.Generator().manual_seed(0)
            tokens = torch.randint(0, vocabulary, (batch, length), generator=generator).to(device)
            calls = sequence.learn_calls(one, [(tokens, batch), (tokens[:1], 1)])
        except Exception as error:  # a model class may raise anything on a config of one block
            log.debug("no single block to time: %s", error)
            continue
        if calls is not None:
            return one, calls, tokens
    raise AssertionError


def _time_group(
    group: Group, recipe: Recipe, text: Text, agenda: Agenda, device: torch.device
) -> tuple[float, float, float, SolverPace]:
    """Seconds of a Cholesky factor, of L W, of a corrected weight, of a solver run, for a group of random numbers.

    Of a large group a smaller one of the same proportions is timed: FLOPs grow with the third power of its size.
    """
    iterations = 4 if recipe.solver == "mod-htp" else 2
    d1, d2 = group.d1, sum(group.d2s)
    once = start_flops(recipe.solver, d1, d2, group.k) + shared_flops(recipe.solver, d1, d2)
    each = iteration_flops(recipe.solver, d1, d2, group.k, group.s)
    cost = once.products + each.products * iterations + 4 * (once.others + each.others * iterations)
    shrink = max(1.0, (cost / PROBE_FLOPS[device.type]) ** (1 / 3))
    small = _shrunk(group, shrink, recipe) if shrink > 1 else group
    d1, d2 = small.d1, sum(small.d2s)
    generator = torch.Generator().manual_seed(0)
    metric, gram = IDENTITY, None
    if text.sequences:
        factor = torch.randn(d1, d1, generator=generator, dtype=torch.float64).triu() * 0.1 / d1**0.5
        factor += torch.eye(d1, dtype=torch.float64)
        factor[round(text.tokens / shrink) :] = 0  # as many tokens give no more than that rank
        gram = (factor.T @ factor).to(device)
        metric = whiten(gram, text.tokens, recipe.damping)
    weight = torch.randn(d1, d2, generator=generator).to(device)
    fisher = torch.rand(d2, generator=generator, dtype=torch.float64).to(device) + 0.5
    work = Work(recipe, small, metric, weight, fisher, weighs_columns(recipe), device)
    target = work.target()
    posed = pose(work, target)
    rows: list[list[float]] = []
    found: list[Factorization] = []

    def run() -> None:
        stamps = [_now(device)]
        found[:] = [solve(work, small, posed, iterations, lambda _iteration, _error: stamps.append(_now(device)))]
        rows.append([after - before for before, after in pairwise([*stamps, _now(device)])])

    scale = shrink**3
    shared = 0.0
    if recipe.solver in DIRECTED:
        shared = scale * _seconds(lambda: replace(posed[0]).directions, device)
    _seconds(run, device)
    solution = found[0]
    first, *steps, end = (scale * min(row[place] for row in rows) for place in range(min(map(len, rows))))
    quick, exact = (min(steps[:-1] or steps), steps[-1]) if steps else (0.0, 0.0)
    rounding = scale * _seconds(lambda: dense_weights(pack(small, solution, metric, target)), device)
    of_solver = SolverPace(each.total, shared, max(0.0, first - quick) + end, quick, exact, rounding)
    if gram is None:
        return 0.0, 0.0, 0.0, of_solver
    square = gram
    again = scale * _seconds(lambda: sequence.corrected(weight, square, square), device) if agenda.compensated else 0.0
    return (
        scale * _seconds(lambda: whiten(square, text.tokens, recipe.damping), device),
        scale * _seconds(work.target, device),
        again,
        of_solver,
    )


def _shrunk(group: Group, factor: float, recipe: Recipe) -> Group:
    """A group of the same proportions, all sizes divided by a factor."""
    members = tuple(
        replace(member, d1=max(8, round(member.d1 / factor)), d2=max(4, round(member.d2 / factor)))
        for member in group.members
    )
    form, k = group.stored, max(2, round(group.k / factor))
    if not form.support_kind.chosen:
        return even_group(members, form, k, k)
    s = max(1, round(group.s / factor))
    if not find_solver(recipe.solver).free_support:
        return even_group(members, form, k, s)
    nonzeros = s * sum(member.d2 for member in members)
    return free_group(members, form, k, nonzeros // accounting.VALUE_UNIT * accounting.VALUE_UNIT)


def _time_disk() -> tuple[float, float, float, float]:
    """Seconds a byte read, hashed and written, and seconds of a small file that is safely on the disk, in /tmp."""
    content = bytes(2**24)
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "file"

        def write(data: bytes) -> None:
            with path.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())

        piece = 2 * _seconds(lambda: write(b"piece"), cpu, 0.02)
        written = _seconds(lambda: write(content), cpu, 0.02) / len(content)
        read = 2 * _seconds(path.read_bytes, cpu, 0.02) / len(content)
        hashed = _seconds(lambda: hashlib.sha256(content), cpu, 0.02) / len(content)
    return read, hashed, written, piece


def times(
    shape: Shape, recipe: Recipe, text: Text, agenda: Agenda, pace: Pace, cache_bytes: int, stored: int, output: int
) -> dict[str, float]:
    """Seconds of every stage: the same counts as of FLOPs, times what was measured.

    Args:
        stored, output: bytes of the checkpoint's tensors before and after.
    """

    def whole(tokens: float) -> float:
        return forward_flops(shape, tokens, text.length) * pace.forward + head_flops(shape, tokens) * pace.head

    grams, crosses = gram_flops(shape, text.tokens), cross_flops(shape, text.tokens)
    whitening = sum(pace.whitening[reader.d1] for reader in shape.readers)
    of_head = 2 * head_flops(shape, text.checked_tokens)
    gradients = fisher_flops(shape, text.checked_tokens, text.length) - of_head
    walked = forward_flops(shape, text.tokens, text.length) * pace.forward + grams * pace.gram + whitening
    products = paired_flops(shape, text).products - grams - crosses
    paired = products * pace.forward + (grams + crosses) * pace.gram + whitening
    spent = dict.fromkeys(STAGES, 0.0)
    spent["load"] = (
        pace.start + stored * (pace.hashed + weight_reads(agenda) * pace.read) + whole(agenda.learned * text.length)
    )
    spent["fisher"] = agenda.rounds * (gradients * pace.backward + of_head * pace.head)
    spent["calibrate"] = agenda.walks * walked + agenda.compensated * paired
    spent["budgets"] = whole(agenda.candidates * text.checked_tokens)
    read, written = spilled_bytes(shape, text, agenda, cache_bytes)
    spent["calibrate"] += read * pace.read + written * pace.written
    for run in agenda.runs:
        spent[_shown(run)] += run_seconds(run, recipe, pace)
        spent["write"] += pace.piece * (run.stage != "candidates") * min(1, run.count)
    spent["write"] += output * (2 * pace.hashed + 2 * pace.written + pace.read)
    return spent


def run_seconds(run: Run, recipe: Recipe, pace: Pace) -> float:
    """Of solver runs, between those of the two sizes that were timed by the FLOPs of an iteration."""
    key = _key(run.sizes[0])
    low, high = pace.solver[key][0], pace.solver[key][-1]
    total = pace.target[key] + low.shared
    for size in run.sizes:
        flops = iteration_flops(recipe.solver, size.d1, sum(size.d2s), size.k, size.s).total
        share = (flops - low.flops) / (high.flops - low.flops) if high.flops > low.flops else 0.0
        total += (1 - share) * low.seconds(run.iterations) + share * high.seconds(run.iterations)
        if run.stage == "solve":
            total += (1 - share) * low.rounding + share * high.rounding + pace.corrected[key]
    return total * run.count
