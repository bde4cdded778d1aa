"""Mixtures of experts: layers of their own compute the same; each is calibrated with what it sees, stored, loaded."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import randomise
from safetensors.torch import load_file
from tiny_families import tiny_model
from transformers import AutoModelForCausalLM, MixtralConfig

import cospadi
from cospadi.calibration.grams import adding_grams, fill_up
from cospadi.experts import unstack
from cospadi.jobs.ledger import JobDirectory
from cospadi.model.projections import find_projections
from cospadi.runtime.layer import CompressedLinear

TOKENS = torch.randint(1, 250, (2, 12), generator=torch.Generator().manual_seed(5))
MIXTRAL = {
    "vocab_size": 260, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h", "qwen3_5_moe", "llama4_text"]
)
def test_layers_of_their_own_compute_what_the_stack_does(family: str) -> None:
    model = tiny_model(family)
    randomise(model)
    apart = deepcopy(model)
    slices = unstack(apart)
    assert slices
    for name, where in slices.items():
        stacked = model.get_parameter(where.parameter)[where.expert]
        assert torch.equal(apart.get_parameter(name), stacked.T if where.transposed else stacked)
    torch.testing.assert_close(logits(apart), logits(model), rtol=1e-4, atol=1e-5)


def test_projections_are_the_same_before_and_after() -> None:
    model = tiny_model("gpt_oss")
    before = find_projections(model)
    unstack(model)
    assert find_projections(model) == before
    assert any(projection.name.endswith("experts.separate.down_proj.3") for projection in before)


def test_only_named_experts_are_changed() -> None:
    model = tiny_model("mixtral")
    assert not unstack(model, ["model.layers.0.self_attn.q_proj.values"])
    assert {
        where.parameter.split(".")[2]
        for where in unstack(model, ["model.layers.1.mlp.experts.separate.down_proj.0"]).values()
    } == {"1"}


def test_gradients_reach_what_runs_before_the_experts() -> None:
    model = tiny_model("mixtral")
    apart = deepcopy(model)
    unstack(apart)
    grads = []
    for one in (model, apart):
        one(input_ids=TOKENS, use_cache=False).logits.square().sum().backward()
        grads.append(one.model.embed_tokens.weight.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-5)


def test_the_gram_of_an_expert_is_of_the_tokens_that_the_router_gave_it() -> None:
    model: Any = tiny_model("mixtral")
    unstack(model)
    experts = model.model.layers[1].mlp.experts
    seen: list[tuple[Any, ...]] = []
    handle = experts.register_forward_pre_hook(lambda _module, args: seen.append(args))
    readers = {f"experts.separate.gate_up_proj.{index}": experts.gate_up_proj[index] for index in range(4)}
    with torch.no_grad(), adding_grams(readers) as grams:
        for row in TOKENS.repeat(8, 1):  # more tokens than inputs
            model(input_ids=row[None], use_cache=False)
    handle.remove()
    whole = 0
    for index in range(4):
        rows = np.concatenate([x[(chosen == index).any(1)].double().numpy() for x, chosen, _ in seen])
        expected = rows.T @ rows
        if len(rows) >= len(expected):
            whole += 1
            np.testing.assert_allclose(
                grams[f"experts.separate.gate_up_proj.{index}"].numpy(), expected, rtol=1e-4, atol=1e-4
            )
    assert whole >= 2


def test_what_an_expert_lacks_is_filled_up_with_what_the_others_see() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = {
        "layers.0.experts.separate.up.0": torch.randn(9, 4, generator=generator),
        "layers.0.experts.separate.up.1": torch.randn(3, 4, generator=generator),
        "layers.0.experts.separate.up.2": torch.zeros(0, 4),
        "layers.1.experts.separate.up.0": torch.randn(1, 4, generator=generator),  # alone in its block
        "layers.0.shared_expert.w1": torch.randn(2, 4, generator=generator),
        "layers.1.shared_expert.w1": torch.randn(3, 4, generator=generator),
        "layers.0.experts.0.w1": torch.randn(6, 4, generator=generator),
        "layers.0.experts.0.w2": torch.randn(2, 3, generator=generator),
    }
    plain = {name: (x.T @ x).double() for name, x in rows.items()}
    grams = {name: gram.clone() for name, gram in plain.items()}
    fill_up(grams, {name: len(x) for name, x in rows.items()})
    names = [f"layers.0.experts.separate.up.{index}" for index in range(3)]
    mean = (plain[names[0]] + plain[names[1]]) / 12
    for name, lacks in zip(names, (0, 1, 4), strict=True):
        torch.testing.assert_close(grams[name], plain[name] + lacks * mean)
    for name in rows.keys() - set(names):
        assert torch.equal(grams[name], plain[name])


@pytest.mark.parametrize("method", ["sparse", "coded", "paper"])
def test_every_expert_is_compressed_and_loads(
    method: str, make_model: Callable[..., Path], quick: dict[str, Any], tmp_path: Path
) -> None:
    dense = make_model(MixtralConfig(**MIXTRAL))
    recipe = {name: value for name, value in quick.items() if name in ("ratio", "calibration", "sequences", "length")}
    result = cospadi.compress(dense, recipe | {"method": method, "iterations": 8, "refine": 0}, tmp_path / "out")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert result.covered > 0.8
    experts = loaded.model.layers[1].mlp.experts
    kept = {projection.name for projection in result.plan.left_dense}
    for part in ("gate_up_proj", "down_proj"):
        for index in range(4):
            name = f"model.layers.1.mlp.experts.separate.{part}.{index}"
            assert isinstance(getattr(experts, part)[index], CompressedLinear) == (name not in kept)
    assert torch.equal(logits(loaded), logits(result.model))
    dense_again = deepcopy(loaded).dequantize()
    assert (logits(dense_again) - logits(loaded)).norm() < 0.03 * logits(loaded).norm()  # bf16 in another order
    dense_again.save_pretrained(tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert (logits(plain) - logits(dense_again)).norm() < 0.03 * logits(plain).norm()
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(loaded))


def test_experts_that_are_left_out_stay_stacked(
    make_model: Callable[..., Path], quick: dict[str, Any], tmp_path: Path
) -> None:
    dense = make_model(MixtralConfig(**MIXTRAL))
    cospadi.compress(dense, quick | {"exclude": ["*.experts.*"]}, tmp_path / "all")
    cospadi.compress(
        dense, quick | {"include": ["*.self_attn.*", "*.0.mlp.experts.separate.down_proj.2"]}, tmp_path / "one"
    )
    names = {name for name in load_file(tmp_path / "all" / "model.safetensors") if ".experts." in name}
    assert names == {f"model.layers.{b}.mlp.experts.{part}" for b in (0, 1) for part in ("gate_up_proj", "down_proj")}
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    source: Any = AutoModelForCausalLM.from_pretrained(dense)
    experts, before = loaded.model.layers[0].mlp.experts, source.model.layers[0].mlp.experts
    assert isinstance(experts.down_proj[2], CompressedLinear)
    assert torch.equal(experts.down_proj[1].weight, before.down_proj[1])
    assert torch.equal(experts.gate_up_proj[2].weight, before.gate_up_proj[2])


@pytest.mark.parametrize("refine", [0, 2])
def test_a_job_that_was_stopped_between_experts_gives_the_same_bytes(
    refine: int, make_model: Callable[..., Path], quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, recipe = make_model(MixtralConfig(**MIXTRAL)), quick | {"refine": refine, "include": ["*.experts.*"]}
    cospadi.compress(dense, recipe, tmp_path / "whole")
    keep, kept = JobDirectory.put, []

    def stop_soon(self: Any, key: str, *args: Any) -> Any:
        piece = keep(self, key, *args)
        kept.extend([key] if key.startswith("factors/") else [])
        if len(kept) == 5:
            raise KeyboardInterrupt
        return piece

    with monkeypatch.context() as patch:
        patch.setattr(JobDirectory, "put", stop_soon)
        with pytest.raises(KeyboardInterrupt):
            cospadi.compress(dense, recipe, tmp_path / "out")
    assert 0 < len([key for key in kept if ".layers.0." in key]) < 8
    cospadi.compress(dense, recipe, tmp_path / "out")
    one, other = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert one.read_bytes() == other.read_bytes()
