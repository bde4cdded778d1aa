"""What workers do: solve one group of projections, from its whitened problem to factors as they are stored.

Pure functions of what they are given, so that it does not matter in which process or on which machine they run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cospadi.budget.plan import Group, Plan
from cospadi.calibration.grams import Whitening
from cospadi.format import rans, rans_tables
from cospadi.format.codecs.ec import EC, block_rows, step_of
from cospadi.format.codecs.integers import INTEGERS, Integers
from cospadi.format.form import Form
from cospadi.format.schema import StoredProjection
from cospadi.jobs.ledger import Piece
from cospadi.model.projections import Projection
from cospadi.recipe import Recipe
from cospadi.solvers import (
    Coded,
    Coder,
    Factorization,
    Grid,
    IntegerCoder,
    MetricProblem,
    Problem,
    Solver,
    SolverOptions,
    find_solver,
)

log = logging.getLogger("cospadi")

SOLVER_MEMORY = {"cpu": 2**28, "cuda": 2**32}
"""Bytes that batched sparse coding may take. Fixed, not what is free, so that equal runs give equal bytes."""

Report = Callable[[float, str], None]
"""Told the fraction of a task that is done, and a short note."""


@dataclass(frozen=True)
class GroupProblem:
    """One group's problem: all that solving it takes.

    Attributes:
        recipe: settled.
        whitening: of its input.
        weight: W of its members side by side, (d1, sum of d2), in any dtype.
        costs: Gamma of its members side by side, a block of outputs each, float32 (width, width), or of a member the
            diagonal alone (d2,); None where nothing asks for it.
        device: where it is solved.
    """

    recipe: Recipe
    group: Group
    whitening: Whitening
    weight: Tensor
    costs: tuple[Tensor, ...] | None
    device: torch.device

    def on(self, device: torch.device) -> GroupProblem:
        """The same with its tensors on a device."""
        gram = self.whitening.gram
        return replace(
            self,
            whitening=self.whitening if gram is None else replace(self.whitening, gram=gram.to(device)),
            weight=self.weight.to(device),
            costs=None if self.costs is None else tuple(cost.to(device) for cost in self.costs),
        )


@dataclass(frozen=True)
class Packed:
    """A group's factors as they are stored, and what they are worth.

    Attributes:
        entries: each member's entry in config.json.
        tensors: full tensor names -> what is stored, on the CPU.
        errors: each member's relative error in the whitened metric, of the stored factors.
        shift: the diagonal shift of the Gram.
        losses: each member's price in the loss (`_losses`); empty where no gradients were taken.
    """

    entries: dict[str, StoredProjection]
    tensors: dict[str, Tensor]
    errors: dict[str, float]
    shift: float
    losses: dict[str, dict[str, float]] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON has it."""
        entries = {name: entry.model_dump() for name, entry in self.entries.items()}
        return {"entries": entries, "errors": self.errors, "shift": self.shift, "losses": self.losses}


def factorize(given: GroupProblem, report: Report) -> Packed:
    """Solve a group in full, and round its factors to what is stored."""
    given = given.on(given.device)
    first, iterations = given.group.members[0], given.recipe.iterations or 1
    short = f"{first.block}.{first.kind.rpartition('.')[2]}"

    def on_iteration(iteration: int, error: float) -> None:
        report(iteration / iterations, f"{short} T {iteration} error {error:.4f}")

    return pack(given, solve(given, iterations, on_iteration))


def solve(
    given: GroupProblem, iterations: int, on_iteration: Callable[[int, float], None] | None = None
) -> Factorization | Coded:
    """D and S of a group, D in the whitened metric; or its levels as they are stored."""
    recipe, group = given.recipe, given.group
    options = SolverOptions(
        iterations=iterations,
        update=recipe.update,
        tolerance=recipe.tolerance,
        seed=recipe.seed,
        memory_bytes=SOLVER_MEMORY["cuda" if given.weight.is_cuda else "cpu"],
        on_iteration=on_iteration,
    )
    solver = find_solver(recipe.solver)
    gram = given.whitening.gram
    if solver.identity:
        gram = None if gram is None else gram.float()
        problem = MetricProblem(given.weight.float(), gram, given.costs or (), tuple(group.d2s))
        size = told(solver, group.stored, group.nonzeros, group.parts.values)
        found: Factorization | Coded = solver.solve(problem, *size, options)
        return found
    # A = L W diag(w), w_j the root of F_j where outputs are weighed, else 1
    target = given.whitening.apply(given.weight)
    weights = torch.ones(target.shape[1], dtype=target.dtype, device=target.device)
    if given.costs is not None:
        weights = torch.cat([cost if cost.ndim == 1 else cost.diagonal() for cost in given.costs]).double().sqrt()
        weights = weights / weights.mean()
    target = target * weights
    scale = target.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    undo = None if gram is None else given.whitening.undo
    solution: Factorization = solver.solve(
        Problem((target / scale).float(), undo, tuple(group.d2s)),
        group.k,
        group.s if solver.free_support else round(group.s),
        options,
    )
    return replace(solution, coefficients=(solution.coefficients * (scale / weights)).to(solution.coefficients))


def told(solver: Solver, form: Form, nonzeros: int, nbytes: int) -> tuple[Any, ...]:
    """The size that a solver whose dictionary is the identity is told."""
    if solver.coded:
        return nbytes, coder()
    return (integer_coder(INTEGERS[form.values]),) if solver.integers else (nonzeros,)


def integer_coder(codec: Integers) -> IntegerCoder:
    """How integers are stored, for solvers."""

    def encode(levels: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        return codec.encode_levels(levels.T, scales.T, zeros.T)

    return IntegerCoder(2**codec.bits - 1, codec.group, codec.scale, encode)


def coder() -> Coder:
    """How levels are coded, for solvers."""

    def encode(levels: Tensor, unit: float, steps: Grid, widths: Grid) -> Tensor:
        return EC.encode_levels(levels.T.contiguous(), unit, *steps, *widths)

    return Coder(rans.NEXT, rans.bits_table(), rans_tables.LOW, lambda d1, d2: block_rows(d2, d1), step_of, encode)


def cost_of(group: Group) -> float:
    """What solving a group costs, in arbitrary units: products of its codes with a Gram of its atoms."""
    return sum(group.d2s) * group.k**2


def memory_of(group: Group) -> int:
    """Bytes that solving a group takes, roughly: A in two precisions, S and what follows it, L and the Grams of D."""
    d1, d2 = group.d1, sum(group.d2s)
    return 12 * d1 * d2 + 20 * group.k * d2 + 16 * (d1**2 + group.k**2)


def dense_weights(packed: Packed) -> dict[str, Tensor]:
    """The weights (d2, d1) that a group's stored factors stand for, float32."""
    weights = {}
    for name, entry in packed.entries.items():
        form, tensors = entry.form, packed.tensors
        values = form.codec.decode(tensors[f"{name}.{form.names.values}"], entry.values_shape)
        support = tensors.get(f"{name}.{form.names.support}")
        coefficients = form.support_kind.scatter(support, values, entry.d2, entry.k)
        atoms = form.dictionary_kind.decode(tensors.get(entry.dictionary_tensor))
        weights[name] = coefficients if atoms is None else coefficients @ atoms
    return weights


def pack(given: GroupProblem, solution: Factorization | Coded) -> Packed:
    """Undo the whitening, scale atoms to rms(x d) = 1 over the calibration tokens, round and pack; take levels as they
    are."""
    if isinstance(solution, Coded):
        return _pack_coded(given, solution)
    group, whitening, dictionary = given.group, given.whitening, solution.dictionary
    form, owner = group.stored, group.members[0]
    kind, codec = form.support_kind, form.numbers
    coefficients = solution.coefficients.double()
    if dictionary is not None:
        norms = torch.linalg.vector_norm(dictionary.double(), dim=0)
        atom_scale = torch.where(norms > 0, whitening.scale / norms, torch.ones_like(norms))
        coefficients = coefficients / atom_scale[:, None]
        dictionary = whitening.undo(dictionary.double() * atom_scale)
    if not torch.isfinite(coefficients).all() or (dictionary is not None and not torch.isfinite(dictionary).all()):
        raise RuntimeError(f"the solver returned numbers that are not finite for {owner.name}")
    coefficients = _saturate(coefficients).float()  # S (k, d2)
    stored_dictionary = form.dictionary_kind.encode(dictionary)
    atoms = form.dictionary_kind.decode(stored_dictionary)  # (k, d1)

    entries: dict[str, StoredProjection] = {}
    tensors: dict[str, Tensor | None] = {f"{owner.name}.{form.names.dictionary}": stored_dictionary}
    errors: dict[str, float] = {}
    losses: dict[str, dict[str, float]] = {}
    prices = _prices(given)
    start = 0
    for member in group.members:
        columns = slice(start, start + member.d2)
        start += member.d2
        chosen = None if solution.support is None else solution.support[:, columns].T.contiguous()
        values = kind.gather(chosen, coefficients[:, columns].T.contiguous())
        support, stored = kind.pack(chosen), codec.encode(values)
        tensors[f"{member.name}.{form.names.support}"] = support
        tensors[f"{member.name}.{form.names.values}"] = stored
        rounded = kind.scatter(support, codec.decode(stored, list(values.shape)), member.d2, group.k)
        approximation = rounded if atoms is None else rounded @ atoms
        energies = _energies(whitening, given.weight[:, columns], approximation.T)
        errors[member.name] = _relative_error(*energies)
        losses |= _losses(member, whitening.tokens, prices.get(member), *energies)
        nnz = values.numel() if kind.chosen else 0
        entries[member.name] = _entry(group, member, member if atoms is None else owner, nnz=nnz)
    cpu = {name: tensor.cpu() for name, tensor in tensors.items() if tensor is not None}
    assert sum(map(_nbytes, cpu.values())) == group.parts.total
    return Packed(entries, cpu, errors, 0.0 if atoms is None else whitening.shift, losses)


def _pack_coded(given: GroupProblem, solution: Coded) -> Packed:
    """Levels, as they are stored."""
    group, form = given.group, given.group.stored
    entries: dict[str, StoredProjection] = {}
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    losses: dict[str, dict[str, float]] = {}
    prices = _prices(given)
    weights = torch.split(given.weight, group.d2s, dim=1)
    for member, weight, found in zip(group.members, weights, solution.members, strict=True):
        tensors[f"{member.name}.{form.names.values}"] = found.code.cpu()
        energies = _energies(given.whitening, weight, found.weight)
        errors[member.name] = _relative_error(*energies)
        losses |= _losses(member, given.whitening.tokens, prices.get(member), *energies)
        nbytes = found.code.numel() if form.codec.coded else 0
        entries[member.name] = _entry(group, member, member, nbytes=nbytes)
    assert sum(map(_nbytes, tensors.values())) <= group.parts.total
    return Packed(entries, tensors, errors, 0.0, losses)


def _entry(group: Group, member: Projection, owner: Projection, **sizes: int) -> StoredProjection:
    """A member's entry in config.json, without what only the model knows; `sizes` are those that the solution has."""
    form = group.stored
    kinds = {"dictionary": form.dictionary, "support": form.support, "values": form.values}
    return StoredProjection(**kinds, d1=member.d1, d2=member.d2, k=group.k, owner=owner.name, **sizes)


def _energies(whitening: Whitening, weight: Tensor, approximation: Tensor) -> tuple[Tensor, Tensor]:
    """||X w_j||^2 and ||X (w_j - v_j)||^2 of every column, float64 (d2,)."""
    return whitening.energy(weight), whitening.energy(weight.double() - approximation.double())


def _relative_error(whole: Tensor, left: Tensor) -> float:
    """||X (W - V)|| / ||X W||, by `_energies`; 0 where both are."""
    of_all, of_error = float(whole.sum()), float(left.sum())
    return math.sqrt(of_error / of_all if of_all > 0 else of_error)


def _prices(given: GroupProblem) -> dict[Projection, Tensor]:
    """The diagonal of Gamma of each member, float64 (d2,); nothing where no gradients were taken, or the group reads
    only zeros."""
    if given.costs is None or given.whitening.gram is None:
        return {}
    diagonal = torch.cat([cost if cost.ndim == 1 else cost.diagonal() for cost in given.costs]).double()
    return dict(zip(given.group.members, torch.split(diagonal, given.group.d2s), strict=True))


def _losses(
    member: Projection, tokens: int, price: Tensor | None, whole: Tensor, left: Tensor
) -> dict[str, dict[str, float]]:
    """What a member costs the loss, in nats a token, to second order and output by output, 1/2 sum_j Gamma_jj
    ||X e_j||^2 / tokens: the error that it has, and one as large as all of its output."""
    if price is None:
        return {}
    of_error, of_all = (float((price.to(energy) * energy).sum()) / (2 * tokens) for energy in (left, whole))
    return {member.name: {"of_error": of_error, "of_all": of_all}}


def _saturate(values: Tensor) -> Tensor:
    largest = float(torch.finfo(torch.bfloat16).max)
    return values.clamp(-largest, largest)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def record(packed: Packed) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """A solved group as a piece of the ledger, and a line in the log."""
    entries = packed.entries.values()
    k, d2 = next(iter(entries)).k, sum(entry.d2 for entry in entries)
    size = f"k {k}, s {sum(entry.nnz for entry in entries) / d2:.4g}"
    if any(entry.form.codec.levels for entry in entries):
        nbytes = sum(tensor.numel() for tensor in packed.tensors.values())
        size = f"{8 * nbytes / (k * d2):.3f} bits"
    log.info("%s: %s, error %.4f", ", ".join(packed.entries), size, max(packed.errors.values()))
    return packed.record(), packed.tensors


def entries_of(piece: Piece) -> dict[str, StoredProjection]:
    """A solved group's entries in config.json."""
    return {name: StoredProjection.model_validate(entry) for name, entry in piece.record["entries"].items()}


def as_stored(plan: Plan, pieces: Sequence[Piece]) -> Plan:
    """A plan with the bytes that codes have really taken, which may be a few less than planned.

    Args:
        pieces: of its compressed groups.
    """
    taken = {name: entry.nbytes for piece in pieces for name, entry in entries_of(piece).items()}
    groups = [
        replace(group, parts=replace(group.parts, values=sum(taken[member.name] for member in group.members)))
        if group.form is not None and group.form.codec.coded
        else group
        for group in plan.groups
    ]
    return Plan(tuple(groups))


def packed_of(piece: Piece) -> Packed:
    """A solved group from its piece."""
    entries = entries_of(piece)
    own = {tensor for name, entry in entries.items() for tensor in entry.tensors(name)}
    tensors = {name: tensor for name, tensor in piece.tensors().items() if name in own}
    return Packed(entries, tensors, piece.record["errors"], piece.record["shift"], piece.record.get("losses", {}))
