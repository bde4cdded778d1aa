"""Weights in memory of their own, in large pages, and dense layers that a kernel reads."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

import cospadi
from cospadi.format import verify
from cospadi.runtime import cpu, pages
from cospadi.runtime.dense import DenseLinear, read_fast


@pytest.mark.parametrize("nbytes", [0, 5, pages.LEAST - 1, pages.LEAST, 3 * pages.LEAST + 7])
def test_zeros_are_zeros_that_can_be_written(nbytes: int) -> None:
    found = pages.zeros(nbytes)
    assert (found.dtype, found.shape, int(found.sum())) == (torch.uint8, (nbytes,), 0)
    assert int((found + 1).sum()) == nbytes
    found.fill_(7)
    assert int(found.long().sum()) == 7 * nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_what_is_moved_is_equal(dtype: torch.dtype) -> None:
    small, large = torch.arange(12).view(3, 4).to(dtype), torch.arange(3 << 20).view(3, -1).to(dtype)
    assert pages.moved(small) is small
    copy = pages.moved(large)
    assert copy.data_ptr() != large.data_ptr()
    assert torch.equal(copy, large)
    turned = large.T
    assert pages.moved(turned) is turned


def linear(bias: bool = False, dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 50, bias, dtype=dtype))


@pytest.mark.parametrize("shape", [(96,), (1, 96), (2, 4, 96), (9, 96), (0, 96), (3, 20, 96)])
def test_a_dense_layer_computes_the_same(shape: tuple[int, ...]) -> None:
    model = linear()
    x = torch.randn(shape).bfloat16()
    with torch.no_grad():
        expected = torch.nn.functional.linear(x.double(), model[0].weight.double())
        read_fast(model)
        if cpu.can_multiply_dense(model[0].weight[:1], model[0].weight):
            assert type(model[0]) is DenseLinear
        torch.testing.assert_close(model(x).double(), expected, rtol=8e-3, atol=8e-3)


def test_gradients_pass_through_it() -> None:
    model, other = linear(), linear()
    read_fast(model)
    x = torch.randn(2, 96).bfloat16()
    for one in (model, other):
        one(x).sum().backward()
    assert torch.equal(model[0].weight.grad, other[0].weight.grad)


@pytest.mark.parametrize(("bias", "dtype"), [(True, torch.bfloat16), (False, torch.float32), (False, torch.float16)])
def test_what_the_kernel_does_not_take_stays_as_it_is(bias: bool, dtype: torch.dtype) -> None:
    model = linear(bias, dtype)
    read_fast(model)
    assert type(model[0]) is nn.Linear


@pytest.mark.skipif(sys.platform != "linux", reason="what is mapped is read from Linux's /proc")
@pytest.mark.parametrize("recipe", [{}, {"method": "paper"}, {"bits": 4}], ids=["masks", "dictionaries", "levels"])
def test_a_loaded_model_holds_no_file_and_stays_what_it_was(
    recipe: dict[str, Any], make_llama: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    dense = make_llama(tie_word_embeddings=True)
    quick = {"iterations": 1, "sequences": 2, "length": 16, "gradient_sequences": 1, "calibration": str(text_file)}
    quick |= {} if "bits" in recipe else {"refine": 0}
    cospadi.compress(dense, {**quick, **recipe}, tmp_path / "out")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert str(tmp_path / "out") not in Path("/proc/self/maps").read_text()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    if cpu.can_multiply_dense(model.lm_head.weight[:1], model.lm_head.weight):
        assert type(model.lm_head) is DenseLinear
    model.save_pretrained(tmp_path / "again")
    verify.verify(tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not tell what is in memory")
def test_pages_of_a_file_leave_memory_and_come_again(tmp_path: Path) -> None:
    """And nothing else does: of other memory they would be lost."""
    path, expected = tmp_path / "a\u2028name - of\x1ca kind.safetensors", torch.arange(1 << 21)
    save_file({"one": expected}, path)
    with safe_open(path, "pt") as file:
        tensor = file.get_tensor("one")
    assert torch.equal(tensor, expected)
    before = resident(path)
    if before < tensor.nbytes:
        pytest.skip("safetensors reads files here, and does not map them")
    pages.release(tensor, pages.mapped_files("kind.safetensors"))
    assert resident(path) < before - tensor.nbytes + (1 << 20)
    pages.release(expected, pages.mapped_files("kind.safetensors"))
    assert torch.equal(tensor, expected)
    assert int(expected[-1]) == len(expected) - 1


def resident(path: Path) -> int:
    """Bytes of a file that this process has in memory."""
    entries = Path("/proc/self/smaps").read_bytes().split(bytes(path))[1:]
    return sum(1024 * int(entry.split(b"Rss:")[1].split()[0]) for entry in entries)
