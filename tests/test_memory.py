"""A model is never in memory whole: peak memory does not grow with depth, and a model may be larger than its limit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import llama_config
from killed import hashes

import cospadi

SCRIPT = Path(__file__).parent / "helpers" / "memory.py"
WIDE = {"hidden_size": 256, "intermediate_size": 11264, "num_key_value_heads": 4}
"""Blocks of 36 MB in float32, with one small projection to compress."""


@pytest.fixture(scope="module")
def recipe(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages of the default recipe, each as short as it can be."""
    fields: dict[str, Any] = {"ratio": 0.3, "iterations": 1, "gradient_sequences": 1, "refine": 2}
    fields |= {"calibration": str(text_file), "sequences": 4, "length": 16, "include": ["*.q_proj"]}
    path = tmp_path_factory.mktemp("recipe") / "recipe.json"
    path.write_text(json.dumps(fields))
    return path


def command(model: Path, recipe: Path, output: Path, cache_bytes: int) -> list[str]:
    return [sys.executable, str(SCRIPT), str(model), str(recipe), str(output), str(cache_bytes)]


def nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_peak_memory_does_not_grow_with_depth(make_model: Callable[..., Path], recipe: Path, tmp_path: Path) -> None:
    running, peaks, sizes = {}, {}, {}
    for layers in (2, 7):
        model = make_model(llama_config(num_hidden_layers=layers, **WIDE), torch.float32, max_shard_size="60MB")
        sizes[layers] = nbytes(model)
        words = command(model, recipe, tmp_path / str(layers), 2**20)
        running[layers] = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for layers, process in running.items():
        told, complaint = process.communicate(timeout=300)
        assert process.returncode == 0, complaint
        peaks[layers] = json.loads(told)["peak"]
    assert sizes[7] - sizes[2] > 0.2 * peaks[2]  # a whole model in memory would be seen
    assert peaks[7] < 1.1 * peaks[2], peaks


@pytest.fixture
def limited() -> Iterator[Callable[[list[str], int], subprocess.CompletedProcess[str]]]:
    """Run a command in a control group that may use so much memory, page cache included."""
    group = Path("/sys/fs/cgroup/memory/cospadi-test")
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(2**30))
    except OSError:
        pytest.skip("no right to limit memory by a control group (version 1) here")

    def run(words: list[str], limit: int) -> subprocess.CompletedProcess[str]:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        inside = ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh", *words]
        return subprocess.run(inside, capture_output=True, text=True, timeout=300)

    yield run
    group.rmdir()


def test_a_model_larger_than_the_memory_it_may_use(
    make_model: Callable[..., Path],
    recipe: Path,
    limited: Callable[[list[str], int], subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    limit = 640 * 10**6
    wider = WIDE | {"intermediate_size": 16384}
    model = make_model(llama_config(num_hidden_layers=13, **wider), torch.float32, max_shard_size="100MB")
    assert nbytes(model) > limit
    done = limited(command(model, recipe, tmp_path / "out", 2**20), limit)
    assert done.returncode == 0, (done.returncode, done.stderr)
    reading = (
        "import sys, pathlib, torch; from safetensors.torch import load_file;"
        "files = pathlib.Path(sys.argv[1]).glob('*.safetensors');"
        "kept = [tensor.clone() for path in files for tensor in load_file(path).values()]"
    )
    whole = limited([sys.executable, "-c", reading, str(model)], limit)
    assert whole.returncode == -9  # the limit does bind


def test_where_tensors_wait_does_not_change_the_bytes(
    dense_folder: Path, default: dict[str, Any], tmp_path: Path
) -> None:
    recipe = default | {"iterations": 2}
    everything = {"memory": {}, "disk": {"cache_bytes": 0}, "both": {"cache_bytes": 2**15}}
    for name, options in everything.items():
        cospadi.compress(dense_folder, recipe, tmp_path / name, **options)
    assert hashes(tmp_path / "memory") == hashes(tmp_path / "disk") == hashes(tmp_path / "both")
