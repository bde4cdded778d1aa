"""Times of stages, and what a job tells."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from cospadi.jobs.progress import Stages, Standing


def test_time_of_a_stage_within_another_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock: Iterator[float] = iter([0.0, 1.0, 3.0, 4.0, 8.0, 9.0])  # a( 1 b( 2 ) 1 b( 4 ) 1 )
    monkeypatch.setattr("cospadi.jobs.progress.time.perf_counter", lambda: next(clock))
    stages = Stages()
    with stages.stage("outer", 1):
        with stages.stage("inner", 1):
            pass
        with stages.stage("inner", 1):
            pass
    assert stages.seconds == {"outer": 3.0, "inner": 6.0}


def standing(block: int) -> Standing:
    return Standing(block, 30, 0.01234, 0.00567, 2.98, 3.0, 61.4, 1_200_000_000)


def test_where_a_job_stands_is_a_line_below_the_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    stages = Stages(Console(file=screen, force_terminal=True, width=140))
    with stages.shown(), stages.stage("solve", 4) as stage:
        stage.advance(1, "q_proj")
        stages.stand(standing(5))
    told = "block 5 of 30 · 0:01:01 left to solve · error so far 0.0123, 0.0057 nats · 2.98 bits a weight, planned 3.00"
    assert told in screen.getvalue()


def test_time_left_is_what_the_caller_knows() -> None:
    screen = io.StringIO()
    stages = Stages(Console(file=screen, force_terminal=True, width=140))
    with stages.shown(), stages.stage("rows", 4) as stage:
        stage.reach(1, "row 2 of 4", 3725.0)
        deadline = time.monotonic() + 10  # a thread draws the bars ten times a second
        while not (found := re.search(r"left.*1:02:05.*row 2 of 4", screen.getvalue())):
            assert time.monotonic() < deadline
    assert found


def test_the_log_tells_of_a_long_stage_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 100.0
    monkeypatch.setattr("cospadi.jobs.progress.time.monotonic", lambda: now)
    with caplog.at_level("INFO", "cospadi"):
        with Stages().stage("evaluate", 10) as stage:
            for _ in range(10):
                now += 11.0
                stage.advance(1)
        with Stages().stage("rows", 4) as stage:
            now += 40.0
            stage.reach(1, "row 2 of 4", 3725.0)
    assert caplog.messages == [
        "evaluate: 30 %",
        "evaluate: 60 %",
        "evaluate: 90 %",
        "rows: 25 %, 1:02:05 left · row 2 of 4",
    ]


def test_the_log_tells_it_once_a_block(caplog: pytest.LogCaptureFixture) -> None:
    stages = Stages()
    with caplog.at_level("INFO", "cospadi"):
        for block in (1, 1, 2, 2, 2):
            stages.stand(standing(block))
    assert [line.split(" · ")[0] for line in caplog.messages] == ["block 1 of 30", "block 2 of 30"]


def test_events_of_a_stage_come_now_and_then_and_end_where_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("cospadi.jobs.progress.time.monotonic", lambda: now)
    events: list[dict[str, Any]] = []
    stages = Stages(emit=events.append)
    with stages.stage("solve", 100) as stage:
        for done in range(1, 81):
            now += 0.02
            stage.reach(done, f"group {done}")
    with stages.stage("text", 1):
        pass
    told = [event["done"] for event in events if event["stage"] == "solve"]
    assert 3 <= len(told) <= 4  # the first, one each half second of 1.6
    assert told == sorted(told)
    assert events[0] == {"event": "stage", "stage": "solve", "done": 0.01, "note": "group 1", "seconds_left": None}
    assert events[-1] == {"event": "stage", "stage": "text", "done": 1.0, "note": "", "seconds_left": None}
