"""transformers' Trainer trains a compressed model as it is, or an adapter on it, and what it saves loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import cospadi
from cospadi import CompressedLinear
from cospadi.format import schema, verify

STEPS = 8


@pytest.fixture(scope="module")
def shared(dense_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with shared dictionaries; never changed."""
    output = tmp_path_factory.mktemp("shared") / "out"
    cospadi.compress(dense_folder, {"metric": "weights", "solver": "eigen", "ratio": 0.3}, output)
    return output


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


def trainer(model: Any, tokens: Tensor, output: Path, **arguments: Any) -> Any:
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    settings: dict[str, Any] = {"max_steps": STEPS, "learning_rate": 0.01, "logging_steps": 1, "save_steps": 4}
    settings |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 2}
    return Trainer(model=model, args=TrainingArguments(str(output), **settings | arguments), train_dataset=rows)


def losses(trained: Any) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def test_all_that_can_be_trained_is(shared: Path, prompt: Tensor, tmp_path: Path) -> None:
    model = load(shared)
    layers = [layer for layer in model.modules() if isinstance(layer, CompressedLinear)]
    for layer in layers:
        layer.unpack_values()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert {name.rpartition(".")[2] for name in before} == {"weight", "dictionary", "values"}
    one = trainer(model, prompt, tmp_path / "run")
    one.train()
    assert losses(one)[-1] < 0.8 * losses(one)[0]
    assert not [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    one.save_model(str(tmp_path / "saved"))
    verify.verify(tmp_path / "saved")
    again = load(tmp_path / "saved")
    # as near as the stored dtypes are
    torch.testing.assert_close(logits(again, prompt), logits(model, prompt), rtol=0.1, atol=0.3)
    again.save_pretrained(tmp_path / "twice")
    verify.verify(tmp_path / "twice")
    assert torch.equal(logits(load(tmp_path / "twice"), prompt), logits(again, prompt))


def test_packed_values_stay_and_the_rest_learns(compressed_folder: Path, prompt: Tensor, tmp_path: Path) -> None:
    model = load(compressed_folder)
    stored = {tensor for name, entry in schema.read_config(compressed_folder).items() for tensor in entry.tensors(name)}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one = trainer(model, prompt, tmp_path / "run")
    one.train()
    assert losses(one)[-1] < losses(one)[0]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == before.keys() - stored


def test_training_resumes_from_a_checkpoint_of_the_run(compressed_folder: Path, prompt: Tensor, tmp_path: Path) -> None:
    """Nothing that is trained here is stored in another dtype than the model's."""
    whole = trainer(load(compressed_folder), prompt, tmp_path / "run")
    whole.train()
    verify.verify(tmp_path / "run" / "checkpoint-4")
    rest = trainer(load(compressed_folder), prompt, tmp_path / "rest")
    rest.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert losses(rest)[-1] == losses(whole)[-1]
    assert torch.equal(logits(rest.model, prompt), logits(whole.model, prompt))


def test_an_adapter_trains_and_is_loaded_again(shared: Path, prompt: Tensor, tmp_path: Path) -> None:
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    one = trainer(get_peft_model(load(shared), config), prompt, tmp_path / "run", gradient_checkpointing=True)
    one.train()
    assert losses(one)[-1] < 0.8 * losses(one)[0]
    one.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(load(shared), tmp_path / "adapter")
    assert torch.equal(logits(again, prompt), logits(one.model, prompt))


def test_an_adapter_of_transformers_trains(shared: Path, prompt: Tensor, tmp_path: Path) -> None:
    model = load(shared)
    model.add_adapter(LoraConfig(target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    one = trainer(model, prompt, tmp_path / "run")
    one.train()
    assert losses(one)[-1] < losses(one)[0]
    one.save_model(str(tmp_path / "adapter"))
    again = load(shared)
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(again, prompt), logits(model, prompt))
