"""PEFT's LoRA stands on compressed layers of every form: it learns, is saved, loaded, and merged into dense layers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_families import tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import cospadi
from cospadi import CompressedLinear, UserError
from cospadi.format import verify

FORMS: dict[str, dict[str, Any]] = {
    "sparse": {"ratio": 0.3},
    "coded": {"bits": 3, "iterations": 8},
    "dictionary": {"ratio": 0.3, "solver": "eigen"},
    "low rank": {"ratio": 0.3, "solver": "svd", "share": "layers:2"},
}
LEARNS = {"r": 4, "task_type": "CAUSAL_LM"}


def test_experts_are_adapted_by_name_and_never_merged_in_silence(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "in")
    cospadi.compress(tmp_path / "in", {"metric": "weights", "iterations": 1, "ratio": 0.3}, tmp_path / "out")
    everything = get_peft_model(load(tmp_path / "out"), LoraConfig(target_modules="all-linear"))
    adapted = {name.rpartition(".")[2] for name, module in everything.named_modules() if hasattr(module, "base_layer")}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate"}  # the router, too, as PEFT has it of dense ones
    everything.get_base_model().dequantize()
    everything.merge_and_unload()
    some = get_peft_model(load(tmp_path / "out"), LoraConfig(target_modules=["down_proj.0", "q_proj"]))
    before = logits(some, torch.arange(1, 9)[None])
    with pytest.raises(UserError, match=r"adapters lie on experts \(.*down_proj\)"):
        some.get_base_model().dequantize()
    assert torch.equal(logits(some, torch.arange(1, 9)[None]), before)


@pytest.fixture(scope="module", params=FORMS)
def folder(request: pytest.FixtureRequest, dense_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each form; never changed."""
    output = tmp_path_factory.mktemp("form") / "out"
    cospadi.compress(dense_folder, {"metric": "weights", "iterations": 1} | FORMS[request.param], output)
    return output


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32} | options).eval()


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


def train(model: Any, tokens: Tensor, steps: int = 12) -> list[float]:
    """Losses of so many steps of Adam on what is trainable."""
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


def adapted(model: nn.Module) -> set[str]:
    """Names of the modules that an adapter stands on."""
    names = {name.removeprefix("base_model.model.") for name, _ in model.named_modules() if name.endswith("base_layer")}
    return {name.removesuffix(".base_layer") for name in names}


@pytest.mark.parametrize("target", [["q_proj", "down_proj"], "all-linear", None], ids=str)
def test_lora_learns_and_is_saved_and_loaded(target: Any, folder: Path, prompt: Tensor, tmp_path: Path) -> None:
    dense = load(folder)
    before = logits(dense, prompt)
    model = get_peft_model(dense, LoraConfig(target_modules=target, **LEARNS))
    compressed = set(dense.hf_quantizer.quantization_config.projections)
    expected = {"all-linear": compressed, "None": {n for n in compressed if n.endswith(("q_proj", "v_proj"))}}
    listed = {name for name in compressed if name.endswith(("q_proj", "down_proj"))}
    assert adapted(model) == expected.get(str(target), listed)
    assert torch.equal(logits(model, prompt), before)  # B is zero at first

    losses = train(model, prompt)
    assert losses[-1] < 0.8 * losses[0]
    trained = logits(model.eval(), prompt)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(folder), tmp_path).eval(), prompt), trained)
    assert torch.equal(logits(load(tmp_path), prompt), trained)  # transformers, by the adapter's own config
    with model.disable_adapter():
        assert torch.equal(logits(model, prompt), before)
    assert torch.equal(logits(model.unload(), prompt), before)


def test_merging_is_refused_in_a_sentence_and_changes_nothing(folder: Path, prompt: Tensor, tmp_path: Path) -> None:
    """lm_head, which is dense, comes last; embeddings, which are dense, come first."""
    config = LoraConfig(target_modules=["embed_tokens", "v_proj", "lm_head"], init_lora_weights=False, **LEARNS)
    model = get_peft_model(load(folder), config).eval()
    expected, around = logits(model, prompt), adapted(model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(UserError, match=r"cannot be merged.*dequantize\(\)"):
            merge()
        assert adapted(model) == around
        assert torch.equal(logits(model, prompt), expected)
    with pytest.raises(UserError, match=r"v_proj is no compressed layer any more.*unload\(\)"):
        model.get_base_model().save_pretrained(tmp_path / "around")


def test_dense_layers_take_the_adapter(folder: Path, prompt: Tensor, tmp_path: Path) -> None:
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, **LEARNS)
    model = get_peft_model(load(folder), config).eval()
    expected = logits(model, prompt)
    model.get_base_model().dequantize()
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, prompt), expected, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, CompressedLinear) for module in merged.modules())
    merged.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert not hasattr(again, "hf_quantizer")
    assert torch.equal(logits(again, prompt), logits(merged, prompt))


def test_dequantize_follows_the_dtype_the_model_has_now(compressed_folder: Path, prompt: Tensor) -> None:
    model = load(compressed_folder, dtype=torch.bfloat16).to(torch.float32)
    expected = logits(model, prompt)
    model.dequantize()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(model, prompt), expected, rtol=1e-4, atol=1e-4)


def test_biases_stay_when_layers_become_dense(make_llama: Any, prompt: Tensor, tmp_path: Path) -> None:
    dense = make_llama(attention_bias=True, mlp_bias=True)
    cospadi.compress(dense, {"metric": "weights", "iterations": 1, "ratio": 0.3}, tmp_path / "out")
    model = load(tmp_path / "out")
    expected = logits(model, prompt)
    torch.testing.assert_close(logits(model.dequantize(), prompt), expected, rtol=1e-4, atol=1e-4)


def test_offloaded_layers_do_not_become_dense(compressed_folder: Path, tmp_path: Path) -> None:
    model = load(compressed_folder, device_map={"": "disk"}, offload_folder=tmp_path, offload_buffers=True)
    with pytest.raises(UserError, match="offloaded"):
        model.dequantize()


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_an_initialisation_that_rewrites_the_weight_is_refused(start: Any, compressed_folder: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=start)
    with pytest.raises(UserError, match=f"init_lora_weights '{start}' rewrites the weight"):
        get_peft_model(load(compressed_folder), config)


def test_dora_learns(compressed_folder: Path, prompt: Tensor) -> None:
    model = get_peft_model(load(compressed_folder), LoraConfig(target_modules=["q_proj"], use_dora=True, **LEARNS))
    losses = train(model, prompt)
    assert losses[-1] < losses[0]


def test_a_second_adapter_and_all_linear_again(compressed_folder: Path, prompt: Tensor) -> None:
    model = get_peft_model(load(compressed_folder), LoraConfig(target_modules=["q_proj"], **LEARNS))
    model.add_adapter("other", LoraConfig(target_modules="all-linear", **LEARNS))
    projections = model.get_base_model().hf_quantizer.quantization_config.projections
    # k_proj was left dense
    assert adapted(model) == {*projections, *(f"model.layers.{block}.self_attn.k_proj" for block in (0, 1))}
    assert not [name for name in model.peft_config["other"].target_modules if "base_layer" in name]
    model.set_adapter("other")
    losses = train(model, prompt, steps=4)
    assert losses[-1] < losses[0]


def test_adapters_of_transformers_are_saved_alone(compressed_folder: Path, prompt: Tensor, tmp_path: Path) -> None:
    model = load(compressed_folder)
    model.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    expected = logits(model, prompt)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (tmp_path / "cospadi.json").exists()
    again = load(compressed_folder)
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits(again.eval(), prompt), expected)


def test_a_model_whose_adapter_was_taken_off_is_saved_as_it_was(compressed_folder: Path, tmp_path: Path) -> None:
    model = get_peft_model(load(compressed_folder), LoraConfig(target_modules=["q_proj"])).unload()
    model.save_pretrained(tmp_path)
    verify.verify(tmp_path)


def test_dense_models_get_what_peft_gives_them(dense_folder: Path, prompt: Tensor) -> None:
    model = get_peft_model(load(dense_folder), LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    assert len(adapted(model)) == 14
    assert {type(model.get_submodule(f"base_model.model.{name}")) for name in adapted(model)} == {
        peft.tuners.lora.Linear
    }
    expected = logits(model, prompt)
    torch.testing.assert_close(logits(model.merge_and_unload(), prompt), expected, rtol=1e-4, atol=1e-4)


def test_peft_is_not_imported_before_it_is_used_and_may_come_last(compressed_folder: Path) -> None:
    program = f"""
import sys
import cospadi
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(compressed_folder)!r})
print([name for name in sys.modules if name.split(".")[0] == "peft" or name == "cospadi.integrations.peft"])
from peft import LoraConfig, get_peft_model
print(len(get_peft_model(model, LoraConfig(target_modules="all-linear")).targeted_module_names))
"""
    alone = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=alone, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n14\n", done.stderr
