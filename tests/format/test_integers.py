"""Integers with scales and zeros: bytes against docs/format.md, damage in a sentence, and models of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Answer
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import cospadi
from cospadi.budget.plan import Group, size_group, write_plan
from cospadi.format import schema, verify
from cospadi.format.codecs.integers import INTEGERS, Integers
from cospadi.format.form import Form
from cospadi.model.projections import Projection

NAMES = [f"int{bits}{group}" for bits in (2, 3, 4, 5, 6, 8) for group in ("g64", "g128", "")]


def numbers_of(stream: bytes, count: int, bits: int) -> np.ndarray[Any, Any]:
    """Number i is bits b i to b i + b - 1 of one little-endian stream."""
    number = int.from_bytes(stream, "little")
    return np.array([number >> bits * i & 2**bits - 1 for i in range(count)], dtype=np.int64)


def decoded(stored: bytes, d2: int, k: int, bits: int, group: int) -> np.ndarray[Any, Any]:
    """As docs/format.md has it, float32."""
    count = d2 * -(-k // group)
    ends = np.cumsum([2 * count, -(-bits * count // 8), -(-bits * d2 * k // 8)])
    assert ends[-1] == len(stored)
    patterns = np.frombuffer(stored[: ends[0]], "<u2").astype(np.uint32) << 16
    scales = patterns.view(np.float32).reshape(d2, -1)
    zeros = numbers_of(stored[ends[0] : ends[1]], count, bits).reshape(d2, -1)
    levels = numbers_of(stored[ends[1] :], d2 * k, bits).reshape(d2, k)
    own = np.arange(k) // group
    found: np.ndarray[Any, Any] = (levels - zeros[:, own]).astype(np.float32) * scales[:, own]
    return found


def random_levels(codec: Integers, d2: int, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels, scales that bf16 can tell, zeros."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 2**codec.bits, (d2, k), generator=generator)
    scales = torch.exp(4 * torch.randn(d2, codec.groups(k), generator=generator)).bfloat16()
    return levels, scales, torch.randint(0, 2**codec.bits, scales.shape, generator=generator)


@given(st.sampled_from(NAMES), st.integers(1, 12), st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_bytes_are_as_they_are_specified(name: str, d2: int, k: int, seed: int) -> None:
    codec = INTEGERS[name]
    levels, scales, zeros = random_levels(codec, d2, k, seed)
    stored = codec.encode_levels(levels, scales, zeros)
    bits, _, group = name.removeprefix("int").partition("g")
    assert (stored.dtype, list(stored.shape)) == (torch.uint8, codec.shape([d2, k]))
    assert codec.nbytes([d2, k]) == len(stored)
    found = codec.decode(stored, [d2, k])
    np.testing.assert_array_equal(found.numpy(), decoded(bytes(stored), d2, k, int(bits), int(group or k)))
    assert codec.problem(stored, [d2, k]) is None
    own = torch.arange(k) // int(group or k)
    assert torch.equal(found, (levels - zeros[:, own]) * scales.float()[:, own])


@pytest.mark.parametrize("name", NAMES)
def test_bits_a_weight(name: str) -> None:
    bits, _, group = name.removeprefix("int").partition("g")
    b, g = int(bits), int(group or 4096)
    assert 8 * INTEGERS[name].nbytes([1024, 4096]) == (b + (16 + b) / g) * 1024 * 4096


def test_damage_is_told() -> None:
    codec = INTEGERS["int3g64"]  # 3 outputs of 65 inputs: 6 scales, 18 bits of zeros, 585 of levels
    whole = codec.encode_levels(*random_levels(codec, 3, 65, 0))
    assert (len(whole), codec.problem(whole, [3, 65])) == (12 + 3 + 74, None)
    for place, bit, reason in (
        (14, 2, "has bits set past its last value"),
        (88, 1, "has bits set past its last value"),
    ):
        damaged = whole.clone()
        damaged[place] |= 1 << bit
        assert codec.problem(damaged, [3, 65]) == reason
    for pattern in (float("nan"), float("inf"), -float("inf"), 3e38):
        damaged = whole.clone()
        damaged[4:6] = torch.tensor([pattern]).bfloat16().view(torch.uint8)
        assert codec.problem(damaged, [3, 65]) == "has scales by which not all levels are finite numbers"


def sized(bits: float, d1: int, d2: int = 4096) -> Group | None:
    recipe = cospadi.Recipe.build(method="gptq", bits=bits).settled()
    return size_group((Projection("up", "up", 0, d1, d2),), recipe.ratio, recipe.rho, recipe)


@pytest.mark.parametrize(
    ("bits", "values"),
    [
        *((2.0, None), (2.01, "int2"), (2.15, "int2g128"), (2.28, "int2g128"), (2.29, "int2g64"), (3.0, "int2g64")),
        *((3.15, "int3g128"), (3.3, "int3g64"), (4.01, "int4"), (4.16, "int4g128"), (5.33, "int5g64")),
        *((6.3, "int6g128"), (6.35, "int6g64"), (8.2, "int8g128"), (15.9, "int8g64")),
    ],
)
def test_the_largest_that_fits_is_taken(bits: float, values: str | None) -> None:
    found = sized(bits, 4096)
    if values is None:
        assert found is None
        return
    assert found is not None
    assert found.form == Form("identity", "full", values)
    assert found.parts.total == INTEGERS[values].nbytes([4096, 4096]) <= bits / 16 * found.dense_bytes


def test_a_size_below_the_smallest_is_a_sentence(
    dense_folder: Path, run: Callable[..., Answer], tmp_path: Path
) -> None:
    answer = run("compress", dense_folder, "--bits", 1.5, "--method", "rtn", "-o", tmp_path / "out")
    least = INTEGERS["int2"].nbytes([48, 48])
    assert answer.code == 2
    assert f"it takes {least} bytes at least, 2.38 bits a weight, with all that levels need beside them" in answer.err
    assert "Use --bits 2.38 or more, or leave it dense with --exclude" in answer.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("share", ["none", "input"])
def test_from_a_plan_to_a_model_that_computes_with_what_is_specified(
    method: str, share: str, dense_folder: Path, quick: dict[str, Any], run: Callable[..., Answer], tmp_path: Path
) -> None:
    text = {name: quick[name] for name in ("calibration", "sequences", "length")}
    recipe = cospadi.Recipe.build(text | {"bits": 3.6, "method": method, "share": share})
    plan = cospadi.measure_plan(dense_folder, recipe)
    write_plan(plan, recipe, tmp_path / "plan.json")
    folder = tmp_path / "out"
    assert cospadi.compress(dense_folder, None, folder, plan=tmp_path / "plan.json").plan == plan
    assert verify.verify(folder) > 0
    entries, tensors = schema.read_config(folder), load_file(folder / "model.safetensors")
    assert {entry.values for entry in entries.values()} == {"int3", "int3g64"}  # of 48 inputs, and of 80
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(dense_folder, dtype=torch.float32)
    for name, entry in entries.items():
        group = 64 if entry.values == "int3g64" else entry.k
        weight = torch.from_numpy(decoded(bytes(tensors[f"{name}.values"]), entry.d2, entry.k, 3, group))
        assert torch.equal(model.get_submodule(name).dense_weight(), weight)
        plain.get_submodule(name).weight.data = weight
    tokens = torch.arange(2, 34).view(2, 16)
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, rtol=1e-3, atol=1e-3)
    inspected = json.loads(run("inspect", folder, "--json").out)
    assert {item["values"] for item in inspected["projections"].values()} == {"int3", "int3g64"}
    assert {item["value_bits"] for item in inspected["projections"].values()} == {3}
    assert inspected["compressed_bytes"] == plan.bytes
    assert "int3g64" in run("plan", dense_folder, "--bits", 3.6, "--method", method, "--metric", recipe.metric).out
