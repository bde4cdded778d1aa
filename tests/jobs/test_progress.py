"""Times of stages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cospadi.jobs.progress import Stages


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
