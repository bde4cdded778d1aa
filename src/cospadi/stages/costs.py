"""What errors at the outputs of projections cost in the loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from cospadi.budget.plan import Group
from cospadi.calibration.gradients import (
    INPUT,
    NOISE,
    PIVOT,
    conditioned,
    diagonal_of,
    gradient_grams,
    gradient_grams_by_blocks,
)
from cospadi.errors import UserError
from cospadi.jobs.ledger import Ledger
from cospadi.model.projections import Projection, kinds_of
from cospadi.stages.open import Job
from cospadi.stages.text import check_text


@dataclass(frozen=True)
class Costs:
    """Gamma of every selected projection, a piece of the ledger for each block.

    Attributes:
        key: begins the keys of these pieces.
        of_kind: kind, experts taken together -> the mean over its projections of the mean diagonal, of those that
            tokens reached.
    """

    ledger: Ledger
    key: str
    of_kind: Mapping[str, float]

    def of(self, group: Group) -> tuple[Tensor, ...]:
        """Gamma of a group's members side by side, as solvers take them: blocks of outputs, float32 on the CPU."""
        found: list[Tensor] = []
        for member in group.members:
            gamma = self._read(member.block, member.name)
            noise = None if gamma.ndim == 1 else self._read(member.block, f"{member.name}{NOISE}")
            found += conditioned(gamma, noise, member.d2, self._instead(member))
        return tuple(found)

    def diagonals(self, member: Projection) -> tuple[Tensor, Tensor]:
        """E[x_i^2] of a projection's inputs (d1,) and the diagonal of its Gamma (d2,), float32."""
        diagonal = diagonal_of(self._read(member.block, member.name), member.d2)
        (outputs,) = conditioned(diagonal, None, member.d2, self._instead(member))
        return self._read(member.block, f"{member.name}{INPUT}"), outputs

    def pivots(self, index: int, reader: str) -> Tensor:
        """The pivots of inputs (d1,), float32, by the projection of that block that is the first to read them."""
        return self._read(index, f"{reader}{PIVOT}")

    def of_block(self, index: int, name: str) -> Tensor:
        """The diagonal of Gamma (width,) of the output of a block of that name, in a model whose blocks follow each
        other."""
        diagonal = self._read(index, name)
        return conditioned(diagonal, None, len(diagonal), 1.0)[0]

    def _read(self, index: int, name: str) -> Tensor:
        piece = self.ledger.get(_key(self.key, index))
        assert piece is not None
        return piece.tensors({name})[name]

    def _instead(self, member: Projection) -> float:
        """The mean diagonal that stands for that of a projection that no token has reached."""
        means = self.of_kind.values()
        return self.of_kind.get(kinds_of([member.kind]), sum(means) / len(means) if means else 1.0)


def estimate_costs(job: Job) -> Costs:
    """Take gradients of the loss, in the dense model, on the first of the calibration sequences."""
    projections, ledger = job.uniform.projections, job.calibrated
    full, pivots = job.recipe.metric == "two-sided", job.recipe.spreads_levels
    key = "gradients" + ("-two-sided" if full else "-pivots" if pivots else "")
    kinds, pieces = ledger.get(key), [ledger.get(_key(key, index)) for index in sorted({p.block for p in projections})]
    if kinds is None or None in pieces:
        text, readers = check_text(job), {job.owner[p.name] for p in projections} if pivots else set()
        means: dict[str, list[float]] = {}
        with job.stages.stage("gradients", len(text)) as progress:
            if job.calls is None:
                whole = gradient_grams(job.blocks.model, projections, text, full, progress.advance, readers)
                by_block = _by_block(whole, projections)
            else:
                by_block = gradient_grams_by_blocks(
                    job.blocks, job.calls, projections, text, full, job.spill, progress.advance, readers
                )
            for index, gammas in by_block:
                for p in (p for p in projections if p.block == index):
                    mean = float(diagonal_of(gammas[p.name], p.d2).mean())
                    if not math.isfinite(mean):
                        raise UserError(
                            f"the gradient at the output of {p.name} is not finite on the calibration text. "
                            "Load the model in bf16 or float32, or use --metric output, which needs none"
                        )
                    if mean:
                        means.setdefault(kinds_of([p.kind]), []).append(mean)
                ledger.put(_key(key, index), {}, {name: gamma.cpu() for name, gamma in gammas.items()})
        kinds = ledger.put(key, {kind: sum(some) / len(some) for kind, some in means.items()})
    return Costs(ledger, key, kinds.record)


def _by_block(
    whole: Mapping[str, Tensor], projections: Sequence[Projection]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    for index in sorted({p.block for p in projections}):
        names = [f"{p.name}{suffix}" for p in projections if p.block == index for suffix in ("", INPUT, NOISE, PIVOT)]
        yield index, {name: whole[name] for name in names if name in whole}


def _key(key: str, index: int) -> str:
    return f"{key}/{index:04}"
