"""What the GPU's script does with whole models works on a CPU, too."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from cospadi.commands.bench import Memory
from scripts import ROOT, script

CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return script("gpu")


def test_whole_models_and_jobs(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "WORDS", 2000)
    monkeypatch.setattr("cospadi.commands.bench._in_new_process", lambda *_: Memory(None, None, 0, 0.0))  # is slow
    monkeypatch.setattr("cospadi.commands.bench.bench.__defaults__", ((8,), (1,), 2, 1, "auto", "auto", None))
    assert gpu.write_models("tiny", tmp_path) == ["coded-3", "dense", "sparse-0.4", "words.txt"]
    assert [one["model"] for one in gpu.time_models(tmp_path, CPU)["models"]] == ["dense", "sparse-0.4", "coded-3"]
    for size, ratio in (({"bits": 3.0}, 1 - 3 / 16), ({"ratio": 0.4, "refine": 1}, 0.4)):
        found = gpu.time_job(tmp_path, CPU, size, sequences=4, length=32, gradient_sequences=2)
        assert found["seconds"]["solve"] > 0
        assert found["pass_seconds"] > 0
        assert found["ratio_reached"] == pytest.approx(ratio, abs=2e-3)
