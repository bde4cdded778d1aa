"""What training moves of stored values: it comes back as it was stored, in as many bytes, and gradients are right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forms import random_part
from torch import Tensor

from cospadi.format.codecs import CODECS
from cospadi.format.codecs.ec import EC
from cospadi.format.form import Form

D2, K = 24, 40
FORMS = [
    Form("identity", "full" if codec.levels else "mask", name)
    for name, codec in CODECS.items()
    if name in ("bf16", "f14", "f10", "ec", "int2", "int3g64", "int8")
]


def part_of(form: Form) -> tuple[Tensor, list[int]]:
    tensors, _, count = random_part(form, D2, K, torch.Generator().manual_seed(3))
    shape = form.support_kind.values_shape(D2, K, count)
    return tensors[form.names.values], shape


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.values)
def test_unmoved_it_is_what_was_stored(form: Form) -> None:
    stored, shape = part_of(form)
    tuned = form.codec.tuned(stored, shape, K)
    numbers = {name: tuned.rounded(name, one) for name, one in tuned.numbers.items()}
    assert all(torch.equal(numbers[name], tuned.numbers[name]) for name in numbers)
    assert torch.equal(tuned.values(numbers).view(shape), form.codec.decode(stored, shape))
    assert torch.equal(tuned.stored(numbers), stored)
    assert numbers.keys() == tuned.units.keys()
    assert all(unit > 0 for unit in tuned.units.values())


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.values)
def test_moved_it_comes_back_as_it_was_rounded_in_as_many_bytes(form: Form) -> None:
    stored, shape = part_of(form)
    tuned = form.codec.tuned(stored, shape, K)
    generator = torch.Generator().manual_seed(5)
    for size in (0.1, 3.0):  # the second beyond every range
        moved = {
            name: tuned.rounded(name, one + size * tuned.units[name] * torch.randn(one.shape, generator=generator))
            for name, one in tuned.numbers.items()
        }
        again = {name: tuned.rounded(name, one) for name, one in moved.items()}
        assert all(torch.equal(moved[name], again[name]) for name in moved)
        written = tuned.stored(moved)
        assert written.dtype == stored.dtype
        assert written.shape == stored.shape
        assert form.codec.problem(written, shape) is None
        torch.testing.assert_close(
            form.codec.decode(written, shape), tuned.values(moved).view(shape), rtol=1e-6, atol=0
        )
        assert not torch.equal(written, stored)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.values)
def test_gradients_are_those_of_what_is_rounded(form: Form) -> None:
    """Against differences, of steps of a code against those of 2^(q / 4)."""
    stored, shape = part_of(form)
    tuned = form.codec.tuned(stored, shape, K)
    numbers = {name: one.clone().requires_grad_() for name, one in tuned.numbers.items()}
    wanted = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    (tuned.values(numbers).view(shape) * wanted).sum().backward()
    for name, one in numbers.items():
        direction = torch.randn(one.shape, generator=torch.Generator().manual_seed(9))
        assert one.grad is not None
        slope = float((one.grad * direction).sum())
        difference = sum(
            sign * float((value(tuned, numbers, name, sign * 1e-3 * direction).view(shape) * wanted).double().sum())
            for sign in (1, -1)
        )
        assert slope == pytest.approx(difference / 2e-3, rel=2e-2, abs=1e-2 * abs(slope) + 1e-3)


def value(tuned: Any, numbers: dict[str, Tensor], name: str, change: Tensor) -> Tensor:
    """The values where one of the tensors has changed, by formulas of this test."""
    numbers = {key: one.detach().double() for key, one in numbers.items()}
    numbers[name] = numbers[name] + change.double()
    if "entries" in numbers:
        return numbers["entries"]
    if "levels" in numbers:
        codec = tuned.codec
        group = torch.arange(K) // (codec.group or K)
        return (numbers["levels"] - tuned.zeros[:, group]) * numbers["scales"][:, group]
    levels, outputs, inputs = EC.decode_levels(tuned.code)
    before = tuned.numbers
    outputs = outputs.double() * 2 ** ((numbers["outputs"] - before["outputs"]) / 4)
    inputs = inputs.double() * 2 ** ((numbers["inputs"] - before["inputs"]) / 4)
    return levels * outputs[:, None] * inputs * numbers["unit"].exp()


def test_the_code_of_levels_is_untouched() -> None:
    stored, shape = part_of(FORMS[[form.values for form in FORMS].index("ec")])
    tuned = EC.tuned(stored, shape, K)
    moved = {name: tuned.rounded(name, one + 2) for name, one in tuned.numbers.items()}
    written = tuned.stored(moved)
    assert torch.equal(EC.decode_levels(written)[0], EC.decode_levels(stored)[0])
    head = len(EC.head(stored))
    assert torch.equal(written[head:], stored[head:])
