"""The ops: `cospadi::sparse_matmul`, z S for coefficients S stored with any support and any codec, and
`cospadi::level_matmul`, the same for levels of a code that were decoded to integers.

Registered with torch.library, so that torch.compile, torch.export and autograd see them whole. They run the C++ kernels
on CPU and the Triton kernels on GPU, which read the packed form as it is, and the reference in plain
torch elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cospadi import compat
from cospadi.errors import KernelError
from cospadi.format.codecs import CODECS
from cospadi.format.supports import SUPPORTS
from cospadi.runtime import cpu, reference
from cospadi.runtime.levels import Levels, all_levels

log = logging.getLogger("cospadi")

gpu: ModuleType | None = None
if torch.cuda.is_available():
    from cospadi.runtime import triton

    gpu = triton  # importing Triton takes a while: not where there is no GPU


def kernel_bits(kind: str, codec: str | None) -> int:
    """The width of the packed values for kernels; 0 where the support or the codec is none that they read."""
    return CODECS[codec].kernel_bits if codec is not None and SUPPORTS[kind].kernel else 0


def has_kernel(z: Tensor, support: Tensor | None, values: Tensor, kind: str, codec: str | None) -> bool:
    """Whether z S is multiplied from the packed form here, so that S need not be unpacked."""
    bits = kernel_bits(kind, codec)
    if support is None or not bits:
        return False
    return bool(_kernels(z).can_multiply(z, support, values, bits))


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
    return (
        type(x) is not Tensor
        or x.is_meta
        or (torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad))
        or torch.compiler.is_compiling()
        or compat.is_traced()
        or compat.is_dispatch_intercepted()
    )


def sparse_matmul(
    z: Tensor,
    support: Tensor | None,
    values: Tensor,
    offsets: Tensor | None,
    d2: int,
    k: int,
    kind: str,
    codec: str | None,
    dense: Tensor | None = None,
) -> Tensor:
    """y = z S.

    Args:
        z: (..., k), any float dtype.
        support: the support's tensor, uint8; None where the kind has none.
        values: what the codec stores, or plain floats with codec None, in which case gradients reach them.
        offsets: int32 (d2 + 1,), where each column's values begin, if the caller keeps it.
        d2: columns of S. k: atoms.
        kind: of the support, one of SUPPORTS. codec: one of CODECS, or None.
        dense: S transposed, (d2, k) in z's dtype, where the caller keeps it unpacked.

    Returns:
        (..., d2) in z's dtype.
    """
    if _is_watched(z, values):
        y: Tensor = _sparse_matmul(z, support, values, offsets, d2, k, kind, codec, dense)
        return y
    # Nobody needs to see the op: calling it through torch's dispatcher costs as much as a small product.
    return _multiply(z, support, values, offsets, d2, k, kind, codec, dense)


def _multiply(
    z: Tensor,
    support: Tensor | None,
    values: Tensor,
    offsets: Tensor | None,
    d2: int,
    k: int,
    kind: str,
    codec: str | None,
    dense: Tensor | None,
) -> Tensor:
    shape = None if support is None else list(support.shape)
    if z.dim() == 0 or z.shape[-1] != k or shape != SUPPORTS[kind].shape(d2, k):
        raise ValueError(
            f"z is {list(z.shape)} and the support's tensor {shape}, which do not belong to {k} atoms and {d2} columns"
        )
    if not z.is_floating_point():
        raise ValueError(f"z is of {z.dtype}; a float dtype is needed")
    if dense is not None:
        return torch.nn.functional.linear(z, dense)
    kernels, bits = _kernels(z), kernel_bits(kind, codec)
    if support is not None and bits and kernels.can_multiply(z, support, values, bits):
        if offsets is None:
            offsets = SUPPORTS[kind].offsets(support)
        try:
            y: Tensor = kernels.sparse_matmul(z, support, values, offsets, k, bits)
            return y
        except KernelError as error:
            _warn(str(error))
    return torch.nn.functional.linear(z, coefficients(support, values, offsets, d2, k, kind, codec, z.dtype))


def _kernels(z: Tensor) -> ModuleType:
    """Whose kernels multiply z, if they can."""
    return gpu if gpu is not None and z.is_cuda else cpu


@cache
def _warn(problem: str) -> None:
    """Log once that a kernel does not run here."""
    log.warning("a GPU kernel does not run here, coefficients are unpacked instead: %s", problem)


_sparse_matmul = torch.library.custom_op("cospadi::sparse_matmul", _multiply, mutates_args=())


@_sparse_matmul.register_fake
def _(
    z: Tensor,
    support: Tensor | None,
    values: Tensor,
    offsets: Tensor | None,
    d2: int,
    k: int,
    kind: str,
    codec: str | None,
    dense: Tensor | None,
) -> Tensor:
    return z.new_empty((*z.shape[:-1], d2))


def coefficients(
    support: Tensor | None,
    values: Tensor,
    offsets: Tensor | None,
    d2: int,
    k: int,
    kind: str,
    codec: str | None,
    dtype: torch.dtype,
) -> Tensor:
    """S transposed as a dense (d2, k) matrix, exact in float32 and bf16; arguments as for `sparse_matmul`."""
    if support is not None and SUPPORTS[kind].kernel:
        bits = kernel_bits(kind, codec)
        packed = cpu.can_multiply(support.new_empty(0, dtype=torch.float32), support, values, bits)
        if packed or (codec is None and cpu.has_entries(support, values)):
            offsets = SUPPORTS[kind].offsets(support) if offsets is None else offsets
            assert offsets is not None
            if packed:
                return cpu.unpack(support, values, offsets, k, bits, dtype)
            return cpu.scatter(support, values, offsets, k).to(dtype)
    return reference.coefficients(support, values, d2, k, kind, codec, dtype)


def entries(support: Tensor | None, dense: Tensor, offsets: Tensor | None, kind: str) -> Tensor:
    """The entries of a dense (d2, k) matrix that are stored, in the shape of the values; float."""
    if support is not None and SUPPORTS[kind].kernel and cpu.has_entries(support, dense):
        offsets = SUPPORTS[kind].offsets(support) if offsets is None else offsets
        assert offsets is not None
        return cpu.gather(support, dense, offsets)
    return SUPPORTS[kind].gather(SUPPORTS[kind].unpack(support, dense.shape[1]), dense)


@torch.library.custom_op("cospadi::value_gradient", mutates_args=())
def _value_gradient(z: Tensor, grad: Tensor, support: Tensor | None, values: Tensor, kind: str) -> Tensor:
    """Gradient of float values, an op of its own because its cost depends on data the compiler cannot see."""
    full = grad.flatten(0, -2).T @ z.flatten(0, -2)
    return entries(support, full, None, kind).to(values.dtype)


@_value_gradient.register_fake
def _(z: Tensor, grad: Tensor, support: Tensor | None, values: Tensor, kind: str) -> Tensor:
    return torch.empty_like(values)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, support, values, _, ctx.d2, ctx.k, ctx.kind, ctx.codec, dense = inputs
    ctx.save_for_backward(z, support, values, dense)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    z, support, values, dense = ctx.saved_tensors
    grad_z = grad_values = None
    if ctx.needs_input_grad[0]:
        if dense is None:
            of = ctx.d2, ctx.k, ctx.kind, ctx.codec, grad.dtype
            watched = _is_watched(grad, values)
            dense = (
                reference.coefficients(support, values, *of) if watched else coefficients(support, values, None, *of)
            )
        grad_z = grad @ dense
    if ctx.needs_input_grad[2]:
        grad_values = _value_gradient(z, grad, support, values, ctx.kind)
    return grad_z, None, grad_values, None, None, None, None, None, None


_sparse_matmul.register_autograd(_backward, setup_context=_setup_context)


def takes_levels(x: Tensor) -> bool:
    """Whether levels are multiplied as integers here."""
    return bool(_kernels(x).takes_levels(x))


def level_matmul(x: Tensor, levels: Levels) -> Tensor:
    """y = x W^T for x (..., d1) of any float dtype, in it."""
    if _is_watched(x, levels.inputs):
        y: Tensor = _level_matmul(x, list(levels))
        return y
    return _multiply_levels(x, levels)


def _multiply_levels(x: Tensor, levels: Levels) -> Tensor:
    if x.dim() == 0 or x.shape[-1] != levels.shape[1]:
        raise ValueError(f"x is {list(x.shape)}, and the levels have {levels.shape[1]} inputs")
    kernels = _kernels(x)
    if kernels.can_multiply_levels(x, levels):
        try:
            y: Tensor = kernels.level_matmul(x, levels)
            return y
        except KernelError as error:
            _warn(str(error))
    return torch.nn.functional.linear(x, level_weight(levels).to(x))


def unpack_levels(levels: Levels) -> Tensor:
    """N and what is beside it, float32 (d2, d1)."""
    if not cpu.can_multiply_levels(levels.inputs, levels):
        return all_levels(levels)
    numbers = torch.empty(len(levels.outputs), len(levels.inputs), dtype=torch.float32)
    return cpu.unpack_levels(levels, 0, len(numbers), numbers)


def level_weight(levels: Levels) -> Tensor:
    """W, float32 (d2, d1)."""
    return unpack_levels(levels).mul_(levels.inputs).mul_(levels.outputs[:, None])


@torch.library.custom_op("cospadi::level_matmul", mutates_args=())
def _level_matmul(x: Tensor, levels: Sequence[Tensor]) -> Tensor:
    return _multiply_levels(x, Levels(*levels))


@_level_matmul.register_fake
def _(x: Tensor, levels: Sequence[Tensor]) -> Tensor:
    return x.new_empty((*x.shape[:-1], Levels(*levels).shape[0]))


@torch.library.custom_op("cospadi::level_gradient", mutates_args=())
def _level_gradient(grad: Tensor, levels: Sequence[Tensor]) -> Tensor:
    """Gradient of x, an op of its own since compilers do not see how wide the rows are."""
    return grad @ level_weight(Levels(*levels)).to(grad.dtype)


@_level_gradient.register_fake
def _(grad: Tensor, levels: Sequence[Tensor]) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], Levels(*levels).shape[1]))


def _keep_levels(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1])


def _through_levels(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _level_gradient(grad, list(ctx.saved_tensors)), [None] * len(ctx.saved_tensors)


_level_matmul.register_autograd(_through_levels, setup_context=_keep_levels)
