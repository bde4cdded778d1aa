"""Plain torch: what every other backend is held to."""

from __future__ import annotations

import torch
from torch import Tensor

from cospadi.format import packing


def coefficients(support: Tensor, values: Tensor, k: int, value_bits: int, dtype: torch.dtype) -> Tensor:
    """S transposed as a dense (d2, k) matrix; `values` is packed, or float where value_bits is 0."""
    if value_bits:
        # The number of values follows from the stream's length: fewer than value_bits bits are padding.
        nnz = values.numel() if value_bits == 16 else values.numel() * 8 // value_bits
        values = packing.unpack_values(values, nnz, value_bits)
    return packing.unpack_coefficients(support, values.to(dtype), k)


def value_gradient(z: Tensor, grad: Tensor, support: Tensor, k: int) -> Tensor:
    """Gradient of the nonzeros: entries of grad^T z on the support, in column order, float (nnz,)."""
    full = grad.flatten(0, -2).T @ z.flatten(0, -2)
    return full.masked_select(packing.unpack_support(support, k))
