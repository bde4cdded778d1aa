"""What the formulas of `estimate.py` ask of a model and a text, and what a job will do how often."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cospadi.budget.plan import Group, Plan, size_group
from cospadi.calibration.text import sequence_length
from cospadi.model.projections import decoder_blocks, find_projections
from cospadi.recipe import Recipe
from cospadi.stages.budgets import SPANS, measured_ratios, measured_rhos


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
        heads: of attention.
        attention: w, heads times their width.
        hidden, vocabulary: h and V.
        block_bytes: of each block's parameters.
        edge_bytes: of the largest module outside the blocks.
        dtype: of the model.
        readers: distinct inputs of selected projections, in running order.
    """

    parameters: tuple[int, ...]
    heads: int
    attention: int
    hidden: int
    vocabulary: int
    block_bytes: tuple[int, ...]
    edge_bytes: int
    dtype: torch.dtype
    readers: tuple[Reader, ...]

    @property
    def item(self) -> int:
        """Bytes of a hidden state's entry."""
        return self.dtype.itemsize


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
        fraction = min(1.0, met / parameter.shape[0]) if parameter.ndim == 3 and met else 1.0
        return int(parameter.numel() * fraction) if parameter.ndim > 1 else 0

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
        heads=heads,
        attention=heads * int(getattr(config, "head_dim", None) or hidden // heads),
        hidden=hidden,
        vocabulary=int(config.vocab_size),
        block_bytes=tuple(sum(parameter.nbytes for parameter in block.parameters()) for block in blocks),
        edge_bytes=max(edges),
        dtype=next(blocks.parameters()).dtype,
        readers=tuple(readers),
    )


def text_of(recipe: Recipe, positions: int) -> Text:
    """The text that a recipe asks for; none for a recipe without calibration."""
    if recipe.settled().data_free:
        return Text(0, 1, recipe.batch_size, 0)
    length = sequence_length(recipe.length, positions)
    return Text(recipe.sequences, length, recipe.batch_size, min(recipe.fisher_sequences, recipe.sequences))


def agenda_of(
    recipe: Recipe, plan: Plan, shape: Shape, text: Text, final: bool, cache_bytes: int, keep_grams: bool
) -> Agenda:
    """What `compress` will do, as compress.py and the stages do it."""
    recipe = recipe.settled()
    spreads = recipe.allocate != "uniform" and not final
    fisher = recipe.metric in ("fisher", "two-sided") or (spreads and recipe.allocate == "fisher")
    compensated = bool(recipe.compensate)
    kept = sum(8 * reader.d1**2 for reader in shape.readers) <= cache_bytes // 2
    runs: list[Run] = []
    for group in plan.compressed:
        likely = _likely(group, recipe) if spreads else [group]
        if fisher:
            runs.append(Run("quick", (group,), recipe.budget_iterations))
        if spreads:
            sizes = [
                size_group(group.members, ratio, rho, recipe)
                for ratio in measured_ratios(recipe)
                for rho in measured_rhos(recipe)
            ]
            runs.append(Run("curves", tuple(size for size in sizes if size), recipe.budget_iterations))
            runs.append(Run("candidates", (group,), recipe.budget_iterations))
            runs += [Run("candidates", (size,), recipe.budget_iterations, len(SPANS) / len(likely)) for size in likely]
        runs += [Run("solve", (size,), recipe.iterations or 1, 1 / len(likely)) for size in likely]
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
    """Sequences that `walk.learn_calls` runs: two batches of each size that occurs."""
    wanted = [(text.sequences, text.batch)] + ([(text.checked, 1), (text.checked, text.batch)] if checked else [])
    runs: dict[int, int] = {}
    for count, batch in wanted:
        for start in range(0, count, batch):
            size = min(batch, count - start)
            runs[size] = min(2, runs.get(size, 0) + 1)
    return sum(size * times for size, times in runs.items())
