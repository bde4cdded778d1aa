"""The plan: which projections share a dictionary, with which k and s, and what that costs to the byte."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from cospadi import compat
from cospadi.budget import accounting
from cospadi.errors import SizeError, UserError
from cospadi.experts import parameter_of
from cospadi.files import check_name, write_whole
from cospadi.format.codecs import codec_of_bits
from cospadi.format.form import DENSE_BITS, Form, Parts, dense_bytes, find_form
from cospadi.model import load
from cospadi.model.projections import Projection, find_projections, running, select, shared_inputs, what_stays_dense
from cospadi.recipe import Recipe
from cospadi.solvers import find_solver

log = logging.getLogger("cospadi")

DENSE = "dense"
"""The layout of what is not compressed."""


@dataclass(frozen=True)
class Group:
    """Projections with one dictionary over their concatenated outputs; most have one member.

    Attributes:
        members: in model order; the first owns the dictionary.
        form: how it is stored; None where it stays dense.
        k: atoms (0 for dense).
        nonzeros: of all columns together (0 for dense and where all of S is stored).
        parts: bytes on disk; for dense, where 16 bits a weight are counted whatever is stored, all in `values`.
    """

    members: tuple[Projection, ...]
    form: Form | None
    k: int
    nonzeros: int
    parts: Parts

    @property
    def layout(self) -> str:
        """What the form is called, for reading."""
        return DENSE if self.form is None else self.form.layout

    @property
    def value_bits(self) -> int:
        """Bits a stored value."""
        return DENSE_BITS if self.form is None else self.form.codec.bits

    @property
    def values(self) -> str | None:
        """The codec of the stored values; None for dense."""
        return None if self.form is None else self.form.values

    @property
    def stored(self) -> Form:
        """The form, of a group that does not stay dense."""
        assert self.form is not None
        return self.form

    @property
    def s(self) -> float:
        """Nonzeros a column; the mean, where columns differ."""
        return self.nonzeros / sum(self.d2s)

    @property
    def d1(self) -> int:
        return self.members[0].d1

    @property
    def d2s(self) -> list[int]:
        return [member.d2 for member in self.members]

    @property
    def dense_bytes(self) -> int:
        return dense_bytes(self.d1, sum(self.d2s))


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
        return (self.dense_bytes - self.bytes) / self.dense_bytes

    @property
    def bits(self) -> float:
        """Bits a weight, over all selected projections."""
        return DENSE_BITS * self.bytes / self.dense_bytes

    @property
    def projections(self) -> list[Projection]:
        """All selected projections."""
        return [member for group in self.groups for member in group.members]

    @property
    def compressed(self) -> list[Group]:
        """The groups that do not stay dense."""
        return [group for group in self.groups if group.form is not None]

    @property
    def left_dense(self) -> list[Projection]:
        """The selected projections that stay dense."""
        return [member for group in self.groups if group.form is None for member in group.members]


def make_plan(projections: Sequence[Projection], recipe: Recipe, owner: Mapping[str, str]) -> Plan:
    """Uniform budget: every group gets the recipe's ratio.

    Args:
        owner: projection -> the first reader of its input, as `shared_inputs` finds; used if the recipe shares inputs.

    Raises:
        UserError: a group is too small for the ratio; the message names its first projection.
    """
    readers = owner if recipe.shares_input else {p.name: p.name for p in projections}
    groups = group_projections(projections, readers, recipe.layers_shared)
    return Plan(tuple(_uniform_group(members, recipe) for members in groups))


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


def _uniform_group(members: tuple[Projection, ...], recipe: Recipe) -> Group:
    group = size_group(members, recipe.ratio, recipe.rho, recipe)
    if group is None:
        kinds = dict.fromkeys(member.kind for member in members)
        d1, d2s = members[0].d1, [member.d2 for member in members]
        form = forms_of(recipe)[0]
        k = form.dictionary_kind.atoms(d1)
        what, instead, size = "not one atom fits", "Leave", f"ratio {recipe.ratio:g}"
        if form.codec.levels:
            least = min(level_bytes(members, form) for form in forms_of(recipe))
            bits = 8 * least / (d1 * sum(d2s))
            what = f"it takes {least:,} bytes at least, {bits:.2f} bits a weight, with all that levels need beside them"
            asked = 16 * (1 - recipe.ratio)
            size = f"{asked:g} bit{'s' * (asked != 1)} a weight"
            instead = f"Use --bits {math.ceil(100 * bits) / 100:g} or more, or leave"
        elif k is not None:
            taken = form.nbytes(d1, d2s, k, []).total / dense_bytes(d1, sum(d2s))
            what = f"telling which weights stay takes {taken:.1%} of its bytes, and no weight fits beside that"
            instead = "Use a smaller one, or leave"
        raise SizeError(
            f"{members[0].name}: a projection of {d1} x {sum(d2s)} is too small for {size}: {what}. "
            f"{instead} {'it' if len(kinds) == 1 else 'them'} dense with "
            + " ".join(f"--exclude '*.{kind}'" for kind in kinds)
        )
    return group


def forms_of(recipe: Recipe) -> tuple[Form, ...]:
    """How a recipe's solver may store what it finds."""
    solver = find_solver(recipe.solver)
    codecs = solver.codecs or (codec_of_bits(recipe.stored_value_bits),)
    return tuple(Form(solver.dictionary, solver.support, codec) for codec in codecs)


def size_group(members: tuple[Projection, ...], ratio: float, rho: float, recipe: Recipe) -> Group | None:
    """The largest group of the recipe's forms and accounting at a ratio; None where not even one atom fits."""
    d1, d2s = members[0].d1, [member.d2 for member in members]
    d2, allowed = sum(d2s), accounting.byte_budget(ratio, d1, d2s)
    forms, free = forms_of(recipe), find_solver(recipe.solver).free_support
    form = forms[0]
    if form.codec.coded:
        return coded_group(members, form, allowed) if allowed >= least_bytes(members) else None
    if form.codec.levels:
        groups = [even_group(members, form, d1, d1) for form in forms]
        fitting = [group for group in groups if group.parts.total <= allowed]
        return max(fitting, key=lambda group: group.parts.total, default=None)
    if not form.support_kind.chosen:
        k = s = accounting.exact_rank(allowed, form, d1, d2s)
    elif recipe.accounting == "exact" and free:
        k, nonzeros = accounting.free_size(allowed, form, d1, d2s, rho)
        return free_group(members, form, k, nonzeros) if k else None
    elif recipe.accounting == "eq10":
        k, s = accounting.eq10_size(ratio, d1, d2, rho)
    elif recipe.accounting == "eq11":
        k, s = accounting.eq11_size(ratio, d1, d2, rho)
    else:
        k, s = accounting.exact_size(allowed, form, d1, d2s, rho)
    if min(k, s) < 1:
        return None
    if free:
        nonzeros = min(s * d2 // accounting.VALUE_UNIT * accounting.VALUE_UNIT, accounting.most_nonzeros(d2s, k))
        return free_group(members, form, k, nonzeros) if nonzeros else None
    return even_group(members, form, k, s)


def even_group(members: tuple[Projection, ...], form: Form, k: int, s: int) -> Group:
    """A group that stores s values in every column: all k where the support is not chosen."""
    counts = [s * member.d2 for member in members]
    parts = form.nbytes(members[0].d1, [member.d2 for member in members], k, counts)
    return Group(members, form, k, sum(counts) if form.support_kind.chosen else 0, parts)


def free_group(members: tuple[Projection, ...], form: Form, k: int, nonzeros: int) -> Group:
    """A group whose nonzeros lie anywhere, each member holding a multiple of VALUE_UNIT of them."""
    parts = form.nbytes(members[0].d1, [member.d2 for member in members], k, [nonzeros])
    return Group(members, form, k, nonzeros, parts)


def coded_group(members: tuple[Projection, ...], form: Form, nbytes: int) -> Group:
    """A group whose values are levels in a code, of so many bytes."""
    return Group(members, form, members[0].d1, 0, Parts(0, 0, nbytes))


LEAST_BITS = 0.75
"""Bits a weight that a code is planned with at least, beside its steps and widths."""


def beside_bytes(members: tuple[Projection, ...]) -> int:
    """What a group of levels takes beside their code, about: a byte an input and an output of each member, headers."""
    return sum(member.d1 + member.d2 + 24 for member in members)


def least_bytes(members: tuple[Projection, ...]) -> int:
    """What a group of levels in a code is given at least."""
    weights = sum(member.d1 * member.d2 for member in members)
    return int(weights * LEAST_BITS / 8) + 2 * beside_bytes(members)


def level_bytes(members: tuple[Projection, ...], form: Form) -> int:
    """The same of levels of any form."""
    d1 = members[0].d1
    return least_bytes(members) if form.codec.coded else even_group(members, form, d1, d1).parts.total


def dense_group(members: tuple[Projection, ...]) -> Group:
    """A group that stays as it is."""
    nbytes = dense_bytes(members[0].d1, sum(member.d2 for member in members))
    return Group(members, None, 0, 0, Parts(0, 0, nbytes))


PLAN_FIELDS = ("members", "layout", "k", "nonzeros", "values", "bytes")


def write_plan(plan: Plan, recipe: Recipe, path: Path) -> None:
    """Save a plan, with the recipe that it belongs to, as JSON; beside its name first, then renamed."""
    groups = [
        {
            "members": [member.name for member in group.members],
            "layout": group.layout,
            "k": group.k,
            "nonzeros": group.nonzeros,
            "values": group.values,
            "bytes": group.parts.total,
        }
        for group in plan.groups
    ]
    content = {"cospadi_plan": 1, "recipe": recipe.model_dump(mode="json"), "bytes": plan.bytes, "groups": groups}
    try:
        write_whole(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"plan {path} cannot be written: {error.strerror}") from None


def check_plan_file(path: Path) -> None:
    """Refuse a name that no plan can be written to, before anything is computed."""
    check_name(path, "plan")
    if path.is_dir():
        raise UserError(f"plan {path} is a folder. Name a file")
    if path.exists() and not path.is_file():
        raise UserError(f"plan {path} is no regular file. Name another")
    if path.exists() and path.stat().st_size:
        try:
            _read_json(path)
        except UserError:
            raise UserError(f"plan {path} is there already and is no plan. Name another file") from None
    if not path.parent.is_dir():
        raise UserError(f"plan {path} cannot be written: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"plan {path} cannot be written: no permission in {path.parent}")


FIXED_BY_PLAN = (
    *("ratio", "bits", "method", "solver", "accounting", "value_bits", "rho", "allocate", "metric", "share", "refine"),
    *("include", "exclude", "target"),
)
"""Recipe fields that a plan follows from; the others only say how it is carried out."""


def read_plan_recipe(path: Path, **overrides: Any) -> Recipe:
    """The recipe that a saved plan belongs to, with fields replaced by those of `overrides`.

    Raises:
        UserError: a missing or malformed file, or an override that would change the plan.
    """
    for name in FIXED_BY_PLAN:
        if name in overrides:
            raise UserError(
                f"--{name.replace('_', '-')} would change the plan that {path} holds. Leave it out, or make another "
                "plan with cospadi plan MODEL --measure FILE"
            )
    fields = _read_json(path)["recipe"]
    try:
        recipe = Recipe.build(fields)
    except UserError as error:
        raise UserError(f"plan {path}: {error}") from None
    return Recipe.build(recipe, **overrides)


def read_plan(path: Path, selected: Sequence[Projection], recipe: Recipe) -> Plan:
    """A saved plan, for a model with these selected projections and the recipe it is to be followed with.

    Raises:
        UserError: a missing or malformed file, or one made for another model; `check_plan` tells the rest.
    """
    own = read_plan_recipe(path)
    for name in FIXED_BY_PLAN:
        if getattr(own, name) != getattr(recipe, name):
            raise UserError(f"plan {path} was made with {name} {getattr(own, name)}, not {getattr(recipe, name)}")
    by_name = {projection.name: projection for projection in selected}
    groups = []
    for entry in _read_json(path)["groups"]:
        unknown = [name for name in entry["members"] if name not in by_name]
        if unknown:
            raise UserError(f"plan {path} names {unknown[0]}, which is not among the model's selected projections")
        group = _stored_group(tuple(by_name[name] for name in entry["members"]), entry)
        if group is None or group.parts.total != entry["bytes"]:
            raise UserError(
                f"plan {path}: the bytes of {entry['members'][0]} do not follow from its sizes. The plan is damaged or "
                "for another model: make it again"
            )
        groups.append(group)
    return Plan(tuple(groups))


def check_plan(plan: Plan, uniform: Plan, recipe: Recipe) -> None:
    """Refuse a plan that does not carry out a recipe.

    Args:
        uniform: the plan that gives each group of the recipe the same ratio.

    Raises:
        UserError: other groups, more bytes than the recipe leaves, or what the recipe's solver does not give.
    """
    wanted = [tuple(member.name for member in group.members) for group in uniform.groups]
    planned = [tuple(member.name for member in group.members) for group in plan.groups]
    strange = [names for names in planned if names not in wanted] + [names for names in wanted if names not in planned]
    if strange or len(planned) != len(wanted):
        names = ", ".join(sorted(min(strange or planned, key=min)))
        raise UserError(f"the plan is for another model, selection or --share: the group {names} is not in both")
    if plan.bytes > max(uniform.bytes, accounting.byte_budget(recipe.ratio, 1, [plan.dense_bytes // 2])):
        raise UserError(f"the plan takes {plan.bytes:,} bytes, more than ratio {recipe.ratio:g} leaves")
    forms, free = forms_of(recipe), find_solver(recipe.solver).free_support
    form = forms[0]
    for group in plan.compressed:
        if free:
            most = accounting.most_nonzeros(group.d2s, group.k)
            fits = group.nonzeros <= most and group.nonzeros % accounting.VALUE_UNIT == 0
        else:
            fits = not form.support_kind.chosen or group.nonzeros % sum(group.d2s) == 0
        if group.layout != form.layout or not fits:
            raise UserError(f"the plan is not for solver {recipe.solver}: {group.members[0].name} does not fit it")
        if group.form not in forms:
            raise UserError(
                f"the plan stores values of {group.members[0].name} as {group.values}; the recipe asks for "
                + " or ".join(form.values for form in forms)
            )


def _stored_group(members: tuple[Projection, ...], entry: dict[str, Any]) -> Group | None:
    """A group from its entry; None where the sizes are impossible."""
    d2s, k, nonzeros = [member.d2 for member in members], entry["k"], entry["nonzeros"]
    form = find_form(entry["layout"], entry["values"])
    if form is None:
        return dense_group(members) if (k, nonzeros) == (0, 0) else None
    if any(member.d1 != members[0].d1 for member in members) or k < 1:
        return None
    if form.dictionary_kind.atoms(members[0].d1) not in (None, k):
        return None
    if form.codec.coded:
        return coded_group(members, form, entry["bytes"]) if nonzeros == 0 else None
    if not form.support_kind.chosen:
        return even_group(members, form, k, k) if nonzeros == 0 else None
    if not 1 <= nonzeros <= k * sum(d2s):
        return None
    s, rest = divmod(nonzeros, sum(d2s))
    even = even_group(members, form, k, s)
    if rest == 0 and even.parts.total == entry["bytes"]:  # every column has s, and each member pads its own bytes
        return even
    return None if nonzeros % accounting.VALUE_UNIT else free_group(members, form, k, nonzeros)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"plan {path} does not exist. Make it with cospadi plan MODEL --measure FILE") from None
    except (OSError, ValueError, RecursionError) as error:  # numbers and nesting have limits, too
        raise UserError(f"plan {path} cannot be read: {' '.join(str(error).split())}") from None
    groups = content.get("groups") if isinstance(content, dict) and content.get("cospadi_plan") == 1 else None
    if not isinstance(groups, list) or not isinstance(content.get("recipe"), dict) or not all(map(_complete, groups)):
        raise UserError(f"{path} is not a plan that cospadi plan --measure wrote")
    found: dict[str, Any] = content
    return found


def _complete(entry: object) -> bool:
    """Whether a group's entry has every field, of the right type."""
    return (
        isinstance(entry, dict)
        and set(entry) == set(PLAN_FIELDS)
        and isinstance(entry["members"], list)
        and len(entry["members"]) > 0
        and all(isinstance(name, str) for name in entry["members"])
        and all(type(entry[name]) is int for name in ("k", "nonzeros", "bytes"))
        and _is_known(entry["layout"], entry["values"])
    )


def _is_known(layout: object, values: object) -> bool:
    """Whether anything is stored so."""
    if layout == DENSE:
        return values is None
    return isinstance(layout, str) and isinstance(values, str) and find_form(layout, values) is not None


@dataclass(frozen=True)
class Outlook:
    """What compressing a model would do, told without its weights.

    Attributes:
        plan: groups, k, s and bytes.
        before, after: bytes of the whole checkpoint's tensors as stored; None where the headers do not tell.
        covered: what part of the model's parameters lies in projections that the ratio counts.
        left: what stays dense whatever the recipe, in sentences without a stop.
    """

    plan: Plan
    before: int | None
    after: int | None
    covered: float
    left: list[str]


def outlook(model: str | Path, recipe: Recipe, plan: Plan | None = None) -> Outlook:
    """Look ahead from a model's config and safetensors headers.

    Args:
        plan: a measured plan; None takes the one with a uniform budget.

    Raises:
        UserError: as `compress` would.
    """
    recipe = recipe.settled()
    skeleton, idle = load.load_skeleton(model, recipe.revision, recipe.text_only, recipe.merge_adapter), []
    if plan is None:
        selected = select(find_projections(skeleton.model), recipe.include, recipe.exclude, recipe.target)
        idle, owner = selected, owner_without_weights(skeleton.model, selected)
        selected = running(selected, owner)
        idle = [projection for projection in idle if projection.name not in owner]
        plan = make_plan(selected, recipe, owner)
    before = after = None
    if skeleton.sizes is not None:
        before = sum(skeleton.sizes.values())
        after = _bytes_after(skeleton.model, skeleton.sizes, plan, recipe.text_only)
        if recipe.text_only:
            before -= sum(skeleton.sizes[name] for name in skeleton.unknown)
    parameters = sum(parameter.numel() for parameter in skeleton.model.parameters())
    covered = sum(projection.d1 * projection.d2 for projection in plan.projections) / parameters
    return Outlook(plan, before, after, covered, what_stays_dense(skeleton.model, idle))


def _bytes_after(model: nn.Module, sizes: Mapping[str, int], plan: Plan, text_only: bool) -> int | None:
    """Bytes of a checkpoint's tensors once a plan is carried out; None where not all that it compresses is there.

    Args:
        sizes: tensor name -> bytes, by the checkpoint's names, which need not be the model's.
        text_only: what the model has no place for goes.
    """
    places, own = compat.places_in_model(model, sizes), model.state_dict()
    found = {name for place in places.values() for name in place.names}
    tied, ignored = compat.tied_weights(model), compat.not_saved(model)
    gone: Counter[str] = Counter()  # numbers of a tensor, of which experts may each hold a part
    for member in (member for group in plan.compressed for member in group.members):
        gone[parameter_of(member.name) or f"{member.name}.weight"] += member.d1 * member.d2
    if not gone.keys() <= found:
        return None
    gone |= {name: own[name].numel() for name in found if name in own and (name in ignored or tied.get(name) in found)}
    after = sum(group.parts.total for group in plan.compressed)
    for name, size in sizes.items():
        numbers = {one: own[one].numel() for one in places[name].names if one in own}
        left = sum(count - gone[one] for one, count in numbers.items())
        if numbers:
            after += size * left // sum(numbers.values())
        elif not text_only:
            after += size
    return after


def owner_without_weights(skeleton: nn.Module, selected: Sequence[Projection]) -> dict[str, str]:
    """`shared_inputs` of a model on the meta device; each reads its own where that fails."""
    try:
        with compat.fake_tensors():
            return shared_inputs(skeleton, selected)
    except Exception as error:  # a model that asks for a number may raise anything
        log.debug("no forward pass without weights: %s", error)
        log.warning(
            "which projections share a dictionary is only known once the weights are there: planned as --share none"
        )
        return {projection.name: projection.name for projection in selected}
