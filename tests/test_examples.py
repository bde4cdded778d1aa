"""Each script of examples/ runs as a user would run it, one after the other, on the built-in model."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from safetensors import safe_open

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def example(name: str, folder: Path, *words: str) -> str:
    """What the script prints, run in the folder."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *words]
    alone = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=alone, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def example_here(name: str, folder: Path, patch: pytest.MonkeyPatch, capsys: Any, *words: str) -> str:
    """The same in this process, which has the libraries already."""
    patch.chdir(folder)
    patch.setattr(sys, "argv", [name, *words])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed: str = capsys.readouterr().out
    return printed


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that compress.py ran in, and what it printed."""
    folder = tmp_path_factory.mktemp("examples")
    return folder, example("compress", folder)


def test_compress(compressed: tuple[Path, str]) -> None:
    folder, printed = compressed
    ratio = re.match(r"demo-small: ratio (\d\.\d{4}), mean relative error (\d\.\d{4})\n", printed)
    assert ratio is not None
    assert 0.3 <= float(ratio[1]) < 0.301
    assert 0 < float(ratio[2]) < 0.2
    with safe_open(folder / "demo-small" / "model.safetensors", "pt") as file:
        assert "model.layers.0.self_attn.q_proj.support" in file.keys()  # noqa: SIM118


def test_evaluate(compressed: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    printed = example_here("evaluate", compressed[0], monkeypatch, capsys)
    found = re.fullmatch(r"demo-small: perplexity (\d+\.\d\d)\ndemo: perplexity (\d+\.\d\d)\n", printed)
    assert found is not None
    small, dense = map(float, found.groups())
    assert 5 < dense < small < 1.2 * dense


def test_generate(compressed: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    printed = example_here("generate", compressed[0], monkeypatch, capsys, "demo-small", "import ")
    assert printed.startswith("import ")
    assert len(printed.strip()) > len("import ") + 10


def test_train_lora(compressed: tuple[Path, str]) -> None:
    printed = example("train_lora", compressed[0], "--steps", "12")
    found = re.search(r"demo-lora: loss (\d\.\d{4}) before, (\d\.\d{4}) after 12 steps\n$", printed)
    assert found is not None
    before, after = map(float, found.groups())
    assert 2 < after < before
    written = {path.name for path in (compressed[0] / "demo-lora").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= written


def test_quickstart_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a kernel of its own; its cells are the script's."""
    pytest.importorskip("uvicorn", reason="transformers serve is not installed (transformers[serving])")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = runpy.run_path(str(EXAMPLES.parent / "scripts" / "notebook.py"))
    ran, kept = notebook["executed"](tmp_path), nbformat.read(notebook["NOTEBOOK"], as_version=4)
    assert [cell.source for cell in ran.cells] == [cell.source for cell in kept.cells], "python scripts/notebook.py"
    printed = ["".join(output.text for output in cell.outputs) for cell in ran.cells if cell.get("outputs")]
    size, perplexity, answer = printed
    assert re.fullmatch(r"6,853,120 bytes before, 5,1\d\d,\d{3} after, embeddings included\n", size)
    found = re.fullmatch(r"perplexity (\d+\.\d\d) dense, (\d+\.\d\d) compressed\n", perplexity)
    assert found is not None
    dense, small = map(float, found.groups())
    assert 5 < dense < small < 1.1 * dense
    assert answer.startswith("for i in range(")
    assert len(answer.strip()) > len("for i in range(") + 10


def test_every_example_is_tested_and_named_in_the_readme() -> None:
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    scripts = sorted(path.name for path in EXAMPLES.iterdir() if path.is_file())
    assert scripts == [
        "compress.py", "evaluate.py", "generate.py", "quickstart.ipynb", "quickstart.py", "train_lora.py"
    ]  # fmt: skip
    assert all(f"examples/{name}" in readme for name in scripts)
