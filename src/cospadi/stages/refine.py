"""Values of a block tuned together, supports and dictionaries fixed, so that its output comes nearer the dense one's.

Projections were solved one by one, each by second-order rules of its own. Here the block itself is run, on what the
model compressed so far gives it, and the stored values of all its projections follow the gradient of

    mean over tokens of sum_j c_j (y'_j - y_j)^2

with y the block's output in the dense model, y' its own, and c_j the mean square of the loss's gradient at the output
(1 where no gradients were taken), by Adam (Kingma and Ba 2015) with a cosine schedule. Of the states on the way the one
with the lowest error on sequences that were set aside is kept, the first one among them, so that a block never gets
worse.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cospadi.budget.plan import Group
from cospadi.calibration.gradients import deterministic, no_parameter_gradients
from cospadi.calibration.walk import Calls, Flow, call
from cospadi.format.schema import StoredProjection
from cospadi.jobs.ledger import Piece
from cospadi.stages.costs import Costs
from cospadi.stages.measure import WalkedBlock
from cospadi.stages.open import Job
from cospadi.stages.solve import Packed, dense_weights, packed_of

log = logging.getLogger("cospadi")

STEP_TOKENS = 1024
"""Tokens that a step's gradient is taken on, or one sequence where that has more."""
LEARNING_RATE = 0.15
"""Largest step of a value, in root mean squares of the values of its projection times the relative error of the block's
output (the root of its square): what is nearly right is to be moved little."""
FASTEST = 2e-2
"""Largest step of a value, in root mean squares."""
WARM_UP = 5
"""Steps over which the learning rate rises."""
HELD_OUT = 8
"""One in so many batches of sequences is set aside to choose the best state by."""
CHECKS = 3
"""Times that this is done after the start."""
BETAS = (0.9, 0.95)


@dataclass
class Refinement:
    """The refined blocks of a job, a piece of the ledger each."""

    job: Job
    costs: Costs | None

    def missing(self, groups: Sequence[Group]) -> list[Group]:
        """Groups whose block is not refined yet."""
        return [group for group in groups if self.job.ledger.get(_key(group.members[0].block)) is None]

    def refine(self, block: WalkedBlock, pieces: Sequence[Piece]) -> dict[str, Tensor]:
        """Tune the values of a block's groups, unless an earlier run has.

        Args:
            pieces: its groups as they were solved.

        Returns:
            Layer name -> the weight (d2, d1) that it now has.
        """
        if not pieces:  # nothing of this block is compressed
            return {}
        job, index, name = self.job, block.index, block.name
        piece = job.ledger.get(_key(index))
        if piece is None:
            block.pass_dense()
            assert job.calls is not None
            costs = None if self.costs is None else self.costs.of_block(index, name)
            steps = job.recipe.refine or 0
            with job.stages.stage("refine", block.count * steps) as progress:
                progress.reach(index * steps, f"block {index + 1} of {block.count}")
                packed, errors = refine_block(
                    name, block.module, index, job.calls, block.compressed.flow, block.dense.flow,
                    [packed_of(piece) for piece in pieces], costs, steps, job.recipe.seed, progress.advance,
                )  # fmt: skip
            log.info("refined block %d: error of its output %.3e, was %.3e", index + 1, errors[1], errors[0])
            tensors = {full: tensor for group in packed for full, tensor in group.tensors.items()}
            piece = job.ledger.put(
                _key(index), {"groups": [group.record() for group in packed], "errors": list(errors)}, tensors
            )
        return {layer: weight for part in _split(piece) for layer, weight in dense_weights(packed_of(part)).items()}

    def pieces(self, groups: Sequence[Group]) -> list[Piece]:
        """The refined groups, in the order of the blocks."""
        found = []
        for index in sorted({group.members[0].block for group in groups}):
            piece = self.job.ledger.get(_key(index))
            assert piece is not None
            found += _split(piece)
        return found


def _split(piece: Piece) -> list[Piece]:
    """A block's piece as one a group."""
    return [replace(piece, record=record) for record in piece.record["groups"]]


def _key(index: int) -> str:
    return f"refined/{index:04}"


@dataclass
class _Part:
    """A projection's values on their way: S transposed, float32 (d2, k), with zeros outside its support.

    Attributes:
        chosen: 1 on the support, in the same shape; None where all of S is stored.
        atoms: D transposed, float32 (k, d1); None for I.
    """

    entry: StoredProjection
    codes: Tensor
    chosen: Tensor | None
    atoms: Tensor | None

    def weight(self, dtype: torch.dtype) -> Tensor:
        """W (d2, d1) as it will be stored; gradients pass the rounding as if it were not there (Bengio 2013)."""
        rounded = self.entry.form.numbers.rounded(self.codes.detach())
        codes = self.codes + (rounded - self.codes.detach())
        codes = codes if self.chosen is None else codes * self.chosen
        return (codes if self.atoms is None else codes @ self.atoms).to(dtype)


def refine_block(
    name: str,
    block: nn.Module,
    index: int,
    calls: Calls,
    inputs: Flow,
    wanted: Flow,
    packed: Sequence[Packed],
    costs: Tensor | None,
    steps: int,
    seed: int,
    on_step: Callable[[float], None],
) -> tuple[list[Packed], tuple[float, float]]:
    """Tune the values of a block's groups.

    Args:
        name: of the block, which is in memory. index: of it.
        calls: how blocks are called.
        inputs: the text before the block in the model compressed so far. wanted: after it in the dense model.
        packed: the block's groups.
        costs: c (width,); None for ones.
        steps: of Adam. seed: of the order of the text. on_step: called with 1 after each.

    Returns:
        The groups with their values anew, as they are stored; the error on what was set aside, in that of an output of
        zeros, before and after.
    """
    device = inputs.device
    parts = {item: part for group in packed for item, part in _parts(group, device).items()}
    costs = None if costs is None else costs.to(device)
    kept = max(1, len(inputs) // HELD_OUT) if len(inputs) > 1 else 0
    held_out = range(len(inputs) - kept, len(inputs)) if kept else range(1)
    rows, length = inputs[0].shape[:2]
    training = [(batch, row) for batch in range(max(1, len(inputs) - kept)) for row in range(rows)]
    size = min(max(1, STEP_TOKENS // length), len(training))

    def weights() -> dict[str, Tensor]:
        dtype = next(block.parameters()).dtype
        return {f"{item.removeprefix(f'{name}.')}.weight": part.weight(dtype) for item, part in parts.items()}

    def error(hidden: Tensor, target: Tensor, replaced: Mapping[str, Tensor]) -> Tensor:
        output = call(lambda *a, **k: functional_call(block, dict(replaced), a, k), index, calls, hidden)
        return weighed_square(output.float() - target.float(), costs)

    @torch.no_grad()
    def checked() -> float:
        replaced = weights()
        return float(sum(error(inputs[batch], wanted[batch], replaced) for batch in held_out))

    with torch.no_grad():
        largest = float(sum(weighed_square(wanted[batch].float(), costs) for batch in held_out))
        unit = largest / sum(wanted[batch].shape[0] * wanted[batch].shape[1] for batch in held_out) or 1.0
    values = [part.codes for part in parts.values()]
    device = values[0].device
    with torch.inference_mode(False), torch.enable_grad(), no_parameter_gradients(block), deterministic(device):
        for value in values:
            value.requires_grad_()
        best, first = [value.detach().clone() for value in values], checked()
        lowest = first
        pace = min(FASTEST, LEARNING_RATE * math.sqrt(first / largest)) if largest > 0 else 0.0
        rates = [pace * _rms(part) for part in parts.values()]
        groups = [{"params": [value], "lr": rate} for value, rate in zip(values, rates, strict=True)]
        optimizer = torch.optim.Adam(groups, betas=BETAS, eps=1e-12)
        generator = torch.Generator().manual_seed(seed)
        order: list[tuple[int, int]] = []
        for step in range(1, steps + 1):
            if len(order) < size:  # the text once again, in another order
                order += [training[place] for place in torch.randperm(len(training), generator=generator)]
            chosen, order = order[:size], order[size:]
            fraction = min(1.0, step / WARM_UP) * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * fraction
            optimizer.zero_grad()
            tuned = weights()
            leaves = {item: weight.detach().requires_grad_() for item, weight in tuned.items()}
            for batch, row in chosen:
                one = slice(row, row + 1)
                loss = error(inputs[batch][one], wanted[batch][one], leaves)
                if loss.requires_grad:  # some projection of the block has run
                    (loss / (unit * length * len(chosen))).backward()  # type: ignore[no-untyped-call]
            for item, weight in tuned.items():
                if leaves[item].grad is not None:
                    weight.backward(leaves[item].grad)  # type: ignore[no-untyped-call]
            optimizer.step()
            on_step(1)
            if step % math.ceil(steps / CHECKS) == 0 or step == steps:
                now = checked()
                if now < lowest:
                    lowest, best = now, [value.detach().clone() for value in values]
    for part, value in zip(parts.values(), best, strict=True):
        part.codes = value
    relative = (first / largest, lowest / largest) if largest > 0 else (0.0, 0.0)
    return [_packed(group, parts) for group in packed], relative


def weighed_square(error: Tensor, costs: Tensor | None) -> Tensor:
    """The sum over tokens of c_j e_j^2, for errors e (..., width)."""
    return (error.square() if costs is None else error.square() * costs).sum()


def _parts(packed: Packed, device: torch.device) -> dict[str, _Part]:
    parts = {}
    for name, entry in packed.entries.items():
        form, tensors = entry.form, packed.tensors
        support = tensors.get(f"{name}.{form.names.support}")
        codes = form.codec.decode(tensors[f"{name}.{form.names.values}"], entry.values_shape)
        chosen = form.support_kind.unpack(support, entry.k)
        atoms = form.dictionary_kind.decode(tensors.get(entry.dictionary_tensor))
        parts[name] = _Part(
            entry,
            form.support_kind.scatter(support, codes, entry.d2, entry.k).to(device).clone(),
            None if chosen is None else chosen.to(device, torch.float32),
            None if atoms is None else atoms.to(device),
        )
    return parts


def _rms(part: _Part) -> float:
    """Root mean square of the stored values."""
    return float((part.codes.detach().square().sum(dtype=torch.float64) / max(1, part.entry.count)).sqrt())


def _packed(packed: Packed, parts: Mapping[str, _Part]) -> Packed:
    tensors = dict(packed.tensors)
    for name, entry in packed.entries.items():
        part, form = parts[name], entry.form
        chosen = None if part.chosen is None else part.chosen.bool().cpu()
        values = form.support_kind.gather(chosen, part.codes.detach().cpu())
        tensors[f"{name}.{form.names.values}"] = form.numbers.encode(values)
    return replace(packed, tensors=tensors)
