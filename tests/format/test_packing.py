"""Packing against numpy and Python integers, and round trips."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.format import packing

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.integers(1, 70), st.integers(0, 20), st.integers(0, 2**32 - 1))
def test_support_matches_numpy_and_comes_back(k: int, d2: int, seed: int) -> None:
    support = np.random.default_rng(seed).random((d2, k)) < 0.4
    mask = packing.pack_support(torch.from_numpy(support))
    assert np.array_equal(mask.numpy(), np.packbits(support, axis=1, bitorder="little"))
    assert np.array_equal(packing.unpack_support(mask, k).numpy(), support)
    assert packing.popcount(mask) == support.sum()
    assert not packing.has_padding_bits(mask, k)


def test_padding_bits_are_seen() -> None:
    mask = torch.zeros(3, 2, dtype=torch.uint8)
    mask[1, 1] = 0b1000_0000
    assert packing.has_padding_bits(mask, 15)
    assert not packing.has_padding_bits(mask, 16)


@given(st.lists(finite, max_size=40), st.sampled_from([10, 12, 14, 16]))
def test_values_come_back_as_rounded_once(values: list[float], bits: int) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    packed = packing.pack_values(tensor, bits)
    back = packing.unpack_values(packed, len(values), bits)
    assert torch.equal(packing.pack_values(back, bits), packed)  # the second rounding changes nothing
    for original, stored in zip(values, back.tolist(), strict=True):
        assert stored == nearest_even(original, bits)


def nearest_even(value: float, bits: int) -> float:
    """The closest float32 whose low 32 - bits bits are zero, ties to the even pattern, saturating: by exact search."""
    pattern = int(np.float32(abs(value)).view(np.uint32))
    step = 1 << (32 - bits)
    low = pattern // step * step
    largest = (0x7F800000 // step - 1) * step
    candidates = [low, low + step]
    best = min(candidates, key=lambda c: (abs(c - pattern), (c // step) % 2))
    result = float(np.uint32(min(best, largest)).view(np.float32))
    return -result if np.signbit(np.float32(value)) else result


@given(st.lists(finite, max_size=40))
def test_sixteen_bits_are_torch_bfloat16(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    expected = tensor.clamp(-3.3895313892515355e38, 3.3895313892515355e38).to(torch.bfloat16)
    assert torch.equal(packing.pack_values(tensor, 16), expected)


@given(st.lists(finite, min_size=1, max_size=30))
def test_stream_is_the_documented_one(values: list[float]) -> None:
    codes = packing.to_codes(torch.tensor(values, dtype=torch.float32), 14).tolist()
    number = sum(code << (14 * i) for i, code in enumerate(codes))
    expected = number.to_bytes((14 * len(codes) + 7) // 8, "little")
    assert bytes(packing.pack_values(torch.tensor(values), 14).tolist()) == expected


@pytest.mark.parametrize("nnz", [1, 2, 3, 4, 5])
def test_unused_value_bits_are_seen(nnz: int) -> None:
    stream = packing.pack_values(torch.randn(nnz), 14)
    assert not packing.unused_value_bits_set(stream, nnz, 14)
    if 14 * nnz % 8:
        stream[-1] |= 0b1000_0000
        assert packing.unused_value_bits_set(stream, nnz, 14)


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_coefficients_are_laid_out_column_by_column(k: int, d2: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    support = random.random((d2, k)) < 0.5
    dense = np.where(support, random.standard_normal((d2, k)), 0).astype(np.float32)
    mask = packing.pack_support(torch.from_numpy(support))
    values = torch.from_numpy(dense[support])
    assert np.array_equal(packing.unpack_coefficients(mask, values, k).numpy(), dense)
