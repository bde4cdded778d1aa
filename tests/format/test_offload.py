"""What a model was loaded with is what `save_pretrained` writes: offloaded, in another dtype, in shards."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import cospadi
from cospadi import UserError
from cospadi.format import schema, verify

FORMS: dict[str, dict[str, Any]] = {
    "sparse": {"ratio": 0.3, "refine": 0, "metric": "output", "allocate": "uniform"},
    "coded": {"bits": 3, "metric": "output", "iterations": 8},
    "paper": {"method": "paper", "ratio": 0.3},
    "low rank": {"method": "svd-llm", "ratio": 0.3},
    "across blocks": {"method": "paper", "ratio": 0.3, "share": "layers:2"},
    "all across blocks": {"method": "svd-llm", "ratio": 0.3, "share": "input,layers:2"},
}
OUTSIDE = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
PLACES: dict[str, dict[str, str]] = {
    "all on disk": {"": "disk"},
    "owners on disk": OUTSIDE | {"model.layers.0": "disk", "model.layers.1": "cpu"},
    "owners in memory": OUTSIDE | {"model.layers.0": "cpu", "model.layers.1": "disk"},
}
TINY = torch.tensor([1.234e-6, -3.3e-9, 7e-7, 1e-20], dtype=torch.bfloat16)
"""Numbers that fp16 rounds."""


@pytest.fixture(scope="module", params=FORMS)
def folder(
    request: pytest.FixtureRequest, dense_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A checkpoint of each form, some numbers of its dictionaries tiny; never changed."""
    output = tmp_path_factory.mktemp("form") / "out"
    text = {"calibration": str(text_file), "sequences": 4, "length": 32}
    cospadi.compress(dense_folder, {"iterations": 1} | text | FORMS[request.param], output)
    tensors = load_file(output / "model.safetensors")
    for name in factors(output):
        if tensors[name].dtype == torch.bfloat16 and tensors[name].ndim == 2:
            tensors[name][0, : len(TINY)] = TINY
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    (output / "cospadi.json").unlink()
    return output


def factors(folder: Path) -> list[str]:
    """Names of the tensors that make up compressed projections."""
    return [tensor for name, entry in schema.read_config(folder).items() for tensor in entry.tensors(name)]


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def saved_as_loaded(model: Any, folder: Path, output: Path, **saving: Any) -> None:
    """Save; it verifies, and every factor has the bytes that it was loaded with."""
    model.save_pretrained(output, **saving)
    verify.verify(output)
    before, after = stored(folder), stored(output)
    assert before.keys() == after.keys()
    for name in factors(folder):
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize(
    ("places", "dtype"),
    [
        ("all on disk", torch.float32),
        ("owners on disk", torch.bfloat16),
        ("owners on disk", torch.float16),
        ("owners in memory", torch.float32),
    ],
    ids=str,
)
def test_saved_from_disk_it_is_what_was_loaded(
    places: str, dtype: torch.dtype, folder: Path, prompt: Tensor, tmp_path: Path
) -> None:
    buffers = dtype != torch.bfloat16
    options = {"device_map": PLACES[places], "offload_folder": tmp_path / "offload", "offload_buffers": buffers}
    model = load(folder, dtype=dtype, **options)
    assert any(parameter.is_meta for parameter in model.parameters())
    expected = logits(load(folder, dtype=dtype), prompt)
    assert torch.equal(logits(model, prompt), expected)
    saved_as_loaded(model, folder, tmp_path / "out", max_shard_size="20KB" if buffers else "50GB")
    assert torch.equal(logits(load(tmp_path / "out"), prompt), expected)
    assert torch.equal(logits(model, prompt), expected)


@pytest.mark.parametrize("buffers", [False, True])
def test_saved_from_cpu_memory_it_is_what_was_loaded(
    buffers: bool, folder: Path, prompt: Tensor, tmp_path: Path
) -> None:
    """As with device_map "cpu" beside a GPU, with the CPU as the device that computes."""
    model = load(folder, dtype=torch.float32)
    expected = logits(model, prompt)
    accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=buffers)
    model.hf_device_map = {"": "cpu"}
    assert all(parameter.is_meta for parameter in model.parameters())
    saved_as_loaded(model, folder, tmp_path, max_shard_size="20KB")
    assert torch.equal(logits(load(tmp_path), prompt), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_saved_after_a_change_of_dtype_it_is_what_was_loaded(
    dtype: torch.dtype, folder: Path, prompt: Tensor, tmp_path: Path
) -> None:
    model = load(folder).to(dtype)
    saved_as_loaded(model, folder, tmp_path)
    again = load(tmp_path)
    assert again.dtype == dtype
    if dtype == torch.float16:  # `to` has rounded the frequencies of rotary embeddings, too; loading makes them anew
        again.model.rotary_emb = model.model.rotary_emb
    assert torch.equal(logits(again, prompt), logits(model, prompt))


@pytest.fixture(scope="module")
def shared(dense_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with dictionaries across blocks; never changed."""
    output = tmp_path_factory.mktemp("shared") / "out"
    recipe = {"metric": "weights", "solver": "eigen", "ratio": 0.3, "share": "layers:2"}
    cospadi.compress(dense_folder, recipe, output)
    return output


def test_a_half_model_is_saved_without_its_checkpoint(shared: Path, prompt: Tensor, tmp_path: Path) -> None:
    """Then what fp16 holds is saved."""
    moved = Path(shutil.copytree(shared, tmp_path / "moved"))
    model = load(moved, dtype=torch.float16)
    shutil.rmtree(moved)
    model.save_pretrained(tmp_path / "out")
    verify.verify(tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out"), prompt), logits(model, prompt))


def test_factors_changed_in_fp16_are_saved_changed(shared: Path, tmp_path: Path) -> None:
    model = load(shared, dtype=torch.float16)
    name = "model.layers.0.mlp.up_proj.dictionary"
    dictionary = model.get_parameter(name)
    dictionary.data[0] = 0.5
    model.save_pretrained(tmp_path)
    before, after = stored(shared)[name], stored(tmp_path)[name]
    assert torch.equal(after[0], torch.full_like(after[0], 0.5))
    assert torch.equal(after[1:], before[1:])


def test_saved_onto_itself_from_disk_it_stays_what_it_was(shared: Path, prompt: Tensor, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shared, tmp_path / "copy"))
    options = {"device_map": PLACES["all on disk"], "offload_folder": tmp_path / "offload"}
    model = load(copy, dtype=torch.float32, **options)
    expected = logits(model, prompt)
    model.save_pretrained(copy)
    verify.verify(copy)
    assert torch.equal(logits(model, prompt), expected)
    assert torch.equal(logits(load(copy), prompt), expected)


def test_auto_device_map_that_needs_the_disk_gives_the_same_model(shared: Path, prompt: Tensor, tmp_path: Path) -> None:
    options: dict[str, Any] = {"device_map": "auto", "max_memory": {"cpu": "40KB"}, "offload_folder": tmp_path}
    model = load(shared, **options)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model, prompt), logits(load(shared), prompt))


def test_a_dictionary_trained_apart_in_two_places_is_not_saved(shared: Path, tmp_path: Path) -> None:
    """As with two devices; here the second parameter is put in by hand."""
    model = load(shared)
    one, other = (f"model.layers.{block}.mlp.up_proj" for block in (0, 1))
    dictionary = model.get_submodule(one).dictionary
    model.get_submodule(other).dictionary = torch.nn.Parameter(dictionary.detach().clone())
    model.hf_quantizer.copies = {f"{one}.dictionary": [f"{other}.dictionary"]}
    model.save_pretrained(tmp_path / "equal")
    verify.verify(tmp_path / "equal")
    dictionary.data[0, 0] += 1
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj\.dictionary and .* differ after training"):
        model.save_pretrained(tmp_path / "apart")


def test_values_on_disk_are_not_unpacked(compressed_folder: Path, tmp_path: Path) -> None:
    options = {"device_map": PLACES["all on disk"], "offload_folder": tmp_path, "offload_buffers": True}
    model = load(compressed_folder, **options)
    layer = next(layer for layer in model.modules() if isinstance(layer, cospadi.CompressedLinear))
    with pytest.raises(UserError, match="offloaded"):
        layer.unpack_values()
