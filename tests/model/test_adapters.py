"""Folders with a PEFT adapter: refused in a sentence, or merged where that is asked for."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Answer
from safetensors.torch import load_file, save_file
from test_cli import FREE, QUICK, check_mistake

import cospadi
from cospadi import UserError
from cospadi.model import load
from cospadi.model.merge import merge_adapter

RANK, ALPHA = 2, 4


@pytest.fixture
def adapter(dense_folder: Path, tmp_path: Path) -> Path:
    """A LoRA adapter of the queries, alone in its folder, as peft writes it."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(dense_folder), "r": RANK}
    config |= {"lora_alpha": ALPHA, "target_modules": ["q_proj"], "lora_dropout": 0.0, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, weight in queries(dense_folder).items():
        inside = "base_model.model." + name.removesuffix(".weight")
        tensors[f"{inside}.lora_A.weight"] = torch.randn(RANK, weight.shape[1], generator=generator)
        tensors[f"{inside}.lora_B.weight"] = torch.randn(weight.shape[0], RANK, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def queries(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if "q_proj" in name}


def beside(adapter: Path, base: Path, tmp_path: Path) -> Path:
    """The adapter in one folder with its base."""
    return Path(shutil.copytree(adapter, shutil.copytree(base, tmp_path / "both"), dirs_exist_ok=True))


COMMANDS: list[list[Any]] = [
    ["compress", "MODEL", "-o", "out", *FREE],
    ["plan", "MODEL"],
    ["eval", "MODEL", "--text", "TEXT"],
    ["eval", "demo", "--text", "TEXT", "--against", "MODEL"],
    ["generate", "MODEL", "a prompt"],
    ["bench", "MODEL"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[:2]))
def test_a_folder_with_an_adapter_is_refused(
    words: list[str], adapter: Path, dense_folder: Path, text_file: Path, run: Callable[..., Answer],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)

    def told(folder: Path) -> Answer:
        return run(*({"MODEL": str(folder), "TEXT": str(text_file)}.get(word, word) for word in words))

    check_mistake(told(adapter), f"{adapter} is a PEFT adapter of {dense_folder}", "--merge-adapter", "merge it first")
    (adapter / "config.json").write_bytes((dense_folder / "config.json").read_bytes())
    check_mistake(told(adapter), f"{adapter} is a PEFT adapter of {dense_folder}, and no whole model")
    (adapter / "adapter_config.json").write_text("{}")
    check_mistake(told(adapter), f"{adapter} is a PEFT adapter and no whole model", "names no base model")
    both = beside(adapter, dense_folder, tmp_path)
    check_mistake(told(both), f"{both} holds a PEFT adapter", "beside a whole model", "--merge-adapter", "elsewhere")
    (both / "adapter_config.json").unlink()
    check_mistake(told(both), f"{both} holds a PEFT adapter")
    assert not (tmp_path / "out").exists()


def test_merging_says_what_is_missing(
    adapter: Path, dense_folder: Path, run: Callable[..., Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["-o", tmp_path / "out", *FREE, "--merge-adapter"]
    check_mistake(
        run("compress", dense_folder, *words), f"{dense_folder} holds no PEFT adapter", "Leave --merge-adapter"
    )
    check_mistake(run("plan", dense_folder, "--merge-adapter"), "holds no PEFT adapter")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        check_mistake(run("compress", adapter, *words), 'pip install "cospadi[peft]"')
    model = load.load_model(dense_folder, torch.device("cpu"))
    with pytest.raises(UserError, match="Merge a loaded one"):
        cospadi.compress(model, {"metric": "weights", "merge_adapter": True})
    output = ["-o", dense_folder, "--overwrite", *FREE, "--merge-adapter"]
    check_mistake(run("compress", adapter, *output), f"output {dense_folder} is the adapter's base")
    assert not (tmp_path / "out").exists()


def test_plan_looks_at_the_base(adapter: Path, dense_folder: Path, run: Callable[..., Answer], tmp_path: Path) -> None:
    wanted = json.loads(run("plan", dense_folder, "--json").out)
    for folder in (adapter, beside(adapter, dense_folder, tmp_path)):
        found = json.loads(run("plan", folder, "--merge-adapter", "--json").out)
        assert {**found, "estimate": None} == {**wanted, "estimate": None}
        assert found["estimate"]["disk_bytes"] > wanted["estimate"]["disk_bytes"]
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "./gone"}))
    answer = run("plan", adapter, "--merge-adapter")
    check_mistake(answer, f"the base of the adapter in {adapter}: model folder ./gone does not exist")
    (adapter / "adapter_config.json").write_text("{}")
    check_mistake(run("plan", adapter, "--merge-adapter"), "names no base model (base_model_name_or_path)")


@pytest.mark.parametrize("place", ["alone", "beside its base"])
def test_the_merged_model_is_what_is_compressed(
    place: str, adapter: Path, dense_folder: Path, text_file: Path, run: Callable[..., Answer], tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    folder = adapter if place == "alone" else beside(adapter, dense_folder, tmp_path)
    for name in ("tokenizer_config.json", "tokenizer.json"):
        shutil.copy(dense_folder / name, folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")

    merged = merge_adapter(folder, tmp_path / "scratch")
    dense, found = (load_file(one / "model.safetensors") for one in (dense_folder, merged))
    lora = load_file(adapter / "adapter_model.safetensors")
    assert found.keys() == dense.keys()
    for name, weight in dense.items():
        inside = "base_model.model." + name.removesuffix(".weight")
        if f"{inside}.lora_A.weight" in lora:
            change = lora[f"{inside}.lora_B.weight"] @ lora[f"{inside}.lora_A.weight"] * (ALPHA / RANK)
            torch.testing.assert_close(found[name].float(), weight.float() + change, rtol=2e-2, atol=2e-2)
            assert not torch.equal(found[name], weight)
        else:
            assert torch.equal(found[name], weight)
    files = {path.name for path in merged.iterdir()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"} <= files
    assert "adapter_config.json" not in files

    flags = ["--calibration", text_file, *QUICK]
    for source, output, more in ((folder, "ours", ["--merge-adapter"]), (merged, "wanted", [])):
        answer = run("compress", source, "-o", tmp_path / output, *flags, *more)
        assert answer.code == 0, answer.err
    ours, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "wanted"))
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in wanted.items())
    assert {path.name for path in (tmp_path / "ours").iterdir()} == files | {"cospadi.json", "README.md"}
    assert not (tmp_path / "ours.work").exists()


def test_an_adapter_that_does_not_fit_is_refused(
    adapter: Path, dense_folder: Path, run: Callable[..., Answer], tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    words = ["compress", adapter, "-o", tmp_path / "out", *FREE, "--merge-adapter"]
    whole = load_file(adapter / "adapter_model.safetensors")
    first = next(iter(whole))
    for change, told in (
        ({first: None}, "missing adapter keys"),
        ({first.replace("layers.0", "layers.7"): whole[first].clone()}, "layers.7"),
        ({first: torch.zeros(3, 5)}, "cannot be merged into"),
    ):
        tensors = {name: tensor for name, tensor in (whole | change).items() if tensor is not None}
        save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        check_mistake(run(*words), f"the adapter in {adapter}", told)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    check_mistake(run(*words), "has no adapter_model.safetensors", "Pickled adapters are never loaded")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_an_adapter_of_a_compressed_model_is_refused_with_what_helps(
    adapter: Path, compressed_folder: Path, run: Callable[..., Answer], tmp_path: Path
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(compressed_folder)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    check_mistake(run("generate", adapter, "a"), f"adapter of {compressed_folder}, a compressed model", "dequantize")
    answer = run("compress", adapter, "-o", tmp_path / "out", "--merge-adapter", *FREE)
    check_mistake(answer, f"{compressed_folder}, is a compressed model", "dequantize")


def test_an_adapter_of_a_shared_embedding_is_refused(
    make_llama: Callable[..., Path], run: Callable[..., Answer], tmp_path: Path
) -> None:
    """It would change the head as well."""
    import peft

    base = make_llama(tie_word_embeddings=True)
    model = load.load_model(base, torch.device("cpu"))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules=["q_proj", "embed_tokens"]))  # type: ignore[arg-type]
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(str(tmp_path / "ad"))
    answer = run("compress", tmp_path / "ad", "-o", tmp_path / "out", "--merge-adapter", *FREE)
    check_mistake(answer, "changes model.embed_tokens, whose weight another layer of its base shares")
