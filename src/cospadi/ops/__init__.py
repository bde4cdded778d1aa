"""The one op, `cospadi::sparse_matmul`: z S for coefficients S stored as a support mask and packed values.

Registered with torch.library, so that torch.compile, torch.export and autograd see it whole. The reference in plain
torch is its only backend so far.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cospadi.ops import reference


@torch.library.custom_op("cospadi::sparse_matmul", mutates_args=())
def sparse_matmul(
    z: Tensor, support: Tensor, values: Tensor, k: int, value_bits: int, dense: Tensor | None = None
) -> Tensor:
    """y = z S.

    Args:
        z: (..., k), any float dtype.
        support: uint8 (d2, ceil(k / 8)), row c is the support mask of column c of S.
        values: the nonzeros in column order: a packed stream as `packing.pack_values` makes it, or float (nnz,) with
            value_bits 0, in which case gradients reach them.
        k: atoms.
        value_bits: width of the packed values; 0 for plain floats.
        dense: S transposed, (d2, k) in z's dtype, where the caller keeps it unpacked; else it is unpacked here.

    Returns:
        (..., d2) in z's dtype.
    """
    if dense is None:
        dense = reference.coefficients(support, values, k, value_bits, z.dtype)
    return torch.nn.functional.linear(z, dense)


@sparse_matmul.register_fake
def _(z: Tensor, support: Tensor, values: Tensor, k: int, value_bits: int, dense: Tensor | None = None) -> Tensor:
    return z.new_empty((*z.shape[:-1], support.shape[0]))


@torch.library.custom_op("cospadi::value_gradient", mutates_args=())
def _value_gradient(z: Tensor, grad: Tensor, support: Tensor, values: Tensor, k: int) -> Tensor:
    """Gradient of float values (nnz,), an op of its own because its work depends on data the compiler cannot see."""
    return reference.value_gradient(z, grad, support, k).to(values.dtype)


@_value_gradient.register_fake
def _(z: Tensor, grad: Tensor, support: Tensor, values: Tensor, k: int) -> Tensor:
    return torch.empty_like(values)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, support, values, ctx.k, ctx.value_bits, dense = inputs
    ctx.save_for_backward(z, support, values, dense)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    z, support, values, dense = ctx.saved_tensors
    grad_z = grad_values = None
    if ctx.needs_input_grad[0]:
        if dense is None:
            dense = reference.coefficients(support, values, ctx.k, ctx.value_bits, grad.dtype)
        grad_z = grad @ dense
    if ctx.needs_input_grad[2]:
        grad_values = _value_gradient(z, grad, support, values, ctx.k)
    return grad_z, None, grad_values, None, None, None


sparse_matmul.register_autograd(_backward, setup_context=_setup_context)
