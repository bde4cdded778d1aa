"""The one op, `cospadi::sparse_matmul`: z S for coefficients S stored as a support mask and packed values.

Registered with torch.library, so that torch.compile, torch.export and autograd see it whole. It runs the C++ kernels
on CPU and the Triton kernels on GPU, which read the packed form as it is, and the reference in plain torch elsewhere.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cospadi import compat
from cospadi.budget import accounting
from cospadi.format import packing
from cospadi.runtime import cpu, reference

gpu: ModuleType | None = None
if torch.cuda.is_available():
    from cospadi.runtime import triton

    gpu = triton  # importing Triton takes a while: not where there is no GPU


def has_kernel(z: Tensor, support: Tensor, values: Tensor, value_bits: int) -> bool:
    """Whether z S is multiplied from the packed form here, so that S need not be unpacked."""
    if gpu is not None and z.is_cuda:
        return bool(gpu.can_multiply(z, support, values, value_bits))
    return cpu.can_multiply(z, support, values, value_bits)


def dense_matmul(x: Tensor, matrix: Tensor) -> Tensor:
    """z = x matrix^T, in x's dtype.

    An ordinary linear product, which compilers and autograd see as such; where nothing looks on, a few rows are
    multiplied by a kernel that reads the matrix faster than torch does.

    Args:
        x: (..., d1). matrix: (k, d1).
    """
    if not _is_watched(x, matrix) and not torch.is_autocast_enabled("cpu") and cpu.can_multiply_dense(x, matrix):
        return cpu.dense_matmul(x, matrix)
    return torch.nn.functional.linear(x, matrix.to(x.dtype))


def _is_watched(x: Tensor, weights: Tensor) -> bool:
    """Whether a compiler, a tracer, autograd or a tensor subclass has to see a product, or it has no numbers."""
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad)
    return (
        needs_gradient
        or type(x) is not Tensor
        or x.device.type == "meta"
        or torch.compiler.is_compiling()
        or compat.is_traced()
        or compat.is_dispatch_intercepted()
    )


def sparse_matmul(
    z: Tensor,
    support: Tensor,
    values: Tensor,
    offsets: Tensor | None,
    k: int,
    value_bits: int,
    dense: Tensor | None = None,
) -> Tensor:
    """y = z S.

    Args:
        z: (..., k), any float dtype.
        support: uint8 (d2, ceil(k / 8)), row c is the support mask of column c of S.
        values: the nonzeros in column order: a packed stream as `packing.pack_values` makes it, or float (nnz,) with
            value_bits 0, in which case gradients reach them.
        offsets: int32 (d2 + 1,), `packing.column_offsets(support)` where the caller keeps it.
        k: atoms.
        value_bits: width of the packed values; 0 for plain floats.
        dense: S transposed, (d2, k) in z's dtype, where the caller keeps it unpacked.

    Returns:
        (..., d2) in z's dtype.
    """
    if _is_watched(z, values):
        y: Tensor = _sparse_matmul(z, support, values, offsets, k, value_bits, dense)
        return y
    # Nobody needs to see the op: calling it through torch's dispatcher costs as much as a small product.
    return _multiply(z, support, values, offsets, k, value_bits, dense)


def _multiply(
    z: Tensor,
    support: Tensor,
    values: Tensor,
    offsets: Tensor | None,
    k: int,
    value_bits: int,
    dense: Tensor | None,
) -> Tensor:
    if z.dim() == 0 or z.shape[-1] != k or support.shape[1:] != (accounting.support_row_bytes(k),):
        raise ValueError(
            f"z is {list(z.shape)} and the support mask {list(support.shape)}, which do not belong to {k} atoms"
        )
    if dense is not None:
        return torch.nn.functional.linear(z, dense)
    if not has_kernel(z, support, values, value_bits):
        return torch.nn.functional.linear(z, reference.coefficients(support, values, k, value_bits, z.dtype))
    if offsets is None:
        offsets = packing.column_offsets(support)
    kernels = gpu if gpu is not None and z.is_cuda else cpu
    y: Tensor = kernels.sparse_matmul(z, support, values, offsets, k, value_bits)
    return y


_sparse_matmul = torch.library.custom_op("cospadi::sparse_matmul", _multiply, mutates_args=())


@_sparse_matmul.register_fake
def _(
    z: Tensor,
    support: Tensor,
    values: Tensor,
    offsets: Tensor | None,
    k: int,
    value_bits: int,
    dense: Tensor | None,
) -> Tensor:
    return z.new_empty((*z.shape[:-1], support.shape[0]))


def coefficients(
    support: Tensor, values: Tensor, offsets: Tensor | None, k: int, value_bits: int, dtype: torch.dtype
) -> Tensor:
    """S transposed as a dense (d2, k) matrix, exact in float32 and bf16; arguments as for `sparse_matmul`."""
    if cpu.can_multiply(support.new_empty(0, dtype=torch.float32), support, values, value_bits):
        offsets = packing.column_offsets(support) if offsets is None else offsets
        return cpu.unpack(support, values, offsets, k, value_bits, dtype)
    return reference.coefficients(support, values, k, value_bits, dtype)


@torch.library.custom_op("cospadi::value_gradient", mutates_args=())
def _value_gradient(z: Tensor, grad: Tensor, support: Tensor, values: Tensor, k: int) -> Tensor:
    """Gradient of float values (nnz,), an op of its own because its work depends on data the compiler cannot see."""
    return reference.value_gradient(z, grad, support, k).to(values.dtype)


@_value_gradient.register_fake
def _(z: Tensor, grad: Tensor, support: Tensor, values: Tensor, k: int) -> Tensor:
    return torch.empty_like(values)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, support, values, _, ctx.k, ctx.value_bits, dense = inputs
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
    return grad_z, None, grad_values, None, None, None, None


_sparse_matmul.register_autograd(_backward, setup_context=_setup_context)
