"""A job proves its own output: what does not load, lacks something or computes something else is never put in place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Answer
from safetensors.torch import load_file, save_file
from tiny_families import tiny_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import cospadi
from cospadi.calibration.walk import relative_difference
from cospadi.errors import OutputError
from cospadi.stages import prove, write

QUICK = {"metric": "weights", "iterations": 1, "ratio": 0.3}


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Have the job write something else than it holds."""
    writes = write.write_streamed

    def spoiled(job: Any, staging: Path, pieces: Any) -> None:
        writes(job, staging, pieces)
        tensors = load_file(staging / "model.safetensors")
        change(tensors)
        save_file(tensors, staging / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(write, "write_streamed", spoiled)


def test_a_projection_that_was_written_wrongly_is_named(
    dense_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.1.mlp.gate_proj"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{name}.values"] = tensors[f"{name}.values"].flip(0)

    spoil(monkeypatch, change)
    with pytest.raises(OutputError, match=rf"logits that differ by .* {name} is the first to differ"):
        cospadi.compress(dense_folder, QUICK, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_lies_outside_of_projections_is_looked_at_too(
    dense_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda tensors: tensors["lm_head.weight"].mul_(1.5))
    with pytest.raises(OutputError, match=r"tensor lm_head\.weight something else than the source"):
        cospadi.compress(dense_folder, QUICK, tmp_path / "out")
    monkeypatch.setattr(prove, "_altered", lambda *_: iter(()))
    with pytest.raises(OutputError, match="the model's head is the first to differ"):
        cospadi.compress(dense_folder, QUICK, tmp_path / "out")


@pytest.mark.parametrize("lost", ["model.norm.weight", "model.layers.0.mlp.up_proj.values"])
def test_a_tensor_that_is_lost_is_named(
    lost: str, dense_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[lost]

    spoil(monkeypatch, change)
    with pytest.raises(OutputError, match=lost):
        cospadi.compress(dense_folder, QUICK, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_says_so_and_keeps_what_is_finished(
    run: Callable[..., Answer], dense_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda tensors: tensors["lm_head.weight"].mul_(1.5))
    words = ["compress", dense_folder, "-o", tmp_path / "out", "--metric", "weights", "--iterations", "1"]
    answer = run(*words)
    assert answer.code == 1
    assert "what was written holds in tensor lm_head.weight something else than the source" in answer.err
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert run(*words).code == 0
    assert (tmp_path / "out").is_dir()


def test_entries_that_mask_neither_hide_a_difference_nor_make_one() -> None:
    plain = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    for mask in (torch.finfo(torch.float32).min, -torch.inf):
        masked = plain.index_fill(1, torch.tensor([2, 5]), mask)
        assert relative_difference(masked, masked) == 0
        other = masked.clone()
        other[:, 0] += 1
        assert relative_difference(other, masked) > 0.1
        assert relative_difference(plain, masked) == torch.inf
    assert not relative_difference(plain * torch.nan, plain) <= 1


def test_a_model_that_came_loaded_is_proved_too(
    dense_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(dense_folder)
    saves = type(model).save_pretrained

    def spoiled(self: Any, folder: Path, *args: Any, **kwargs: Any) -> None:
        saves(self, folder, *args, **kwargs)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.embed_tokens.weight"] *= 1.5
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(type(model), "save_pretrained", spoiled)
    with pytest.raises(OutputError, match="differ"):
        cospadi.compress(model, QUICK, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Every tensor of the source


def test_a_tower_is_kept_and_the_class_of_the_source_loads_all(tmp_path: Path) -> None:
    model = tiny_model("qwen3_5")
    model.save_pretrained(tmp_path / "in")
    result = cospadi.compress(tmp_path / "in", QUICK, tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    tower = {name for name in before if ".visual." in name}
    assert len(tower) > 10
    assert all(torch.equal(before[name], after[name]) for name in tower)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert type(loaded) is type(model)
    # Its text alone, as one loads that of the source.
    text, plain = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "in"))
    assert type(text) is type(plain)
    tokens = torch.arange(1, 13)[None]
    with torch.no_grad():
        assert torch.equal(text(tokens).logits, loaded(input_ids=tokens).logits)
    text.save_pretrained(tmp_path / "text")
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "text")
        assert torch.equal(again(tokens).logits, text(tokens).logits)
    assert result.covered < 0.5
    assert result.bytes_before == sum(tensor.nbytes for tensor in before.values())


def test_a_tensor_of_a_tower_that_was_changed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which no logits of text tell."""
    tiny_model("qwen3_5").save_pretrained(tmp_path / "in")
    name = next(name for name in load_file(tmp_path / "in" / "model.safetensors") if ".visual." in name)
    spoil(monkeypatch, lambda tensors: tensors[name].add_(1e-3))
    with pytest.raises(OutputError, match=rf"tensor {name} something else"):
        cospadi.compress(tmp_path / "in", QUICK, tmp_path / "out")


def test_tensors_that_no_class_knows_are_carried(dense_folder: Path, tmp_path: Path) -> None:
    tensors = load_file(dense_folder / "model.safetensors")
    more = {"model.layers.7.mtp.weight": torch.randn(3, 5), "leftover.scale": torch.arange(4, dtype=torch.int32)}
    source = tmp_path / "in"
    source.mkdir()
    for path in dense_folder.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    save_file(tensors | more, source / "model.safetensors", {"format": "pt"})
    cospadi.compress(source, QUICK, tmp_path / "out")
    cospadi.compress(source, QUICK).model.save_pretrained(tmp_path / "in memory")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    for name in ("out", "in memory", "again"):
        after = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.equal(after[name], tensor) for name, tensor in more.items())


def test_a_model_that_runs_whole_keeps_them_too(default: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    tiny_model("gemma4_text").save_pretrained(tmp_path / "in")
    tokens = tmp_path / "text.txt"
    tokens.write_text("abc " * 400)
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    save_file(tensors | {"mtp.weight": torch.ones(3)}, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    recipe = default | {"calibration": str(tokens), "length": 16, "refine": 0}
    cospadi.compress(tmp_path / "in", recipe, tmp_path / "out", tokenizer=tokenizer)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["mtp.weight"], torch.ones(3))


def test_text_only_names_what_it_leaves_out(run: Callable[..., Answer], tmp_path: Path) -> None:
    tiny_model("qwen3_5").save_pretrained(tmp_path / "in")
    words = ["compress", tmp_path / "in", "-o", tmp_path / "out", "--metric", "weights", "--iterations", "1"]
    answer = run(*words, "--text-only")
    assert answer.code == 0, answer.err
    assert "left out of model.visual" in answer.out
    left_out = json.loads((tmp_path / "out" / "cospadi.json").read_text())["left_out"]
    before = load_file(tmp_path / "in" / "model.safetensors")
    gone = [tensor for name, tensor in before.items() if ".visual." in name]
    assert left_out == {"parts": ["model.visual"], "tensors": len(gone), "bytes": sum(one.nbytes for one in gone)}
    assert len(gone) > 0
    assert not any(".visual." in name for name in load_file(tmp_path / "out" / "model.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "Qwen3_5ForCausalLM"
    tiny_model("mllama").save_pretrained(tmp_path / "other")
    answer = run("compress", tmp_path / "other", "-o", tmp_path / "none", "--metric", "weights", "--text-only")
    assert answer.code == 2, answer.err
    assert "text-only" in answer.err


def test_a_head_of_its_own_stays_though_the_config_says_that_it_is_tied(
    make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    dense = make_llama(tie_word_embeddings=False)
    source = Path(shutil.copytree(dense, tmp_path / "in"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    cospadi.compress(source, QUICK, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (dense, tmp_path / "out"))
    assert torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, before["lm_head.weight"])
    assert torch.equal(loaded.model.embed_tokens.weight, before["model.embed_tokens.weight"])


def test_a_tensor_in_two_files_is_refused(make_model: Callable[..., Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(make_model(max_shard_size="30KB"), tmp_path / "in"))
    one, other, *_ = sorted(source.glob("*.safetensors"))
    name, tensor = next(iter(load_file(one).items()))
    save_file(load_file(other) | {name: tensor + 1}, other, {"format": "pt"})
    with pytest.raises(cospadi.UserError, match=rf"tensor {name} is in {one.name} and in {other.name}"):
        cospadi.compress(source, QUICK, tmp_path / "out")
