"""Blocks that come and go: what is loaded when, what a model says that cannot be taken apart."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.gemma3n.configuration_gemma3n import Gemma3nTextConfig

import cospadi
from cospadi.calibration import walk
from cospadi.calibration.spill import Spill
from cospadi.format import verify
from cospadi.model import load
from cospadi.model.blocks import Blocks

CPU = torch.device("cpu")
TOKENS = torch.arange(24).view(2, 12)


OUTSIDE = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def present(blocks: Blocks) -> set[str]:
    """Of the decoder blocks; what is outside of them is always there."""
    found = {name for name, parameter in blocks.model.named_parameters() if not parameter.is_meta}
    assert found >= OUTSIDE
    return found - OUTSIDE


def test_weights_are_there_only_while_they_are_needed(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_llama(num_hidden_layers=3)
    dense = load.load_model(folder, CPU)
    blocks = load.open_blocks(folder, CPU, tmp_path)
    assert present(blocks) == set()
    seen: list[set[str]] = []
    for module in blocks.modules:
        module.register_forward_pre_hook(lambda *_: seen.append(present(blocks)))
    with torch.no_grad():
        assert torch.equal(blocks.model(input_ids=TOKENS).logits, dense(input_ids=TOKENS).logits)
    of_block = [
        {name for name in dense.state_dict() if name.startswith(f"model.layers.{index}.")} for index in range(3)
    ]
    assert seen == of_block
    assert present(blocks) == set()
    with blocks.loaded(1) as block:
        assert present(blocks) == of_block[1]
        with torch.no_grad():
            blocks.model(input_ids=TOKENS)
        assert present(blocks) == of_block[1]
        assert torch.equal(block.mlp.up_proj.weight, dense.get_submodule("model.layers.1.mlp.up_proj").weight)
    assert present(blocks) == set()
    name = "model.layers.2.mlp.down_proj"
    assert torch.equal(blocks.weight(name), dense.get_submodule(name).weight)


def test_weights_leave_after_an_error_too(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    blocks = load.open_blocks(make_llama(), CPU, tmp_path)

    def fail(*_: object) -> None:
        raise ValueError("stop")

    blocks.modules[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="stop"):
        blocks.model(input_ids=TOKENS)
    assert present(blocks) == set()
    with pytest.raises(ValueError, match="stop"), blocks.loaded(0):
        fail()
    assert present(blocks) == set()


def test_blocks_that_are_passed_by_are_not_read(
    make_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, spill = load.open_blocks(make_llama(), CPU, tmp_path), Spill(10**6)
    calls = walk.learn_calls(blocks, [(TOKENS, 1)], spill)
    assert calls is not None
    read: list[object] = []
    monkeypatch.setattr(Blocks, "_read", lambda _self, names: read.append(names) or 1 / 0)
    hidden = walk.embed(blocks, TOKENS[:1], 1, spill)[0]
    assert walk.logits(blocks, calls, hidden, TOKENS[:1]).shape[:2] == (1, 12)
    assert not read


def test_weight_that_is_not_finite_is_named_when_its_block_is_read(
    make_llama: Callable[..., Path], quick: dict[str, Any], tmp_path: Path
) -> None:
    folder = make_llama(num_hidden_layers=3)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.get_submodule("model.layers.2.mlp.gate_proj").weight.data[0, 0] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(cospadi.UserError, match=r"model\.layers\.2\.mlp\.gate_proj\.weight of .* holds NaN"):
        cospadi.compress(folder, quick, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_model_whose_blocks_do_not_simply_follow_each_other_is_loaded_whole(
    make_model: Callable[..., Path], default: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = Gemma3nTextConfig(
        vocab_size=260, vocab_size_per_layer_input=260, hidden_size=48, hidden_size_per_layer_input=16,
        intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_kv_shared_layers=0, laurel_rank=8, altup_num_inputs=2, activation_sparsity_pattern=None,
        layer_types=["full_attention"] * 2, max_position_embeddings=64,
    )  # fmt: skip
    folder = make_model(config)
    recipe = default | {"compensate": True, "include": ["*.q_proj", "*.up_proj", "*.down_proj"]}
    with caplog.at_level(logging.WARNING, "cospadi"):
        result = cospadi.compress(folder, recipe, tmp_path / "out")
    told = "blocks of this model do not simply follow each other: loaded whole and solved without "
    assert f"{told}compensation and not refined" in caplog.text
    assert len(result.errors) >= 3
    verify.verify(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    again = cospadi.load(tmp_path / "out", "cpu")
    with torch.no_grad():
        assert torch.isfinite(again(input_ids=TOKENS).logits).all()
