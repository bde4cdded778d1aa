"""The folder that is written: reproducible, whole or not there at all, and refused by name when damaged."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import cospadi
from cospadi import UserError
from cospadi.format import safetensors, schema, verify
from cospadi.model import load as source
from cospadi.solvers import SOLVERS
from cospadi.stages import write

WRITTEN = ("model.safetensors", "config.json", "cospadi.json")
GATE = "model.layers.1.mlp.gate_proj"


@pytest.fixture(scope="module")
def companions(make_llama: Callable[..., Path]) -> Path:
    """A dense model with the files that belong beside weights, and some that do not."""
    folder = make_llama(intermediate_size=75)
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}\n")
    (folder / "generation_config.json").write_text(
        '{"bos_token_id": 256, "eos_token_id": 257, "do_sample": true, "temperature": 0.7}\n'
    )
    (folder / "LICENSE").write_text("Do what you like.\n")
    (folder / "README.md").write_text("The card of the dense model.\n")
    (folder / "training_args.bin").write_bytes(b"\x80\x04N.")
    return folder


@pytest.fixture(scope="module")
def whole(companions: Path, quick: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undamaged checkpoint; never changed. k is no multiple of 8 and nnz * 14 bits no whole number of bytes."""
    output = tmp_path_factory.mktemp("whole") / "out"
    cospadi.compress(companions, quick | {"solver": "ksvd", "include": ["*.gate_proj", "*.self_attn.?_proj"]}, output)
    entry = schema.read_config(output)[GATE]
    assert entry.k % 8
    assert entry.nnz * 14 % 8
    return output


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "damaged"))


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_projection(folder: Path, **fields: Any) -> None:
    edit_json(folder / "config.json", lambda c: c["quantization_config"]["projections"][GATE].update(fields))


def edit_bytes(folder: Path, tensor: str, change: Callable[[bytearray], None]) -> None:
    """Change a tensor's bytes where they lie in the file."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    start, end = (8 + size + o for o in json.loads(content[8 : 8 + size])[tensor]["data_offsets"])
    part = content[start:end]
    change(part)
    assert part != content[start:end]
    content[start:end] = part
    path.write_bytes(content)


def flip(position: int, bit: int) -> Callable[[bytearray], None]:
    def change(part: bytearray) -> None:
        part[position] ^= 1 << bit

    return change


def refused(folder: Path, *mentioned: str) -> None:
    """from_pretrained stops with our error, whose message has all of these in it."""
    with pytest.raises(cospadi.UserError) as caught:
        load(folder)
    for word in mentioned:
        assert word in str(caught.value)


# Reading and writing


def test_save_pretrained_of_a_loaded_model_gives_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    load(whole).save_pretrained(tmp_path)
    for name in WRITTEN:
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_saving_the_result_in_memory_gives_the_same_bytes(
    companions: Path, quick: dict[str, Any], tmp_path: Path
) -> None:
    result = cospadi.compress(companions, quick, tmp_path / "written")
    result.model.save_pretrained(tmp_path / "saved")
    for name in WRITTEN:
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "written" / name).read_bytes()


def test_saved_again_in_shards_it_loads_and_verifies(whole: Path, prompt: Tensor, tmp_path: Path) -> None:
    model = load(whole)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path), prompt), logits(model, prompt))
    assert verify.verify(tmp_path) == verify.verify(whole)


@pytest.mark.parametrize("share", ["input", "layers:2", "input,layers:2"])
@pytest.mark.parametrize("solver", [name for name, found in SOLVERS.items() if "weights" in found.metrics])
def test_shared_dictionaries_survive_saving_again(
    solver: str, share: str, make_llama: Callable[..., Path], prompt: Tensor, tmp_path: Path
) -> None:
    recipe = {"ratio": 0.3, "iterations": 1, "metric": "weights", "solver": solver, "share": share}
    first, second = tmp_path / "first", tmp_path / "second"
    cospadi.compress(make_llama(), recipe, first)
    model = load(first)
    model.save_pretrained(second)
    for name in WRITTEN:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert torch.equal(logits(load(second), prompt), logits(model, prompt))


def test_changed_factors_are_saved_with_new_hashes_and_without_their_old_error(whole: Path, tmp_path: Path) -> None:
    model = load(whole)
    shared = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    for name in (GATE, shared[0]):
        model.get_submodule(name).dictionary.data.mul_(0.5)
    model.save_pretrained(tmp_path)
    verify.verify(tmp_path)
    recorded = json.loads((tmp_path / "cospadi.json").read_text())["projections"]
    assert {name for name, entry in recorded.items() if "relative_error" not in entry} == {GATE, *shared}
    assert torch.equal(load(tmp_path).get_submodule(GATE).dictionary, model.get_submodule(GATE).dictionary)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_argument_is_followed(dtype: torch.dtype, whole: Path, prompt: Tensor) -> None:
    model = load(whole, dtype=dtype)
    layer = model.get_submodule(GATE)
    assert (layer.dictionary.dtype, layer.support.dtype, layer.values.dtype) == (dtype, torch.uint8, torch.uint8)
    found, exact = logits(model, prompt), logits(load(whole, dtype=torch.float32), prompt)
    assert found.dtype == dtype
    assert (found.float() - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_map_gives_the_same_model(device_map: str, whole: Path, prompt: Tensor) -> None:
    model = load(whole, device_map=device_map)
    assert all(not p.is_meta for p in [*model.parameters(), *model.buffers()])
    assert torch.equal(logits(model, prompt), logits(load(whole), prompt))


def test_equal_runs_write_equal_files(companions: Path, default: dict[str, Any], tmp_path: Path) -> None:
    for name in ("one", "two"):
        cospadi.compress(companions, default, tmp_path / name)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


def test_another_seed_gives_other_factors(companions: Path, tmp_path: Path) -> None:
    recipe = {"iterations": 1, "metric": "weights", "solver": "ksvd"}
    for seed in (1, 2):
        cospadi.compress(companions, recipe | {"seed": seed}, tmp_path / str(seed))
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in "12")
    assert len(one) == len(two)
    assert one != two


def test_manifest_has_hashes_of_what_is_on_disk_and_nothing_of_this_machine(
    whole: Path, companions: Path, quick: dict[str, Any]
) -> None:
    text = (whole / "cospadi.json").read_text()
    manifest, content = json.loads(text), (whole / "model.safetensors").read_bytes()
    assert manifest["format_version"] == 1
    assert manifest["files"].keys() == {"model.safetensors"}
    assert manifest["files"]["model.safetensors"]["sha256"] == hashlib.sha256(content).hexdigest()
    tensors = load_file(whole / "model.safetensors")
    for name, digest in manifest["files"]["model.safetensors"]["tensors"].items():
        assert digest == hashlib.sha256(tensors.pop(name).contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    assert not tensors
    for entry, stored in manifest["projections"].items():
        parts = schema.read_config(whole)[entry].tensors(entry)
        assert sum(stored["bytes"].values()) == sum(safetensors.tensor_sizes(whole)[t] for t in parts)
    for private in (str(companions), str(Path(quick["calibration"]).parent), os.uname().nodename):
        assert private not in text


def test_companion_files_are_copied_and_old_weights_and_card_are_not(whole: Path, companions: Path) -> None:
    copied = {"chat_template.jinja", "generation_config.json", "LICENSE", "tokenizer.json", "tokenizer_config.json"}
    for name in copied:
        assert (whole / name).read_bytes() == (companions / name).read_bytes()
    assert {path.name for path in whole.iterdir()} == copied | set(WRITTEN) | {"README.md"}
    assert "import cospadi" in (whole / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(whole)("abc")["input_ids"]
    assert load(whole).generation_config.temperature == 0.7


def test_generation_config_that_transformers_would_not_save_is_copied(
    make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    dense = make_llama()
    content = '{"do_sample": false, "temperature": 0.6, "top_p": 0.9}'
    (dense / "generation_config.json").write_text(content)
    cospadi.compress(dense, {"iterations": 1, "metric": "weights"}, tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").read_text() == content


def test_permissions_are_those_of_ordinary_files(whole: Path) -> None:
    assert whole.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in whole.iterdir()} == {0o644}


# Damage


def test_missing_manifest_loads(damaged: Path, whole: Path, prompt: Tensor) -> None:
    (damaged / "cospadi.json").unlink()
    assert torch.equal(logits(load(damaged), prompt), logits(load(whole), prompt))
    with pytest.raises(cospadi.CheckpointError, match=r"cospadi\.json is not there"):
        verify.verify(damaged)


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize("left", [0, 5, 2000, -100])
def test_truncated_weights_are_refused(left: int, with_manifest: bool, damaged: Path) -> None:
    if not with_manifest:
        (damaged / "cospadi.json").unlink()
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    refused(damaged, "model.safetensors")


def test_flipped_mask_bit_is_refused(damaged: Path) -> None:
    edit_bytes(damaged, f"{GATE}.support", flip(7, 2))
    refused(damaged, "model.safetensors", f"{GATE}.support", "bits set")


def test_mask_bit_moved_into_the_padding_is_refused(damaged: Path) -> None:
    entry = schema.read_config(damaged)[GATE]
    row = (entry.k + 7) // 8

    def move(part: bytearray) -> None:
        used = next(bit for bit in range(8) if part[0] >> bit & 1)
        part[0] ^= 1 << used
        part[row - 1] |= 1 << entry.k % 8

    edit_bytes(damaged, f"{GATE}.support", move)
    refused(damaged, "model.safetensors", f"{GATE}.support", f"past atom {entry.k - 1}")


def test_bit_after_the_last_value_is_refused(damaged: Path) -> None:
    edit_bytes(damaged, f"{GATE}.values", flip(-1, 7))
    refused(damaged, "model.safetensors", f"{GATE}.values", "past its last value")


@pytest.mark.parametrize("change", [-1, 1, 8])
def test_wrong_k_is_refused(change: int, damaged: Path) -> None:
    k = schema.read_config(damaged)[GATE].k
    edit_projection(damaged, k=k + change)
    refused(damaged, "model.safetensors", GATE, "config.json")


@pytest.mark.parametrize("change", [-4, -1, 1, 4])
def test_wrong_nnz_is_refused(change: int, damaged: Path) -> None:
    nnz = schema.read_config(damaged)[GATE].nnz
    edit_projection(damaged, nnz=nnz + change)
    refused(damaged, "model.safetensors", GATE, "config.json")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"k": 0}, "k"),
        ({"k": 2**62}, "k"),
        ({"k": "many"}, "k"),
        ({"nnz": -1}, "nnz"),
        ({"nnz": 10**9}, "nnz"),
        ({"value_bits": 15}, "value_bits"),
        ({"layout": "cube"}, "layout"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_malformed_entry_is_refused(fields: dict[str, Any], field: str, damaged: Path) -> None:
    edit_projection(damaged, **fields)
    refused(damaged, "config.json", GATE, field)


@pytest.mark.parametrize(
    "fields", [{"d1": 49}, {"d2": 81}, {"value_bits": 16}, {"layout": "low-rank", "nnz": 0}, {"bias": True}]
)
def test_entry_that_does_not_fit_model_or_tensors_is_refused(fields: dict[str, Any], damaged: Path) -> None:
    edit_projection(damaged, **fields)
    refused(damaged, GATE)


@pytest.mark.parametrize("owner", ["model.layers.9.mlp.gate_proj", "model.layers.0.self_attn.q_proj"])
def test_dictionary_owner_that_does_not_fit_is_refused(owner: str, damaged: Path) -> None:
    edit_projection(damaged, dictionary=owner)
    refused(damaged, "config.json", GATE, owner)


def test_projection_that_the_model_does_not_have_is_refused(damaged: Path) -> None:
    def rename(config: dict[str, Any]) -> None:
        entries = config["quantization_config"]["projections"]
        entries["model.layers.7.mlp.gate_proj"] = entries.pop(GATE) | {"dictionary": "model.layers.7.mlp.gate_proj"}

    edit_json(damaged / "config.json", rename)
    refused(damaged, "config.json", "model.layers.7.mlp.gate_proj")


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize(
    "tensor", [f"{GATE}.values", f"{GATE}.support", f"{GATE}.dictionary", "model.layers.1.mlp.up_proj.weight"]
)
def test_removed_tensor_is_refused(tensor: str, with_manifest: bool, damaged: Path) -> None:
    if not with_manifest:
        (damaged / "cospadi.json").unlink()
    tensors = load_file(damaged / "model.safetensors")
    del tensors[tensor]
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    refused(damaged, *(["model.safetensors"] if with_manifest else [str(damaged), tensor]))


@pytest.mark.parametrize("tensor", [f"{GATE}.values", f"{GATE}.dictionary"])
def test_tensor_of_another_dtype_is_refused(tensor: str, damaged: Path) -> None:
    (damaged / "cospadi.json").unlink()
    tensors = load_file(damaged / "model.safetensors")
    tensors[tensor] = tensors[tensor].float()
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    refused(damaged, "model.safetensors", tensor, "F32")


@pytest.mark.parametrize("version", [3, 0, "1", None, True, 1.0])
@pytest.mark.parametrize("file", ["config.json", "cospadi.json"])
def test_other_format_version_is_refused(file: str, version: object, damaged: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content.get("quantization_config", content)["format_version"] = version

    edit_json(damaged / file, change)
    refused(damaged, file, f"format version {version}")


def test_manifest_of_another_checkpoint_is_refused(damaged: Path, companions: Path, tmp_path: Path) -> None:
    recipe = {"iterations": 1, "metric": "weights"}
    cospadi.compress(companions, recipe, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "cospadi.json", damaged)
    refused(damaged, "cospadi.json", "another checkpoint")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"format_version": 1}',
        b'{"format_version": 1, "projections": []}',
        b'{"format_version": 1, "projections": null}',
        b'{"format_version": 1, "projections": 5}',
        b"null",
        b'{"format_version": ' + b"9" * 5000,
        b"[" * 100_000,
        b'{"format_version": 1, "projections": {"a": {"relative_error": "small"}}}',
    ],
    ids=lambda content: content[:20],
)
def test_malformed_manifest_is_refused(content: bytes, damaged: Path) -> None:
    (damaged / "cospadi.json").write_bytes(content)
    refused(damaged, "cospadi.json")


@pytest.mark.parametrize(
    "files",
    [
        [],
        None,
        "model.safetensors",
        {"model.safetensors": 5},
        {"model.safetensors": {}},
        {"model.safetensors": {"bytes": "many"}},
        {"other.safetensors": {"bytes": 5}},
    ],
    ids=str,
)
def test_manifest_with_malformed_files_is_refused_on_load_and_by_verify(files: object, damaged: Path) -> None:
    edit_json(damaged / "cospadi.json", lambda manifest: manifest.update(files=files))
    refused(damaged, "cospadi.json")
    with pytest.raises(cospadi.CheckpointError, match=r"cospadi\.json"):
        verify.verify(damaged)


@pytest.mark.parametrize(
    "entry",
    [{"sha256": None}, {"tensors": None}, {"tensors": []}, {"sha256": "", "tensors": {"a": 1}}],
    ids=str,
)
def test_manifest_with_malformed_hashes_is_refused_by_verify(entry: dict[str, Any], damaged: Path) -> None:
    edit_json(damaged / "cospadi.json", lambda m: m["files"]["model.safetensors"].update({"sha256": ""} | entry))
    with pytest.raises(cospadi.CheckpointError, match=r"cospadi\.json|model\.safetensors"):
        verify.verify(damaged)


@pytest.mark.parametrize("projections", [[], 5, "all", {GATE: 5}, {GATE: None}], ids=str)
def test_malformed_projections_are_refused(projections: object, damaged: Path) -> None:
    edit_json(damaged / "config.json", lambda c: c["quantization_config"].update(projections=projections))
    refused(damaged, "config.json")


@pytest.mark.parametrize("field", ["extra", "self"])
def test_unknown_field_of_the_quantization_config_is_refused(field: str, damaged: Path) -> None:
    edit_json(damaged / "config.json", lambda c: c["quantization_config"].update({field: 1}))
    refused(damaged, "config.json", field)
    with pytest.raises(cospadi.CheckpointError, match=field):
        verify.verify(damaged)


@pytest.mark.parametrize("value", ["cospadi", ["cospadi"], True, None])
def test_quantization_config_that_is_no_mapping_is_refused(value: object, damaged: Path) -> None:
    edit_json(damaged / "config.json", lambda c: c.update(quantization_config=value))
    with pytest.raises(UserError, match="is not a CoSpaDi checkpoint"):
        verify.verify(damaged)


def test_bias_that_config_json_does_not_tell_of_is_refused(damaged: Path) -> None:
    (damaged / "cospadi.json").unlink()
    tensors = load_file(damaged / "model.safetensors")
    save_file(tensors | {f"{GATE}.bias": torch.zeros(75)}, damaged / "model.safetensors", {"format": "pt"})
    refused(damaged, f"{GATE}.bias", "config.json")


@pytest.mark.parametrize("name", ["", "..", "../elsewhere.safetensors", "\ud800", "a\0b", "x" * 300])
def test_index_of_odd_names_is_refused(name: str, damaged: Path) -> None:
    (damaged / "model.safetensors").rename(damaged / "elsewhere.safetensors")
    (damaged / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    for call in (verify.read_checkpoint, cospadi.load):
        with pytest.raises(cospadi.CheckpointError):
            call(damaged)


def test_what_only_has_the_name_of_a_safetensors_file_is_passed_over(damaged: Path) -> None:
    (damaged / "folder.safetensors").mkdir()
    (damaged / "link.safetensors").symlink_to(damaged / "nowhere")
    verify.verify(damaged)
    load(damaged)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 10**9},
        {"num_labels": 10**9},
        {"head_dim": 10**12},
        {"hidden_size": 0},
        {"rope_parameters": "none"},
        {"vocab_size": "many"},
        {"dtype": 5},
    ],
    ids=str,
)
def test_config_of_another_model_is_refused_before_anything_is_built(fields: dict[str, Any], damaged: Path) -> None:
    edit_json(damaged / "config.json", lambda config: config.update(fields))
    with pytest.raises(UserError):
        cospadi.load(damaged)


@pytest.mark.parametrize("absolute", [False, True])
def test_index_that_leaves_the_folder_is_refused(absolute: bool, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    load(whole).save_pretrained(folder, max_shard_size="30KB")
    index = folder / "model.safetensors.index.json"
    shard = sorted(folder.glob("model-*.safetensors"))[-1]
    elsewhere = tmp_path / "elsewhere.safetensors"
    shutil.copy(shard, elsewhere)
    name = str(elsewhere) if absolute else "../elsewhere.safetensors"

    def redirect(content: dict[str, Any]) -> None:
        content["weight_map"] = {t: name if f == shard.name else f for t, f in content["weight_map"].items()}

    edit_json(index, redirect)
    refused(folder, "elsewhere.safetensors", "index")


def test_missing_shard_is_refused(whole: Path, tmp_path: Path) -> None:
    load(whole).save_pretrained(tmp_path, max_shard_size="30KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises((cospadi.UserError, OSError), match=shard.name):
        load(tmp_path)


@pytest.mark.parametrize("tensor", [f"{GATE}.values", f"{GATE}.dictionary", "model.norm.weight"])
def test_flipped_bit_is_found_by_verify_and_on_request_by_loading(
    tensor: str, damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verify.verify(damaged) == len(load_file(damaged / "model.safetensors"))
    edit_bytes(damaged, tensor, flip(11, 3))
    load(damaged)
    with pytest.raises(cospadi.CheckpointError) as caught:
        verify.verify(damaged)
    assert "model.safetensors" in str(caught.value)
    assert f"tensor {tensor} " in str(caught.value)
    monkeypatch.setenv("COSPADI_VERIFY", "1")
    refused(damaged, "model.safetensors", f"tensor {tensor} ")


def test_verify_finds_a_file_that_the_manifest_does_not_list(damaged: Path) -> None:
    save_file({"extra": torch.zeros(3)}, damaged / "extra.safetensors")
    with pytest.raises(cospadi.CheckpointError, match=r"extra\.safetensors is not listed"):
        verify.verify(damaged)


def test_verify_finds_a_changed_header(damaged: Path) -> None:
    path = damaged / "model.safetensors"
    content = path.read_bytes()
    assert content.count(b'"format":"pt"') == 1
    path.write_bytes(content.replace(b'"format":"pt"', b'"format":"np"'))
    with pytest.raises(cospadi.CheckpointError, match=r"model\.safetensors: its header"):
        verify.verify(damaged)


def test_without_the_package_loading_stops_instead_of_inventing_weights(whole: Path) -> None:
    code = f"from transformers import AutoModelForCausalLM as A\nA.from_pretrained({str(whole)!r})\nprint('loaded')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "loaded" not in done.stdout
    assert "RuntimeError" in done.stderr
    assert "mismatched" in done.stderr or "size mismatch" in done.stderr


# Writing that fails


def test_folders_made_for_an_output_that_fails_go_with_it(
    companions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, recipe = tmp_path / "new" / "below" / "out", {"iterations": 1, "metric": "weights"}
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["cospadi.compress"], "blocks_to_solve", fail)  # before anything is finished
        with pytest.raises(OSError, match="No space left"):
            cospadi.compress(companions, recipe, output)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(write, "write_manifest", fail)
    with pytest.raises(OSError, match="No space left"):
        cospadi.compress(companions, recipe, output)
    assert [path.name for path in output.parent.iterdir()] == ["out.work"]


def test_a_name_as_long_as_the_system_allows_is_written(companions: Path, tmp_path: Path) -> None:
    cospadi.compress(companions, {"iterations": 1, "metric": "weights"}, tmp_path / ("n" * 255))
    verify.verify(tmp_path / ("n" * 255))


def fail(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), SystemExit(143)], ids=repr
)
def test_finished_work_alone_is_left_when_writing_fails(
    error: BaseException, companions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {"iterations": 1, "metric": "weights"}

    def stop(*_: object) -> None:
        assert (tmp_path / "out.work" / "output" / "model.safetensors").exists()
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(write, "write_manifest", stop)
        with pytest.raises(type(error)):
            cospadi.compress(companions, recipe, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.work"]
    assert not (tmp_path / "out.work" / "output").exists()
    cospadi.compress(companions, recipe, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    verify.verify(tmp_path / "out")


def test_output_that_was_there_survives_a_failure_and_is_replaced_by_success(
    companions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, recipe = tmp_path / "out", {"iterations": 1, "metric": "weights"}
    output.mkdir()
    (output / "config.json").write_text("{}")
    (output / "precious.txt").write_text("old")
    with pytest.raises(cospadi.UserError, match=r"out is not empty\. .*--overwrite"):
        cospadi.compress(companions, recipe, output)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with monkeypatch.context() as patch:
        patch.setattr(write, "write_manifest", fail)
        with pytest.raises(OSError, match="No space left"):
            cospadi.compress(companions, recipe, output, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.work"}
    assert {path.name for path in output.iterdir()} == {"config.json", "precious.txt"}
    with pytest.raises(cospadi.UserError, match=r"out is not empty\. .*--overwrite"):
        cospadi.compress(companions, recipe, output)
    cospadi.compress(companions, recipe, output, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (output / "precious.txt").exists()
    verify.verify(output)


def test_output_survives_when_the_new_folder_cannot_take_its_place(
    companions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("{}")
    (output / "precious.txt").write_text("old")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "output":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        cospadi.compress(companions, {"iterations": 1, "metric": "weights"}, output, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.work"}
    assert (output / "precious.txt").read_text() == "old"


def test_a_model_is_not_compressed_over_its_own_folder(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_llama(), tmp_path / "model"))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(cospadi.UserError, match="which the job reads and would replace"):
        cospadi.compress(folder, {"iterations": 1, "metric": "weights"}, folder, overwrite=True)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_output_that_is_a_file_is_refused(companions: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(cospadi.UserError, match="out is a file"):
        cospadi.compress(companions, {"metric": "weights"}, tmp_path / "out", overwrite=True)


def test_output_that_links_to_another_folder_is_written(companions: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "config.json").write_text("{}")
    (tmp_path / "out").symlink_to(tmp_path / "scratch")
    cospadi.compress(companions, {"iterations": 1, "metric": "weights"}, tmp_path / "out", overwrite=True)
    verify.verify(tmp_path / "out")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")]


def test_a_stale_index_beside_one_file_does_no_harm(whole: Path, tmp_path: Path) -> None:
    """transformers leaves the index behind when it saves whole over shards, and reads the whole file."""
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    stale = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(stale))
    load(folder)
    verify.verify(folder)
    assert source.load_model(folder, torch.device("cpu")) is not None


def test_a_loaded_model_survives_pickling_and_copies(whole: Path, prompt: Tensor, tmp_path: Path) -> None:
    model = load(whole)
    torch.save(model, tmp_path / "model.pt")
    for twin in (torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(model)):
        assert torch.equal(logits(twin, prompt), logits(model, prompt))
        twin.save_pretrained(tmp_path / "again")
        assert (tmp_path / "again" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_uploading_from_save_pretrained_is_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="push_to_hub"):
        load(whole).save_pretrained(tmp_path / "out", push_to_hub=True)


def test_frozen_trained_values_are_still_saved_packed(whole: Path, prompt: Tensor, tmp_path: Path) -> None:
    model = load(whole)
    expected = logits(model, prompt)
    for layer in model.modules():
        if isinstance(layer, cospadi.CompressedLinear):
            layer.unpack_values()
    model.requires_grad_(False)
    torch.testing.assert_close(logits(model, prompt), expected)
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_compressed_model_in_memory_is_not_compressed_again(whole: Path) -> None:
    with pytest.raises(UserError, match="already compressed or quantized"):
        cospadi.compress(load(whole), {"metric": "weights"})


def test_load_gives_a_model_that_runs(whole: Path, prompt: Tensor) -> None:
    assert torch.equal(logits(cospadi.load(whole, device="cpu"), prompt), logits(load(whole), prompt))
