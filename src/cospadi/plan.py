"""The plan: which projections share a dictionary, with which k and s, and what that costs to the byte."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cospadi import budget, source
from cospadi.budget import Parts
from cospadi.errors import UserError
from cospadi.factorization import find_solver
from cospadi.projections import Projection, dense_experts, find_projections, kinds_of, select, shared_inputs
from cospadi.recipe import Recipe

log = logging.getLogger("cospadi")


@dataclass(frozen=True)
class Group:
    """Projections with one dictionary over their concatenated outputs; most have one member.

    Attributes:
        members: in model order; the first owns the dictionary.
        layout: "sparse-dictionary" or "low-rank".
        k: atoms, or the rank. s: nonzeros a column (0 for low rank).
        value_bits: bits a stored coefficient (16 for low rank).
        parts: bytes on disk.
    """

    members: tuple[Projection, ...]
    layout: str
    k: int
    s: int
    value_bits: int
    parts: Parts

    @property
    def d1(self) -> int:
        return self.members[0].d1

    @property
    def d2s(self) -> list[int]:
        return [member.d2 for member in self.members]

    @property
    def dense_bytes(self) -> int:
        return budget.dense_bytes(self.d1, sum(self.d2s))


@dataclass(frozen=True)
class Plan:
    """All groups, in model order."""

    groups: tuple[Group, ...]

    @property
    def dense_bytes(self) -> int:
        return sum(group.dense_bytes for group in self.groups)

    @property
    def bytes(self) -> int:
        return sum(group.parts.total for group in self.groups)

    @property
    def ratio(self) -> float:
        """1 - compressed / dense bytes over all selected projections (the paper's CR)."""
        return 1 - self.bytes / self.dense_bytes


def make_plan(projections: Sequence[Projection], recipe: Recipe, owner: Mapping[str, str]) -> Plan:
    """Uniform budget: every group gets the recipe's ratio.

    Args:
        owner: projection -> the first reader of its input, as `shared_inputs` finds; used if the recipe shares inputs.

    Raises:
        UserError: a group is too small for the ratio; the message names its first projection.
    """
    readers = owner if recipe.shares_input else {p.name: p.name for p in projections}
    groups = group_projections(projections, readers, recipe.layers_shared)
    return Plan(tuple(_plan_group(members, recipe) for members in groups))


def group_projections(
    projections: Sequence[Projection], owner: Mapping[str, str], layers: int
) -> list[tuple[Projection, ...]]:
    """Sets of projections of one block that read the same input, like sets of `layers` consecutive blocks together.

    Two sets are alike when they have the same kinds and shapes. Groups and their members are in model order.
    """
    sets: dict[tuple[int, str], list[Projection]] = {}
    for p in projections:
        sets.setdefault((p.block, owner[p.name]), []).append(p)
    groups: dict[tuple[object, ...], list[Projection]] = {}
    for (block, _), members in sets.items():
        alike = tuple((p.kind, p.d1, p.d2) for p in members)
        groups.setdefault((block // layers, alike), []).extend(members)
    return [tuple(members) for members in groups.values()]


def _plan_group(members: tuple[Projection, ...], recipe: Recipe) -> Group:
    d1, d2s = members[0].d1, [member.d2 for member in members]
    layout = find_solver(recipe.solver).layout
    try:
        if layout == "low-rank":
            r = budget.rank_for_ratio(recipe.ratio, d1, d2s)
            return Group(members, layout, r, 0, budget.DENSE_BITS, budget.low_rank_bytes(d1, d2s, r))
        bits = recipe.stored_value_bits
        k, s = budget.size_for_ratio(recipe.ratio, d1, d2s, recipe.rho, bits, recipe.accounting)
        return Group(members, layout, k, s, bits, budget.sparse_bytes(d1, d2s, k, s, bits))
    except UserError as error:
        kinds = dict.fromkeys(member.kind for member in members)
        exclude = " ".join(f"--exclude '*.{kind}'" for kind in kinds)
        raise UserError(
            f"{members[0].name}: {error}. Leave {'it' if len(kinds) == 1 else 'them'} dense with {exclude}"
        ) from None


@dataclass(frozen=True)
class Outlook:
    """What compressing a model would do, told without its weights.

    Attributes:
        plan: groups, k, s and bytes.
        before, after: bytes of the whole checkpoint's tensors as stored; None where the headers do not tell.
        experts: modules that stay dense because their experts are not nn.Linear, for reading; may be empty.
    """

    plan: Plan
    before: int | None
    after: int | None
    experts: str


def outlook(model: str | Path, recipe: Recipe) -> Outlook:
    """Plan a model from its config and safetensors headers.

    Raises:
        UserError: as `compress` would.
    """
    skeleton = source.load_skeleton(model, recipe.revision)
    selected = select(find_projections(skeleton.model), recipe.include, recipe.exclude, recipe.target)
    plan = make_plan(selected, recipe, _owner_without_weights(skeleton.model, selected) if recipe.shares_input else {})
    before = after = None
    if skeleton.sizes is not None:
        before = sum(skeleton.sizes.values())
        removed = [skeleton.sizes.get(f"{projection.name}.weight") for projection in selected]
        if None not in removed:  # else the checkpoint uses other names than the model
            after = before - sum(size for size in removed if size) + plan.bytes
    return Outlook(plan, before, after, kinds_of(dense_experts(skeleton.model)))


def _owner_without_weights(skeleton: nn.Module, selected: Sequence[Projection]) -> dict[str, str]:
    """`shared_inputs` of a model on the meta device; each reads its own where that fails."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return shared_inputs(skeleton, selected)
    except Exception as error:  # a model that asks for a number may raise anything
        log.debug("no forward pass without weights: %s", error)
        log.warning(
            "which projections share a dictionary is only known once the weights are there: planned as --share none"
        )
        return {projection.name: projection.name for projection in selected}
