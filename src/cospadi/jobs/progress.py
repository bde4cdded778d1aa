"""What a long job tells while it runs: rich bars on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

log = logging.getLogger("cospadi")


class Stages:
    """Times each stage of a job and shows its progress.

    Attributes:
        seconds: stage name -> seconds spent in it so far, less those of stages within it.
    """

    def __init__(self, console: Console | None = None) -> None:
        """Bars on `console`; log lines where it is None."""
        self.seconds: dict[str, float] = {}
        self._within = 0.0  # seconds of the stages that ended inside the current one
        self._bars: Progress | None = None
        if console is not None:
            self._bars = Progress(
                TextColumn("{task.description:<9}"),
                BarColumn(bar_width=14),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
                console=console,
                transient=True,
                expand=True,
            )

    @contextmanager
    def shown(self) -> Iterator[Stages]:
        """Bars live inside this block."""
        if self._bars is None:
            yield self
        else:
            with self._bars:
                yield self

    @contextmanager
    def stage(self, name: str, total: float) -> Iterator[Stage]:
        """One stage of `total` units; entered again, its time adds up and its bar restarts."""
        start, before, self._within = time.perf_counter(), self._within, 0.0
        stage = Stage(name, total, self._bars)
        try:
            yield stage
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - self._within
            self._within = before + elapsed
            stage.close()


class Stage:
    """Progress within one stage."""

    def __init__(self, name: str, total: float, bars: Progress | None) -> None:
        self.name, self.total, self.done = name, total, 0.0
        self._bars = bars
        self._task = bars.add_task(name, total=total, note="") if bars else None

    def advance(self, amount: float, note: str | None = None) -> None:
        """So many more units are done; `note` is shown beside the bar until there is another."""
        self.done += amount
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, advance=amount)
            if note is not None:
                self._bars.update(self._task, note=note)

    def reach(self, done: float, note: str | None = None) -> None:
        """So many units are done in all."""
        self.advance(done - self.done, note)

    def close(self) -> None:
        """Take the bar away."""
        if self._bars is not None and self._task is not None:
            self._bars.remove_task(self._task)


class _PlainLines(logging.Formatter):
    """One line a fact; what is more than information says so first."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        return text if record.levelno == logging.INFO else f"{record.levelname.lower()}: {text}"


def log_to(console: Console, bars: bool) -> None:
    """Send the package's log to a console: warnings only beside bars, a line a step without them."""
    handler: logging.Handler
    if bars:
        handler = RichHandler(console=console, show_time=False, show_path=False, markup=False)
    else:
        handler = logging.StreamHandler(console.file)
        handler.setFormatter(_PlainLines())
    log.handlers = [handler]
    log.setLevel(logging.WARNING if bars else logging.INFO)
    log.propagate = False
