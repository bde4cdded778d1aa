"""Whole jobs on local processes: the same bytes as in one process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import hashes

import cospadi
from cospadi.jobs.ledger import JobDirectory, Piece
from cospadi.jobs.pool import Engine
from cospadi.stages import open as opening


def test_two_processes_make_the_same_bytes(
    dense_folder: Path, short_recipe: dict[str, Any], alone: dict[str, str], tmp_path: Path
) -> None:
    engine = Engine(workers=2, threads_per_task=1)
    cospadi.compress(dense_folder, short_recipe, tmp_path / "out", engine=engine)
    assert hashes(tmp_path / "out") == alone


def test_a_job_goes_on_with_another_engine_but_not_with_other_threads(
    dense_folder: Path,
    short_recipe: dict[str, Any],
    alone: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put: Callable[..., Piece] = JobDirectory.put

    def stop_after_some(self: JobDirectory, key: str, *rest: Any) -> Piece:
        piece = put(self, key, *rest)
        if key.startswith("factors/"):
            raise KeyboardInterrupt
        return piece

    with monkeypatch.context() as patch:
        patch.setattr(JobDirectory, "put", stop_after_some)
        with pytest.raises(KeyboardInterrupt):
            cospadi.compress(dense_folder, short_recipe, tmp_path / "out", engine=Engine(workers=2, threads_per_task=1))
    with pytest.raises(cospadi.UserError, match="unfinished job with threads per task 1, not 2"):
        cospadi.compress(dense_folder, short_recipe, tmp_path / "out", engine=Engine(threads_per_task=2))
    cospadi.compress(dense_folder, short_recipe, tmp_path / "out", engine=Engine(threads_per_task=1))
    assert hashes(tmp_path / "out") == alone


def test_another_device_model_is_refused_unless_mixing_is_allowed(
    dense_folder: Path,
    short_recipe: dict[str, Any],
    alone: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["cospadi.compress"], "finish", stop)  # the name in the package is the function
        patch.setattr(opening, "device_model", lambda device: f"abacus of {device}")
        with pytest.raises(KeyboardInterrupt):
            cospadi.compress(dense_folder, short_recipe, tmp_path / "out", engine=Engine(threads_per_task=1))
    with pytest.raises(cospadi.UserError, match="unfinished job with device abacus of cpu, not "):
        cospadi.compress(dense_folder, short_recipe, tmp_path / "out", engine=Engine(threads_per_task=1))
    assert torch.get_num_threads() == 1
    cospadi.compress(dense_folder, short_recipe, tmp_path / "out", engine=Engine(threads_per_task=1, allow_mixed=True))
    assert hashes(tmp_path / "out") == alone
