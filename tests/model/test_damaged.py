"""Folders that are damaged or lie, in every command: what is wrong is named, and nothing hangs or believes it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Answer
from safetensors.torch import load_file, save_file

QUICK = ["--metric", "weights", "--iterations", "1", "--ratio", "0.3"]


@pytest.fixture
def folder(dense_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dense_folder, tmp_path / "in"))


@pytest.fixture
def commands(run: Callable[..., Answer], folder: Path, text_file: Path) -> dict[str, Callable[[], Answer]]:
    """Every command that reads a dense model, short."""
    return {
        "compress": lambda: run("compress", folder, "-o", folder.parent / "out", "--overwrite", *QUICK),
        "plan": lambda: run("plan", folder, "--no-timing", *QUICK),
        "eval": lambda: run("eval", folder, "--text", text_file, "--length", "16"),
        "generate": lambda: run("generate", folder, "a prompt of some length", "--tokens", "1"),
    }


def check(answer: Answer, *mentioned: object) -> None:
    assert answer.code == 2, (answer.code, answer.out, answer.err)
    last = answer.err.strip().splitlines()[-1]
    assert all(str(one) in last for one in mentioned), last


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"num_labels": 10**9}, "asks for 1000000000 labels"),
        ({"num_hidden_layers": -1}, "num_hidden_layers -1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads 0"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ],
    ids=str,
)
def test_a_configuration_that_lies(
    fields: dict[str, Any], told: str, folder: Path, commands: dict[str, Callable[[], Answer]]
) -> None:
    change_config(folder, **fields)
    for command in commands.values():
        answer = command()
        check(answer, folder / "config.json" if "eps" not in told else folder, told)
        assert not answer.err.rstrip().endswith(":")


def test_a_quantization_config_that_names_no_method(folder: Path, run: Callable[..., Answer]) -> None:
    change_config(folder, quantization_config={})
    check(run("compress", folder, "-o", folder.parent / "out", *QUICK), "without a quant_method")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value: float, folder: Path, commands: dict[str, Callable[[], Answer]]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(folder, lambda tensors: tensors[name].view(-1)[:3].fill_(value))
    for kind in ("compress", "eval", "generate"):
        check(commands[kind](), name, folder, "NaN or infinity")


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_model_that_computes_no_numbers(
    calibrated: bool,
    folder: Path,
    text_file: Path,
    run: Callable[..., Answer],
    commands: dict[str, Callable[[], Answer]],
) -> None:
    change_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 0})
    words = ["--calibration", text_file, "--sequences", "4", "--length", "16", "--iterations", "1", "--refine", "0"]
    output = folder.parent / "out"
    answer = run("compress", folder, "-o", output, *words) if calibrated else commands["compress"]()
    check(answer, "computes NaN", "config.json")
    assert not output.exists()
    for kind in ("eval", "generate"):
        check(commands[kind](), "computes NaN")


def test_files_that_are_not_there(folder: Path, commands: dict[str, Callable[[], Answer]]) -> None:
    weights, aside = folder / "model.safetensors", folder.parent / "aside"
    weights.rename(aside)
    for place, told in ((aside, None), (folder / "nowhere", "is a link to"), (aside.parent, "is no file")):
        weights.symlink_to(place)
        for kind, command in commands.items():
            if told:
                check(command(), weights, told)
            else:
                assert command().code == 0, kind
        weights.unlink()
    os.mkfifo(weights)
    for command in commands.values():
        check(command(), weights, "is no file")
    weights.unlink()
    for command in commands.values():
        check(command(), "no safetensors files")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    for command in commands.values():
        check(command(), "only pytorch_model.bin", "Pickled weights are never loaded")


def test_shards_and_their_index(
    make_model: Callable[..., Path], tmp_path: Path, run: Callable[..., Answer], text_file: Path
) -> None:
    folder = Path(shutil.copytree(make_model(max_shard_size="30KB"), tmp_path / "in"))
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    lines = (
        ["compress", folder, "-o", tmp_path / "out", "--overwrite", *QUICK],
        ["plan", folder, "--no-timing", *QUICK],
    )
    lines = (*lines, ["eval", folder, "--text", text_file, "--length", "16"])
    index.write_text(json.dumps({"weight_map": content["weight_map"]}))
    for words in lines:
        check(run(*words), index, "metadata")
    index.write_text(json.dumps(content))
    save_file({"mtp.weight": torch.ones(3)}, folder / "mtp.safetensors")
    answer = run(*lines[0])
    assert answer.code == 0, answer.err
    assert answer.err.count("mtp.safetensors is no part of the model") == 1
    assert "its 1 tensors are left out" in answer.err
    last = sorted(folder.glob("model-*.safetensors"))[-1]
    last.unlink()
    for words in lines:
        check(run(*words), last, "is not there")
