"""A part of a stored S is what that part of all of it is."""

from __future__ import annotations

import pytest
import torch
from forms import entry_of, random_part
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.format.cut import cut
from cospadi.format.form import FORMS, Form

CHOSEN = [form for form in FORMS if form.support_kind.chosen and form.dictionary == "identity"]


@pytest.mark.parametrize("form", CHOSEN, ids=lambda form: form.values)
@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_what_is_cut_and_packed_again_is_what_was_stored(form: Form, d2: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors, whole, count = random_part(form, d2, k, generator)
    support, values = tensors[form.names.support], tensors[form.names.values]
    outputs, atoms = (torch.rand(size, generator=generator) < 0.5 for size in (d2, k))
    outputs[-1] = atoms[-1] = True
    support, values = cut(entry_of(form, k, d2, k, count, "p", 0), support, values, outputs, atoms)
    rows, columns = int(outputs.sum()), int(atoms.sum())
    kind, left = form.support_kind, int(form.support_kind.unpack(support, columns).sum())
    assert kind.problem(support, rows, columns, left) is None
    assert form.codec.problem(values, [left]) is None
    assert list(values.shape) == form.codec.shape([left])
    decoded = kind.scatter(support, form.codec.decode(values, [left]), rows, columns)
    assert torch.equal(decoded.double(), whole[outputs][:, atoms])
