"""What a long job tells while it runs: rich bars on a terminal, log lines in a pipe, JSON lines for programs."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

log = logging.getLogger("cospadi")

OFTEN = 0.5
"""Seconds between two events of a stage."""

SELDOM = 30.0
"""Seconds between two log lines of a stage, and before the first one: what takes less time says nothing."""

Emit = Callable[[dict[str, Any]], None]
"""Takes an event: a mapping that JSON can hold, whose "event" says what it is."""


@dataclass(frozen=True)
class Standing:
    """Where a job stands while its groups are solved.

    Attributes:
        block: number of the last block of which a group is solved, from 1.
        blocks: how many there are.
        error: mean relative error of the projections so far.
        loss: what their errors cost in the loss, in nats a token to second order; None where no gradients were taken.
        bits: a weight that these take, all told.
        bits_planned: what the plan gives them.
        seconds_left: until all groups are solved, at the pace so far, earlier blocks' refinement included; None as long
            as nobody knows what that takes.
        peak_memory: largest resident set of this process, in bytes; None where the system does not tell.
    """

    block: int
    blocks: int
    error: float
    loss: float | None
    bits: float
    bits_planned: float
    seconds_left: float | None
    peak_memory: int | None

    def __str__(self) -> str:
        parts = [
            f"block {self.block} of {self.blocks}",
            *([] if self.seconds_left is None else [f"{hours(self.seconds_left)} left to solve"]),
            f"error so far {self.error:.4f}" + ("" if self.loss is None else f", {self.loss:.4f} nats"),
            f"{self.bits:.2f} bits a weight, planned {self.bits_planned:.2f}",
        ]
        return " · ".join([*parts, *memory_told(self.peak_memory)])


class _Left(TimeRemainingColumn):
    """The time left, as the stage tells it, or else at the pace so far."""

    def render(self, task: Task) -> Text:
        left = task.fields["left"]
        return super().render(task) if left is None else Text(hours(left), "progress.remaining")


class _Bars(Progress):
    """Bars, and a line below them."""

    below = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.below:
            yield Text(self.below, no_wrap=True, overflow="ellipsis")


class Stages:
    """Times each stage of a job and shows its progress.

    Attributes:
        seconds: stage name -> seconds spent in it so far, less those of stages within it.
    """

    def __init__(self, console: Console | None = None, emit: Emit | None = None) -> None:
        """Bars on `console`, or events for `emit`; log lines where both are None."""
        self.seconds: dict[str, float] = {}
        self._within = 0.0  # seconds of the stages that ended inside the current one
        self._emit, self._block = emit, 0
        self._told: dict[str, float] = {}
        self._bars: _Bars | None = None
        if console is not None:
            self._bars = _Bars(
                TextColumn("{task.description:<9}"),
                BarColumn(bar_width=14),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
                TextColumn("left"),
                _Left(),
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
        stage = Stage(name, total, self._bars, self._emit, self._told)
        try:
            yield stage
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - self._within
            self._within = before + elapsed
            stage.close()

    def stand(self, standing: Standing | None) -> None:
        """Show where the job stands, in the log once a block; None where it stands nowhere any more."""
        if standing is None:
            self._block = 0
        if self._bars is not None:
            self._bars.below = "" if standing is None else str(standing)
        elif standing is None:
            pass
        elif self._emit is not None:
            self._emit({"event": "standing"} | asdict(standing))
        elif standing.block > self._block:
            self._block = standing.block
            log.info("%s", standing)


class Stage:
    """Progress within one stage."""

    def __init__(
        self, name: str, total: float, bars: Progress | None, emit: Emit | None, told: dict[str, float]
    ) -> None:
        """`told` is when each stage's last event was, in seconds."""
        self.name, self.total, self.done = name, total, 0.0
        self._bars, self._emit, self._note, self._told, self._moves = bars, emit, "", told, False
        self._left: float | None = None
        self._logged = time.monotonic()
        self._task = bars.add_task(name, total=total, note="", left=None) if bars else None

    def advance(self, amount: float, note: str | None = None) -> None:
        """So many more units are done; `note` is shown beside the bar until there is another."""
        self.done += amount
        self._moves = True
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, advance=amount)
            if note is not None:
                self._bars.update(self._task, note=note)
        self._note = self._note if note is None else note
        self._tell()

    def reach(self, done: float, note: str | None = None, left: float | None = None) -> None:
        """So many units are done in all; `left` are the seconds that the others will take, where the caller knows."""
        self._left = left
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, left=left)
        self.advance(done - self.done, note)

    def close(self) -> None:
        """Take the bar away; a stage that never said how far it was is done."""
        if self._bars is not None and self._task is not None:
            self._bars.remove_task(self._task)
        if not self._moves:
            self.done = self.total
        self._tell()

    def _tell(self) -> None:
        """Emit an event, unless there was one just now; the end of a stage is always told. Without events and bars, a
        log line now and then."""
        now, done = time.monotonic(), min(1.0, self.done / self.total) if self.total else 1.0
        if self._emit is None:
            if self._bars is None and now - self._logged >= SELDOM and done < 1.0:
                self._logged = now
                left = "" if self._left is None else f", {hours(self._left)} left"
                log.info("%s: %.0f %%%s%s", self.name, 100 * done, left, self._note and f" · {self._note}")
            return
        if now - self._told.get(self.name, -OFTEN) >= OFTEN or done == 1.0:
            self._told[self.name] = now
            told = {"stage": self.name, "done": round(done, 4), "note": self._note, "seconds_left": self._left}
            self._emit({"event": "stage", **told})


def emit_lines(event: dict[str, Any]) -> None:
    """An event as a line of JSON on stderr."""
    sys.stderr.write(json.dumps(event) + "\n")
    sys.stderr.flush()


def peak_memory() -> int | None:
    """The largest resident set of this process so far, in bytes; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def free_memory() -> int:
    """Bytes that this process may still allocate: what the system has, and what its control group is allowed."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # "max" is no number
            root = Path("/sys/fs/cgroup")
            free = min(free, int((root / limit).read_text()) - int((root / used).read_text()))
    return max(0, free)


def memory_told(nbytes: int | None) -> list[str]:
    """The largest resident set, for reading; nothing where it is not known."""
    return [] if nbytes is None else [f"memory up to {decimal(nbytes)}"]


def hours(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


class _PlainLines(logging.Formatter):
    """One line a fact; what is more than information says so first."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        return text if record.levelno == logging.INFO else f"{record.levelname.lower()}: {text}"


class _Events(logging.Handler):
    """The log as events."""

    def emit(self, record: logging.LogRecord) -> None:
        emit_lines({"event": "log", "level": record.levelname.lower(), "message": record.getMessage()})


def log_to(console: Console, bars: bool, events: bool = False) -> None:
    """Send the package's log to a console: warnings only beside bars, a line a step without them, or a line of JSON."""
    handler: logging.Handler
    if events:
        handler = _Events()
    elif bars:
        handler = RichHandler(console=console, show_time=False, show_path=False, markup=False)
    else:
        handler = logging.StreamHandler(console.file)
        handler.setFormatter(_PlainLines())
    log.handlers = [handler]
    log.setLevel(logging.WARNING if bars else logging.INFO)
    log.propagate = False
