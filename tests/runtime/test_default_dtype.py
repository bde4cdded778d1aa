"""What is decoded does not depend on the dtype that torch makes tensors of, which engines set to the model's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from codes import random_code
from forms import entry_of, random_part

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
