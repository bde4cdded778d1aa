"""Codecs one by one, and the one that version 1 of the format cannot tell, from the recipe to the loaded model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import cospadi
from cospadi.format import schema, verify
from cospadi.format.codecs import CODECS
from cospadi.format.form import Form
from cospadi.format.kinds import Codec
from cospadi.format.supports import SUPPORTS
from cospadi.runtime.layer import CompressedLinear

CODED = pytest.mark.parametrize(
    "codec", [codec for codec in CODECS.values() if not codec.levels], ids=lambda it: it.name
)
"""Codecs of single numbers."""
EXPONENT, LARGEST = 8, 3.3895313892515355e38
values = hnp.arrays(
    np.float32, st.integers(0, 40), elements=st.floats(-LARGEST, LARGEST, width=32, allow_subnormal=False)
)


def rounded(numbers: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """The nearest number of so many bits (one of sign, eight of exponent), ties to even; too large ones saturate."""
    mantissa = bits - 1 - EXPONENT
    exact = numbers.astype(np.float64)
    _, exponents = np.frexp(exact)  # |x| in [2^(e-1), 2^e)
    step = np.exp2(np.maximum(exponents - 1, -126).astype(np.float64) - mantissa)
    largest = (2 - 2.0**-mantissa) * 2.0**127
    return np.clip(np.rint(exact / step) * step, -largest, largest)


@CODED
@given(numbers=values)
def test_decoding_gives_the_nearest_number(codec: Codec, numbers: np.ndarray[Any, Any]) -> None:
    stored = codec.encode(torch.from_numpy(numbers))
    assert stored.dtype == codec.dtype
    assert list(stored.shape) == codec.shape([len(numbers)])
    assert stored.numel() * stored.element_size() == codec.nbytes([len(numbers)]) == -(-len(numbers) * codec.bits // 8)
    np.testing.assert_array_equal(codec.decode(stored, [len(numbers)]).double().numpy(), rounded(numbers, codec.bits))


@CODED
def test_rounded_values_are_those_that_come_back(codec: Codec) -> None:
    """Of any shape, and of what overflows; and no further from the values than half a step."""
    numbers = torch.exp(torch.linspace(-80, 80, 10_000)) * torch.tensor([1.0, -1.0]).repeat(5_000)
    numbers[:3] = torch.tensor([0.0, 3.4e38, -3.4e38])
    found = codec.rounded(numbers.view(100, 100))
    assert (found.shape, found.dtype) == ((100, 100), torch.float32)
    assert torch.equal(found.flatten(), codec.decode(codec.encode(numbers), [len(numbers)]))
    relative = (found.flatten() - numbers)[3:] / numbers[3:]
    assert float(relative.abs().max()) <= 2.0 ** (8 - codec.bits)


@CODED
@given(shape=st.tuples(*[st.integers(1, 20)] * 3), support=st.sampled_from(list(SUPPORTS)), data=st.data())
def test_bytes_of_a_form_are_those_of_its_tensors(
    codec: Codec, shape: tuple[int, int, int], support: str, data: st.DataObject
) -> None:
    d1, d2, k = shape
    chosen = SUPPORTS[support].chosen
    nnz = data.draw(st.integers(1, k * d2)) if chosen else 0
    entry = schema.StoredProjection(
        dictionary="stored", support=support, values=codec.name, d1=d1, d2=d2, k=k, nnz=nnz, owner="p"
    )
    layer = CompressedLinear(d1, d2, k, nnz, entry.form, dtype=torch.bfloat16)
    found = {f"p.{name}": tensor for name, tensor in layer.state_dict().items()}
    assert {name: list(tensor.shape) for name, tensor in found.items()} == {
        name: shape for name, (_, shape) in entry.tensors("p").items()
    }
    total = sum(tensor.numel() * tensor.element_size() for tensor in found.values())
    assert total == Form("stored", support, codec.name).nbytes(d1, [d2], k, [entry.count]).total


def test_recipes_ask_for_the_codecs_that_there_are() -> None:
    asked, _ = get_args(cospadi.Recipe.model_fields["value_bits"].annotation)
    assert sorted(get_args(asked)) == sorted(codec.bits for codec in CODECS.values() if not codec.levels)


# f12, which version 1 does not know


@pytest.fixture(scope="module")
def twelve(dense_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> cospadi.Compressed:
    fields = {
        "ratio": 0.3,
        "iterations": 4,
        "gradient_sequences": 1,
        "refine": 2,
        "value_bits": 12,
    }
    text = {"calibration": str(text_file), "sequences": 4, "length": 32}
    return cospadi.compress(dense_folder, fields | text, tmp_path_factory.mktemp("twelve") / "out")


@pytest.fixture
def folder(twelve: cospadi.Compressed) -> Path:
    assert twelve.folder is not None
    return twelve.folder


def dense_weights(folder: Path) -> dict[str, torch.Tensor]:
    """S^T of every projection, where D = I, float32, decoded by numpy from what config.json and docs/format.md say."""
    tensors, found = load_file(folder / "model.safetensors"), {}
    for name, entry in schema.read_config(folder).items():
        bits = np.unpackbits(tensors[f"{name}.values"].numpy(), bitorder="little")[: 12 * entry.nnz].reshape(-1, 12)
        patterns = (bits.astype(np.uint32) << np.arange(20, 32, dtype=np.uint32)).sum(1, dtype=np.uint32)
        mask = np.unpackbits(tensors[f"{name}.support"].numpy(), axis=1, bitorder="little")[:, : entry.k].astype(bool)
        coefficients = np.zeros(mask.shape, np.float32)
        coefficients[mask] = patterns.view(np.float32)
        assert entry.dictionary == "identity"
        found[name] = torch.from_numpy(coefficients)
    return found


def test_f12_is_loaded_as_it_is_specified(folder: Path, dense_folder: Path, twelve: cospadi.Compressed) -> None:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2
    assert {entry["values"] for entry in config["projections"].values()} == {"f12"}
    assert verify.verify(folder) > 0
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(dense_folder, dtype=torch.float32)
    for name, weight in dense_weights(folder).items():
        plain.get_submodule(name).weight.data = weight
    tokens = torch.arange(2, 34).view(2, 16)
    with torch.inference_mode():
        wanted, found = plain(tokens).logits, model(tokens).logits
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
        assert torch.equal(twelve.model(tokens).logits, AutoModelForCausalLM.from_pretrained(folder)(tokens).logits)
        compiled = torch.compile(model, backend="eager", fullgraph=True)(tokens).logits
        torch.testing.assert_close(compiled, wanted, rtol=1e-3, atol=1e-3)
    assert model.generate(tokens[:1, :4], max_new_tokens=4, do_sample=False).shape == (1, 8)


def test_f12_takes_fewer_bytes_than_f14_at_equal_sizes() -> None:
    sizes = [Form("stored", "mask", name).nbytes(48, [80], 30, [800]).total for name in ("f12", "f14", "bf16")]
    assert sizes == [2 * 48 * 30 + 80 * 4 + 1200, 2 * 48 * 30 + 80 * 4 + 1400, 2 * 48 * 30 + 80 * 4 + 1600]


def test_f12_is_saved_again_as_it_was(folder: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert schema.read_config(tmp_path) == schema.read_config(folder)
    verify.verify(tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"values": "f13"}, "f13 is not known to this cospadi. It knows bf16, f14, f12, f10"),
        ({"support": "4:2"}, "4:2 is not known to this cospadi. It knows mask, full"),
        ({"dictionary": "none"}, "none is not known to this cospadi. It knows stored, identity"),
        ({"values": "f14"}, r"config\.json asks for U8"),
        ({"support": "full"}, "has all of S, for which nnz is 0"),
        ({"layout": "sparse-dictionary"}, "layout"),
        ({"owner": "nobody"}, "names nobody as the owner of its dictionary"),
        ({"dictionary": "stored"}, r"dictionary is in none of the checkpoint's files"),
    ],
    ids=str,
)
def test_a_config_of_version_2_that_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, copied: Callable[[Path, Path], Path], change: dict[str, Any], sentence: str
) -> None:
    damaged = copied(folder, tmp_path / "damaged")
    config = json.loads((damaged / "config.json").read_text())
    next(iter(config["quantization_config"]["projections"].values())).update(change)
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(cospadi.UserError, match=sentence):
        verify.read_checkpoint(damaged)
    with pytest.raises(cospadi.UserError, match=sentence):
        AutoModelForCausalLM.from_pretrained(damaged)


@pytest.mark.parametrize("part", ["support", "values"])
def test_tensors_of_version_2_are_checked_like_those_of_version_1(
    folder: Path, tmp_path: Path, copied: Callable[[Path, Path], Path], part: str
) -> None:
    damaged = copied(folder, tmp_path / "damaged")
    path = damaged / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(f".{part}"))
    tensors[name] = tensors[name].roll(1).bitwise_not() if part == "support" else tensors[name][:-1]
    save_file(tensors, path, {"format": "pt"})
    (damaged / "cospadi.json").unlink()
    with pytest.raises(cospadi.CheckpointError, match=name.replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(damaged)


@pytest.fixture
def copied() -> Callable[[Path, Path], Path]:
    """Copies a folder."""

    def copy(source: Path, target: Path) -> Path:
        target.mkdir()
        for path in source.iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        return target

    return copy
