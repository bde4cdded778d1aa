"""The Gram matrices of bf16 entries by the package's own library."""

from __future__ import annotations

import pytest
import torch

from cospadi import native

pytestmark = pytest.mark.skipif(not native.takes_grams(), reason="this CPU has no AVX-512 BF16")


@pytest.mark.parametrize("rows", [0, 1, 31, 512, 1300])
@pytest.mark.parametrize("d", [1, 7, 32, 33, 200])
def test_it_is_the_product_in_float64(rows: int, d: int) -> None:
    x = torch.randn(rows, d, generator=torch.Generator().manual_seed(rows + d)).bfloat16()
    found, expected = native.gram(x), x.double().T @ x.double()
    scale = torch.outer(expected.diagonal().sqrt(), expected.diagonal().sqrt())
    assert found.dtype == torch.float32
    assert torch.equal(found, found.T)
    assert ((found - expected).abs() <= 2e-6 * scale).all()


def test_neither_threads_nor_strides_change_a_bit() -> None:
    x = torch.randn(700, 2 * 150, generator=torch.Generator().manual_seed(0)).bfloat16()[:, ::2]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(native.gram(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    assert torch.equal(found[0], native.gram(x.contiguous()))


def test_what_is_not_finite_stays_where_it_is() -> None:
    x = torch.ones(40, 50).bfloat16()
    x[3, 7] = float("inf")
    found = native.gram(x).isfinite()
    assert not found[7].any()
    found[7] = found[:, 7] = True
    assert found.all()
