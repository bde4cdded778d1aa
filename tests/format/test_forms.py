"""Every form there is: bytes as the formula says, decoding undoes encoding, and models of it load, compute and save."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from codes import random_code
from conftest import Answer
from forms import K, entry_of, random_part, write, write_mixed
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_checkpoint import edit_bytes, edit_json, flip, load, logits, refused
from torch import Tensor
from transformers import AutoModelForCausalLM

import cospadi
from cospadi.budget.plan import write_plan
from cospadi.errors import CheckpointError, UserError
from cospadi.format import safetensors, schema, verify, version1
from cospadi.format.codecs import CODECS, codec_of_bits
from cospadi.format.codecs.ec import EC
from cospadi.format.codecs.integers import INTEGERS
from cospadi.format.dictionaries import DICTIONARIES
from cospadi.format.form import FORMS, Form, Parts, find_form
from cospadi.runtime.layer import set_runtime

IN_VERSION_1 = {Form(*names) for names in version1.FORMS.values()}
STOOD_FOR = [name for name in INTEGERS if name not in ("int3g64", "int8")]
MODELS = [form for form in FORMS if form.values not in STOOD_FOR]
"""Forms that models are made of: two kinds of integers stand for all."""
GATE = "model.layers.1.mlp.gate_proj"
DOWN = "model.layers.1.mlp.down_proj"

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(deadline=None)
@given(
    st.sampled_from(FORMS),
    st.integers(1, 30),
    st.lists(st.integers(1, 20), min_size=1, max_size=3),
    st.integers(1, 30),
    st.integers(0, 2**32 - 1),
)
def test_bytes_are_what_the_formula_says_and_decoding_undoes_encoding(
    form: Form, d1: int, d2s: list[int], k: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    kind = form.dictionary_kind
    k = kind.atoms(d1) or k
    dictionary = None if kind.atoms(d1) else torch.randn(d1, k, generator=generator)
    atoms, dictionary = kind.decode(kind.encode(dictionary)), kind.encode(dictionary)
    assert (dictionary is None) == (atoms is None) == (kind.shape(d1, k) is None)
    if atoms is not None:
        assert torch.equal(kind.encode(atoms.T), dictionary)
    found = [random_part(form, d2, k, generator) for d2 in d2s]
    if form.codec.coded:
        parts = Parts(kind.nbytes(d1, k), 0, sum(tensors[form.names.values].nbytes for tensors, _, _ in found))
    else:
        parts = form.nbytes(d1, d2s, k, [count for _, _, count in found])
    assert parts.dictionary == (0 if dictionary is None else dictionary.nbytes)
    assert parts.support == sum(t[form.names.support].nbytes for t, _, _ in found if form.names.support in t)
    assert parts.values == sum(tensors[form.names.values].nbytes for tensors, _, _ in found)
    for d2, (tensors, expected, count) in zip(d2s, found, strict=True):
        entry = entry_of(form, d1, d2, k, count, "p", tensors[form.names.values].nbytes)
        told = {
            name.removeprefix("p."): (safetensors.SAFETENSORS_TYPES[dtype], shape)
            for name, (dtype, shape) in entry.tensors("p").items()
        }
        assert told.pop(form.names.dictionary, None) == (None if dictionary is None else (torch.bfloat16, [k, d1]))
        assert told == {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}
        values = form.codec.decode(tensors[form.names.values], entry.values_shape)
        support = tensors.get(form.names.support)
        assert torch.equal(form.support_kind.scatter(support, values, d2, k).double(), expected)
        assert form.codec.problem(tensors[form.names.values], entry.values_shape) is None
        if support is not None:
            assert form.support_kind.problem(support, d2, k, count) is None


@given(st.sampled_from([name for name, codec in CODECS.items() if not codec.levels]), st.lists(finite, max_size=40))
def test_a_codec_rounds_once(name: str, values: list[float]) -> None:
    codec = CODECS[name]
    stored = codec.encode(torch.tensor(values, dtype=torch.float32))
    back = codec.decode(stored, [len(values)])
    assert torch.isfinite(back).all()
    assert torch.equal(codec.encode(back), stored)
    assert stored.nbytes == codec.nbytes([len(values)]) == math.ceil(len(values) * codec.bits / 8)
    assert len(values) <= codec.room(stored) < len(values) + 8


def test_names_for_reading_lead_back_to_the_form() -> None:
    for form in FORMS:
        assert find_form(form.layout, form.values) == form
        assert form.codec.levels or codec_of_bits(form.codec.bits) == form.values
    assert find_form("cube", "f14") is None
    assert find_form("low-rank", "f15") is None


def test_a_damaged_code_is_refused_and_no_more_is_made_of_it_than_there_is() -> None:
    stored = random_code(40, 30, torch.Generator().manual_seed(0))
    assert EC.problem(stored, [40, 30]) is None
    assert EC.problem(stored, [1199, 1]) == "holds 1200 values, config.json says 1199"
    assert EC.problem(stored[:12], [40, 30]) == "has 12 bytes, fewer than a header"
    assert EC.problem(stored[:60], [40, 30]) == "ends before its steps and widths do"
    for place, value, reason in (
        (0, 3, "has a header that makes no sense"),
        (13, 255, f"holds {(40 + (255 << 8)) * 30} values, config.json says 1200"),
    ):
        damaged = stored.clone()
        damaged[place] = value
        assert EC.problem(damaged, [40, 30]) == reason
    damaged = stored.clone()
    damaged[-20:] ^= 0x5A
    with pytest.raises(CheckpointError, match=r"levels in a code cannot be read .* cospadi verify tells which tensor"):
        EC.decode(damaged, [40, 30])


@pytest.mark.parametrize("form", MODELS, ids=lambda form: f"{form.dictionary}-{form.support}-{form.values}")
def test_a_model_of_every_form_loads_computes_and_saves(
    form: Form, dense_folder: Path, prompt: Tensor, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    expected = logits(write(form, dense_folder, first), prompt)
    config = json.loads((first / "config.json").read_text())["quantization_config"]
    manifest = json.loads((first / "cospadi.json").read_text())
    assert config["format_version"] == manifest["format_version"] == (1 if form in IN_VERSION_1 else 2)
    assert schema.read_config(first)[GATE].form == form
    assert verify.verify(first) == len(safetensors.tensor_sizes(first))

    model = load(first, dtype=torch.float32)
    for runtime in ("auto", "packed", "unpacked", "dense"):
        set_runtime(model, runtime)
        torch.testing.assert_close(logits(model, prompt), expected, rtol=1e-3, atol=1e-4)
    set_runtime(model, "auto")
    for twin in (copy.deepcopy(model), torch.compile(model, backend="aot_eager")):
        torch.testing.assert_close(logits(twin, prompt), expected, rtol=1e-3, atol=1e-4)
    assert load(first).generate(prompt, max_new_tokens=3, do_sample=False).shape[1] == prompt.shape[1] + 3

    load(first).save_pretrained(tmp_path / "second")
    for name in ("model.safetensors", "config.json", "cospadi.json"):
        assert (tmp_path / "second" / name).read_bytes() == (first / name).read_bytes()
    layers = [layer for layer in model.modules() if isinstance(layer, cospadi.CompressedLinear)]
    if form.codec.levels:
        with pytest.raises(UserError, match="are levels, which cannot be trained"):
            layers[0].unpack_values()
        return
    for layer in layers:
        layer.unpack_values()
    torch.testing.assert_close(logits(model, prompt), expected, rtol=1e-3, atol=1e-4)
    model.save_pretrained(tmp_path / "third")  # the other tensors as float32
    stored, again = (load_file(folder / "model.safetensors") for folder in (first, tmp_path / "third"))
    for name, entry in schema.read_config(first).items():
        for tensor in entry.tensors(name):
            assert torch.equal(again[tensor], stored[tensor])
            assert again[tensor].dtype == stored[tensor].dtype


@pytest.fixture(
    scope="module",
    params=[form for form in MODELS if form not in IN_VERSION_1],
    ids=lambda form: f"{form.dictionary}-{form.support}-{form.values}",
)
def whole(request: Any, dense_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that version 1 cannot tell; never changed."""
    folder: Path = tmp_path_factory.mktemp("whole") / "model"
    write(request.param, dense_folder, folder)
    return folder


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "damaged"))


def change_entry(folder: Path, change: Callable[[dict[str, Any]], Any], name: str = GATE) -> None:
    edit_json(folder / "config.json", lambda c: change(c["quantization_config"]["projections"][name]))


@pytest.mark.parametrize(
    ("fields", "mentioned"),
    [
        ({"values": "f13"}, "f13 is not known to this cospadi. It knows bf16"),
        ({"support": "cube"}, "cube is not known to this cospadi. It knows mask, full"),
        ({"dictionary": "free"}, "free is not known to this cospadi. It knows stored, identity"),
        ({"dictionary": None}, "dictionary"),
        ({"support": ["mask"]}, "support"),
        ({"layout": "low-rank"}, "layout"),
        ({"value_bits": 14}, "value_bits"),
        ({"k": 0}, "k"),
        ({"d1": 2**62}, "d1"),
        ({"nnz": 10**9}, "nnz"),
        ({"nnz": -1}, "nnz"),
        ({"owner": "model.layers.9.mlp.gate_proj"}, "model.layers.9.mlp.gate_proj as the owner"),
        ({"owner": DOWN}, f"{DOWN} as the owner"),
    ],
    ids=str,
)
def test_a_malformed_entry_is_refused(fields: dict[str, Any], mentioned: str, damaged: Path) -> None:
    change_entry(damaged, lambda entry: entry.update(fields))
    refused(damaged, "config.json", GATE, mentioned)


@pytest.fixture(
    params=[form for form in MODELS if form.dictionary == "identity"],
    ids=lambda form: f"{form.support}-{form.values}",
)
def without_dictionary(request: Any, dense_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint whose dictionaries are all I, to damage."""
    write(request.param, dense_folder, tmp_path / "identity")
    return tmp_path / "identity"


def test_what_the_identity_rules_out_is_refused(without_dictionary: Path, tmp_path: Path) -> None:
    """Another number of atoms, a dictionary that another projection or a file would have."""
    up = GATE.replace("gate", "up")
    for fields, problem in (
        ({"k": 47}, "k is 47, and dictionary identity has 48 atoms"),
        ({"k": 96}, "k is 96, and dictionary identity has 48 atoms"),
        ({"owner": up}, f"names {up} as the owner of its dictionary; dictionary identity is stored nowhere"),
        ({"owner": "nobody"}, "names nobody as the owner of its dictionary; dictionary identity is stored nowhere"),
        ({"dictionary": "stored"}, f"tensor {GATE}."),
    ):
        damaged = Path(shutil.copytree(without_dictionary, tmp_path / "damaged", dirs_exist_ok=True))
        change_entry(damaged, lambda entry, fields=fields: entry.update(fields))
        refused(damaged, GATE, problem)
    damaged = Path(shutil.copytree(without_dictionary, tmp_path / "damaged", dirs_exist_ok=True))
    tensors = load_file(damaged / "model.safetensors")
    tensors[f"{GATE}.dictionary"] = torch.eye(48, dtype=torch.bfloat16)
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    refused(damaged, "model.safetensors has", "cospadi.json says")
    (damaged / "cospadi.json").unlink()
    refused(damaged, f"tensor {GATE}.dictionary is there, which config.json denies")


@pytest.mark.parametrize("runtime", ["auto", "packed", "unpacked", "dense"])
def test_a_model_of_every_dictionary_and_of_dense_projections(
    runtime: str, dense_folder: Path, prompt: Tensor, tmp_path: Path
) -> None:
    """Side by side in one model, and of the projections that read one input."""
    forms = {
        "self_attn.q_proj": Form("stored", "mask", "f14"),
        "self_attn.k_proj": Form("identity", "mask", "f12"),
        "self_attn.v_proj": Form("stored", "mask", "f14"),
        "mlp.gate_proj": Form("identity", "mask", "f14"),
        "mlp.up_proj": Form("stored", "full", "bf16"),
        "mlp.down_proj": Form("identity", "full", "bf16"),
    }
    expected = logits(write_mixed(forms.get, dense_folder, tmp_path / "mixed"), prompt)
    entries = schema.read_config(tmp_path / "mixed")
    assert {entry.dictionary for entry in entries.values()} == set(DICTIONARIES)
    assert not any(name.endswith("o_proj") for name in entries)
    assert entries["model.layers.0.self_attn.v_proj"].owner == "model.layers.0.self_attn.q_proj"
    assert verify.verify(tmp_path / "mixed") == len(safetensors.tensor_sizes(tmp_path / "mixed"))
    model = load(tmp_path / "mixed", dtype=torch.float32)
    set_runtime(model, runtime)
    torch.testing.assert_close(logits(model, prompt), expected, rtol=1e-3, atol=1e-4)
    load(tmp_path / "mixed").save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json", "cospadi.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "mixed" / name).read_bytes()


@pytest.mark.parametrize("field", ["dictionary", "support", "values", "d1", "d2", "k", "owner"])
def test_an_entry_that_lacks_a_field_is_refused(field: str, damaged: Path) -> None:
    change_entry(damaged, lambda entry: entry.pop(field))
    refused(damaged, "config.json", GATE, field)


@pytest.mark.parametrize("fields", [{"d1": 49}, {"d2": 81}, {"k": K + 8}, {"values": None}, {"bias": True}], ids=str)
def test_an_entry_that_does_not_fit_model_or_tensors_is_refused(fields: dict[str, Any], damaged: Path) -> None:
    if "values" in fields:  # another codec
        own = schema.read_config(damaged)[GATE].values
        fields = {"values": next(name for name in CODECS if name != own)}
    change_entry(damaged, lambda entry: entry.update(fields))
    refused(damaged, GATE)


def test_entries_of_one_version_are_refused_in_the_other(damaged: Path) -> None:
    edit_json(damaged / "config.json", lambda c: c["quantization_config"].update(format_version=1))
    refused(damaged, "config.json", "layout")
    old = {"layout": "low-rank", "d1": 48, "d2": 80, "k": K, "dictionary": GATE}
    edit_json(damaged / "config.json", lambda c: c["quantization_config"].update(format_version=2))
    change_entry(damaged, lambda entry: (entry.clear(), entry.update(old)))
    refused(damaged, "config.json", GATE)


@pytest.mark.parametrize("version", [0, 3, "2", 2.0, None])
@pytest.mark.parametrize("file", ["config.json", "cospadi.json"])
def test_another_version_is_refused(file: str, version: object, damaged: Path) -> None:
    edit_json(damaged / file, lambda c: c.get("quantization_config", c).update(format_version=version))
    refused(damaged, file, f"format version {version}; this cospadi reads versions 1 and 2")


def test_a_model_that_version_1_can_tell_is_read_in_version_2_and_saved_in_1(
    dense_folder: Path, prompt: Tensor, tmp_path: Path
) -> None:
    expected = logits(write(Form("stored", "mask", "f14"), dense_folder, tmp_path / "old"), prompt)
    told = schema.read_config(tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "new")

    def spell(config: dict[str, Any]) -> None:
        entries = {name: entry.model_dump() for name, entry in told.items()}
        config["quantization_config"].update(format_version=2, projections=entries)

    edit_json(tmp_path / "new" / "config.json", spell)
    assert schema.read_config(tmp_path / "new") == told
    model = load(tmp_path / "new", dtype=torch.float32)
    torch.testing.assert_close(logits(model, prompt), expected, rtol=1e-3, atol=1e-4)
    load(tmp_path / "new").save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "old" / "config.json").read_bytes()


# Twelve bits, from recipe to loaded model


def decoded_by_integers(stream: Tensor, count: int) -> Tensor:
    """12-bit values as docs/format.md has them: the top bits of a bf16 in one little-endian bit stream."""
    number = int.from_bytes(bytes(stream.tolist()), "little")
    codes = [number >> 12 * i & 0xFFF for i in range(count)]
    return torch.tensor([code << 4 for code in codes], dtype=torch.int32).to(torch.int16).view(torch.bfloat16).double()


def dense_model(dense: Path, compressed: Path) -> Any:
    """The dense model with the products of a checkpoint's decoded factors as its weights, float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    tensors = load_file(compressed / "model.safetensors")
    for name, entry in schema.read_config(compressed).items():
        bits = np.unpackbits(tensors[f"{name}.support"].numpy(), axis=1, bitorder="little")[:, : entry.k]
        coefficients = torch.zeros(entry.d2, entry.k, dtype=torch.float64)
        coefficients[torch.from_numpy(bits).bool()] = decoded_by_integers(tensors[f"{name}.values"], entry.nnz)
        atoms = tensors.get(f"{entry.owner}.dictionary")
        assert (atoms is None) == (entry.dictionary == "identity")
        weight = coefficients if atoms is None else coefficients @ atoms.double()
        model.get_submodule(name).weight.data.copy_(weight)
    return model.eval()


@pytest.mark.parametrize("solver", ["htp", "mod-htp", "ksvd"])
def test_twelve_bits_from_recipe_to_loaded_model(
    solver: str, dense_folder: Path, run: Callable[..., Answer], prompt: Tensor, tmp_path: Path
) -> None:
    flags = ["--ratio", 0.3, "--value-bits", 12, "--solver", solver, "--iterations", 2, "--metric", "weights", "--json"]
    out = tmp_path / "out"
    done, planned = run("compress", dense_folder, *flags, "-o", out), run("plan", dense_folder, *flags)
    assert (done.code, planned.code) == (0, 0), done.err + planned.err
    plan, report = json.loads(planned.out), json.loads(done.out)
    assert {group["value_bits"] for group in plan["groups"]} == {12}
    assert plan["compressed_bytes"] == report["compressed_bytes"]
    assert plan["checkpoint_bytes_after"] == safetensors.tensor_bytes(out)
    assert 0.3 <= report["ratio_reached"] < 0.32
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    manifest = json.loads((out / "cospadi.json").read_text())
    assert config["format_version"] == manifest["format_version"] == 2
    assert {entry["values"] for entry in config["projections"].values()} == {"f12"}
    assert {entry["layout"] for entry in manifest["projections"].values()} == {
        "identity mask" if solver == "htp" else "sparse-dictionary"
    }
    inspected = json.loads(run("inspect", out, "--json").out)
    assert {item["value_bits"] for item in inspected["projections"].values()} == {12}
    assert inspected["compressed_bytes"] == plan["compressed_bytes"]
    assert run("verify", out).code == 0

    expected, model = dense_model(dense_folder, out), load(out, dtype=torch.float32)
    torch.testing.assert_close(logits(model, prompt), logits(expected, prompt), rtol=1e-3, atol=1e-4)
    again = load(out)
    ids = prompt[:1]
    assert torch.equal(
        model.generate(ids, max_new_tokens=4, do_sample=False),
        expected.generate(ids, max_new_tokens=4, do_sample=False),
    )
    again.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json", "cospadi.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_a_plan_of_twelve_bits_is_followed_from_its_file(
    dense_folder: Path, quick: dict[str, Any], tmp_path: Path
) -> None:
    recipe = cospadi.Recipe.build(quick | {"value_bits": 12})
    plan = cospadi.measure_plan(dense_folder, recipe)
    write_plan(plan, recipe, tmp_path / "plan.json")
    result = cospadi.compress(dense_folder, None, tmp_path / "out", plan=tmp_path / "plan.json")
    assert result.plan == plan
    assert {entry.values for entry in schema.read_config(tmp_path / "out").values()} == {"f12"}
    with pytest.raises(cospadi.UserError, match="was made with value_bits 12, not 14"):
        cospadi.compress(dense_folder, quick | {"value_bits": 14}, tmp_path / "other", plan=tmp_path / "plan.json")
    with pytest.raises(cospadi.UserError, match=r"stores values of .* as f12; the recipe asks for f14"):
        cospadi.compress(dense_folder, quick | {"value_bits": 14, "ratio": 0.2}, tmp_path / "other", plan=plan)


def test_a_short_solve_of_the_default_recipe_with_twelve_bits(
    dense_folder: Path, default: dict[str, Any], tmp_path: Path
) -> None:
    """Budgets, Fisher weights and compensation take the codec as it comes."""
    result = cospadi.compress(dense_folder, default | {"value_bits": 12}, tmp_path / "out")
    assert 0.3 <= result.plan.ratio < 0.32
    assert verify.verify(tmp_path / "out") == len(safetensors.tensor_sizes(tmp_path / "out"))


@pytest.fixture(params=DICTIONARIES)
def masked(request: Any, make_llama: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint of masks that do not fill their bytes and of 12-bit values, to damage."""
    dense = make_llama(hidden_size=36, num_attention_heads=2, num_key_value_heads=1)
    write(Form(request.param, "mask", "f12"), dense, tmp_path / "masked")
    return tmp_path / "masked"


def test_damaged_masks_and_values_of_version_2_are_refused(masked: Path, tmp_path: Path) -> None:
    k = schema.read_config(masked)[GATE].k
    assert k % 8

    def move(part: bytearray) -> None:
        used = next(bit for bit in range(8) if part[0] >> bit & 1)
        part[0] ^= 1 << used
        part[k // 8] |= 1 << k % 8

    odd = next(name for name, entry in schema.read_config(masked).items() if entry.nnz % 2)
    for tensor, change, problem in (
        (f"{GATE}.support", flip(7, 2), "bits set, config.json says"),
        (f"{GATE}.support", move, f"bits set past atom {k - 1}"),
        (f"{odd}.values", flip(-1, 7), "past its last value"),
    ):
        damaged = Path(shutil.copytree(masked, tmp_path / "damaged", dirs_exist_ok=True))
        edit_bytes(damaged, tensor, change)
        refused(damaged, "model.safetensors", tensor, problem)
    for fields in ({"nnz": 4}, {"values": "f14"}):
        damaged = Path(shutil.copytree(masked, tmp_path / "damaged", dirs_exist_ok=True))
        change_entry(damaged, lambda entry, fields=fields: entry.update(fields))
        refused(damaged, "model.safetensors", GATE)
