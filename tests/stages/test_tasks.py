"""Groups' problems on their way through workers that report when they like."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from cospadi.budget.plan import Group
from cospadi.format.form import Parts
from cospadi.jobs.ledger import Ledger
from cospadi.jobs.pool import Task
from cospadi.jobs.progress import Stages
from cospadi.model.projections import Projection
from cospadi.stages.tasks import Tasks, keys_of


class Late:
    """A pool whose tasks are done when they are waited for, and all report then, those given long ago too."""

    def __init__(self) -> None:
        self.reports: list[Any] = []

    def submit(self, function: Any, task: Task, report: Any) -> Future[Any]:
        self.reports.append(report)
        future: Future[Any] = Future()
        future.set_result(function(*task.payload))
        return future

    def completed(self, futures: Iterable[Future[Any]]) -> Iterator[Future[Any]]:
        for report in self.reports:
            report(0.5, "half")
        yield from futures

    def abandon(self, futures: Any) -> None:
        assert not futures


def record(number: int) -> dict[str, Any]:
    return {"entries": {}, "errors": {f"p{number}": 0.1 * number}}


def test_what_a_task_reports_late_is_shown_in_the_bar_of_now() -> None:
    groups = [Group((Projection(f"p{n}", 0, "p", 4, 4),), None, 4, 0, Parts(0, 0, 0)) for n in range(3)]
    stages = Stages(Console(file=io.StringIO(), force_terminal=True))
    job: Any = SimpleNamespace(stages=stages, ledger=Ledger(), pool=Late(), refines=False)
    with (
        stages.shown(),
        Tasks(job, "solve", keys_of("factors", groups), lambda n: n, lambda n: (record(n), None)) as tasks,
    ):
        for number, group in enumerate(groups):
            tasks.give([(group, Task((number,)))])
        tasks.finish()
    assert [piece.record for piece in tasks.pieces(groups)] == [record(0), record(1), record(2)]
