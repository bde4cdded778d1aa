"""What is decoded does not depend on the dtype that torch makes tensors of, which engines set to the model's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from codes import random_code
from forms import entry_of, random_part

from cospadi import native
from cospadi.format import packing
from cospadi.format.form import FORMS, Form
from cospadi.runtime import op
from cospadi.runtime.levels import Levels, read_levels


@pytest.fixture
def narrow() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("form", [form for form in FORMS if form.dictionary == "identity"], ids=str)
def test_coefficients(form: Form, narrow: None) -> None:
    tensors, expected, count = random_part(form, 33, 41, torch.Generator().manual_seed(0))
    support, values = tensors.get(form.names.support), tensors[form.names.values]
    entry = entry_of(form, 41, 33, 41, count, "p", values.nbytes)
    torch.set_default_dtype(torch.bfloat16)
    sizes = entry.d2, entry.k
    found = op.coefficients(support, values, None, *sizes, form.support, form.values, torch.float32)
    assert torch.equal(found.double(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_entries_of_a_mask(dtype: torch.dtype, narrow: None) -> None:
    """On their way to a matrix and back, as training takes them."""
    generator = torch.Generator().manual_seed(0)
    chosen, matrix = torch.rand(300, 200, generator=generator) < 0.5, torch.randn(300, 200, generator=generator)
    mask, values = packing.pack_support(chosen), matrix[chosen]
    torch.set_default_dtype(dtype)
    found = op.coefficients(mask, values, None, 300, 200, "mask", None, torch.float32)
    assert torch.equal(found, matrix * chosen)
    assert torch.equal(op.entries(mask, matrix, None, "mask"), values)


@pytest.mark.skipif(not native.takes_grams(), reason="there are no products of bf16 here")
def test_grams(narrow: None) -> None:
    x = torch.randn(50, 70, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)
    found = native.gram(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), x.double().T @ x.double(), rtol=1e-5, atol=1e-4)


def test_levels(narrow: None) -> None:
    """Some of them too large for their bits."""
    stored = random_code(70, 64, torch.Generator().manual_seed(0), spread=12.0)
    expected = read_levels(stored)
    torch.set_default_dtype(torch.bfloat16)
    found = read_levels(stored)
    assert isinstance(expected, Levels)
    assert isinstance(found, Levels)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
