"""What the GPU's script does with whole models works on a CPU, too."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import pytest
import torch

from scripts import ROOT, script

CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return script("gpu")


def test_whole_models_and_jobs(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "WORDS", 2000)
    found = gpu.time_models("tiny", CPU, (2,))
    assert [one["model"] for one in found[::3]] == ["dense", *gpu.KINDS]
    assert all(one["speed"] > 0 for one in found)
    gpu.write_dense("tiny", tmp_path, CPU)
    for size, ratio in (({"bits": 3.0}, 1 - 3 / 16), ({"ratio": 0.4, "refine": 1}, 0.4)):
        found = gpu.time_job(tmp_path, CPU, size, sequences=4, length=32, gradient_sequences=2)
        assert found["seconds"]["solve"] > 0
        assert found["pass_seconds"] > 0
        assert found["ratio_reached"] == pytest.approx(ratio, abs=2e-3)


def test_choices_are_tried_for_every_case(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In Triton's interpreter, without times."""
    pytest.importorskip("triton", reason="Triton is not installed")
    choices = script("gpu_choices")
    if not choices.kernels.INTERPRETED:
        pytest.skip("there is a GPU, and other processes would compile for it")
    monkeypatch.setattr(choices.gpu, "_time", lambda calls, _: (float(calls[0]().numel()), 0.0))
    every = choices.configurations
    monkeypatch.setattr(choices, "configurations", lambda what, rows: every(what, rows)[:2])  # each takes a second
    monkeypatch.setattr(choices.subprocess, "Popen", lambda *_, **__: Mock())
    choices.main(["192x40"], [1, 5], tmp_path / "choices.json", share="")
    found = json.loads((tmp_path / "choices.json").read_text())
    assert [(one["what"], one["rows"]) for one in found] == [
        (w, r) for w in ("values", "levels", "levels") for r in (1, 5)
    ]
    assert all(len(one["tried"]) == 2 for one in found)
    assert "WRONG" not in capsys.readouterr().out
