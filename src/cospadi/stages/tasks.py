"""Groups' problems on their way through the workers, results on their way to the ledger."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from torch import Tensor

from cospadi.budget.plan import Group, Plan
from cospadi.format.form import DENSE_BITS
from cospadi.jobs.ledger import Piece
from cospadi.jobs.pool import Task
from cospadi.jobs.progress import Standing, peak_memory
from cospadi.stages.open import Job
from cospadi.stages.solve import as_stored, cost_of, dense_weights, packed_of


class Tasks:
    """One kind of task for each of some groups, whose results are pieces of the ledger.

    Used as a context: what still runs is ended where the block is left early.

    Args:
        stage: name of the progress bar, which shows how much of all groups is there.
        keys: group -> key of its piece.
        function: what workers call.
        keep: result -> record and tensors of the piece.
    """

    def __init__(
        self,
        job: Job,
        stage: str,
        keys: Mapping[Group, str],
        function: Callable[..., Any],
        keep: Callable[[Any], tuple[dict[str, Any], Mapping[str, Tensor] | None]],
    ) -> None:
        self.job, self.stage, self.keys, self.function, self.keep = job, stage, keys, function, keep
        self._total = sum(map(cost_of, keys))
        missing = set(self.missing())
        self._done = self._before = self._total - sum(map(cost_of, missing))
        self._begun = time.monotonic()
        self._first: int | None = None  # block that is solved in this run
        self._blocks = max((group.members[-1].block + 1 for group in keys), default=0)
        self._taken = self._planned = self._dense = self._projections = 0
        self._errors, self._losses = 0.0, list[float]()
        for group in keys:
            if group not in missing:
                self._count(group)
        self._running: dict[Future[Any], Group] = {}
        self._parts: dict[Group, float] = {}

    def missing(self) -> list[Group]:
        """Groups without a piece."""
        return [group for group, key in self.keys.items() if self.job.ledger.get(key) is None]

    def give(self, groups: Iterable[tuple[Group, Task]]) -> None:
        """Hand tasks to the workers, each as soon as there is room for it; results that are there go to the ledger.

        Args:
            groups: drawn one by one, so that only those that run are in memory.
        """
        for group, task in groups:
            with self.job.stages.stage(self.stage, self._total) as self._progress:

                def report(fraction: float, note: str, group: Group = group) -> None:
                    self._parts[group] = fraction * cost_of(group)
                    self._progress.reach(self._done + sum(self._parts.values()), note)  # in the bar that shows now

                report(0.0, "")
                self._running[self.job.pool.submit(self.function, task, report)] = group
                del task
                self._collect([future for future in self._running if future.done()])

    def finish(self) -> None:
        """Wait for all that was given."""
        if self._running:
            with self.job.stages.stage(self.stage, self._total) as self._progress:
                self._collect(list(self._running))

    def _collect(self, futures: list[Future[Any]]) -> None:
        for future in self.job.pool.completed(futures):
            group = self._running.pop(future)
            self.job.ledger.put(self.keys[group], *self.keep(future.result()))
            self._parts.pop(group, None)
            self._done += cost_of(group)
            self._progress.reach(self._done + sum(self._parts.values()), "")
            self._count(group)
            block = group.members[-1].block
            self._first = block if self._first is None else self._first
            known = block > self._first or not self.job.refines or self._done == self._total
            elapsed, fresh = time.monotonic() - self._begun, self._done - self._before
            self.job.stages.stand(
                Standing(
                    block=block + 1,
                    blocks=self._blocks,
                    error=self._errors / self._projections,
                    loss=sum(self._losses) if self._losses else None,
                    bits=DENSE_BITS * self._taken / self._dense,
                    bits_planned=DENSE_BITS * self._planned / self._dense,
                    seconds_left=elapsed * (self._total - self._done) / fresh if known else None,
                    peak_memory=peak_memory(),
                )
            )

    def _count(self, group: Group) -> None:
        """Add what a finished group is to what is known of all."""
        piece = self.job.ledger.get(self.keys[group])
        assert piece is not None
        (stored,) = as_stored(Plan((group,)), [piece]).groups
        self._taken += stored.parts.total
        self._planned += group.parts.total
        self._dense += group.dense_bytes
        self._errors += sum(piece.record["errors"].values())
        self._projections += len(piece.record["errors"])
        self._losses += [price["of_error"] for price in piece.record.get("losses", {}).values()]

    def pieces(self, groups: Sequence[Group]) -> list[Piece]:
        """The finished pieces of some groups, in their order."""
        found = [self.job.ledger.get(self.keys[group]) for group in groups]
        return [piece for piece in found if piece is not None]

    def weights(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """Layer name -> what its stored factors stand for, float32 (d2, d1), once all that was given is done."""
        self.finish()
        found: dict[str, Tensor] = {}
        for piece in self.pieces(groups):
            found |= dense_weights(packed_of(piece))
        return found

    def __enter__(self) -> Tasks:
        return self

    def __exit__(self, *_: object) -> None:
        self.job.pool.abandon(list(self._running))
        self.job.stages.stand(None)


def keys_of(key: str, groups: Sequence[Group]) -> dict[Group, str]:
    """Group -> the key of its piece, "key/first member"."""
    return {group: f"{key}/{group.members[0].name}" for group in groups}
