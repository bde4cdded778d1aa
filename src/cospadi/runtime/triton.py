"""z S on NVIDIA GPUs, from the packed form of S (docs/format.md), and products of levels. Absent where Triton is.

Up to `DECODE_ROWS` rows are multiplied without tensor cores, up to `SPLIT_ROWS` the atoms may be split over programs
whose partial sums, float32, are then added in a fixed order. Results do not depend on timing, but on the configuration
that the autotuner found fastest for the shape.

Triton keeps these timings, and the compiled kernels, in its cache (~/.triton/cache, or TRITON_CACHE_DIR). Nothing
waits for the GPU after the first call of a shape: it can be captured in a CUDA graph.

Under TRITON_INTERPRET=1, set before Triton is imported, the same kernels run on tensors in main memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cospadi.errors import KernelError, first_line
from cospadi.runtime.levels import EQUAL_WIDTHS, Levels, padded

try:
    import triton.language as tl

    from cospadi.runtime import triton_kernels as kernels
    from cospadi.runtime import triton_levels as level_kernels

    AVAILABLE, INTERPRETED = True, kernels.INTERPRETED
except ImportError:
    AVAILABLE, INTERPRETED = False, False

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VALUE_BITS = (10, 12, 14, 16)
DECODE_ROWS = 4
SPLIT_ROWS = 16
MOST_ROWS_TOLD = 4096
"""Row counts above this take one choice of the autotuner."""

SPLIT_UNIT = 256
"""Atoms that a split holds a multiple of."""

MOST_SPLITS = 16
PROGRAMS = 4
"""Programs of `SPLIT_COLUMNS` columns that each multiprocessor should have, if splits can provide them."""

SPLIT_COLUMNS = 16
ADDED = 1024

_failed: set[tuple[torch.dtype, str, int]] = set()
"""Dtypes of z and widths of "values" or "levels" with a kernel that Triton could not compile or launch here."""


def can_multiply(z: Tensor, support: Tensor, values: Tensor, value_bits: int) -> bool:
    """Whether `sparse_matmul` takes these: CUDA tensors (under the interpreter CPU tensors) of the stored dtypes.

    False also where it has raised `KernelError` for this dtype and width: it would compile in vain at every call.
    """
    if not AVAILABLE or value_bits not in VALUE_BITS or (z.dtype, "values", value_bits) in _failed:
        return False
    stored = torch.bfloat16 if value_bits == 16 else torch.uint8
    return (
        z.device.type == ("cpu" if INTERPRETED else "cuda")
        and support.device == z.device == values.device
        and z.dtype in DTYPES
        and (support.dtype, values.dtype) == (torch.uint8, stored)
        and support.is_contiguous()
        and values.is_contiguous()
    )


def sparse_matmul(z: Tensor, support: Tensor, values: Tensor, offsets: Tensor, k: int, value_bits: int) -> Tensor:
    """y = z S, accumulated in float32.

    Args:
        z: (..., k), fp32, bf16 or fp16, of any strides.
        support: uint8 (d2, ceil(k / 8)), contiguous; what is set past atom k - 1 is ignored.
        values: bf16 (nnz,) for 16 bits, else uint8, the bit stream.
        offsets: int32 (d2 + 1,), where each column's values begin: the exclusive prefix sum of nonzeros a column.
        k: atoms.
        value_bits: one of VALUE_BITS.

    Returns:
        (..., d2) in z's dtype.

    Raises:
        KernelError: Triton cannot compile or launch a kernel on this machine.
    """
    d2 = support.shape[0]
    y = z.new_empty((*z.shape[:-1], d2))
    if y.numel() == 0 or k == 0:
        return y.zero_()
    if values.data_ptr() % 4:  # The kernels read aligned words.
        values = values.clone()
    rows = z.reshape(-1, k)
    count = rows.shape[0]
    splits, span = _splits(k, d2, count, _multiprocessors(z.device))
    out = y if splits == 1 else torch.empty((splits, count, d2), dtype=torch.float32, device=z.device)
    arguments = (
        *(rows, rows.stride(0), rows.stride(1), support, values, values.numel() * values.element_size()),
        *(offsets, out, count, k, d2, support.shape[1], span),
    )
    with _launching(z, "values", value_bits) as (dtype, operand):
        if count <= DECODE_ROWS:
            kernels.decode[lambda meta: (-(-d2 // meta["N"]), splits)](
                *arguments, M=1 << (count - 1).bit_length(), BITS=value_bits, ROUND=dtype
            )
        else:
            kernels.tiles[lambda meta: (-(-count // meta["M"]) * -(-d2 // meta["N"]), splits)](
                *arguments, _bucket(count), BITS=value_bits, OPERAND=operand, ROUND=dtype
            )
        if splits > 1:
            size = count * d2
            kernels.add_splits[(-(-size // ADDED),)](out, y, size, splits, BLOCK=ADDED)
    return y


def takes_levels(x: Tensor) -> bool:
    """Whether `level_matmul` takes x: CUDA tensors (under the interpreter CPU tensors)."""
    return (
        AVAILABLE
        and x.device.type == ("cpu" if INTERPRETED else "cuda")
        and x.dtype in DTYPES
        and all((x.dtype, "levels", bits) not in _failed for bits in EQUAL_WIDTHS)
    )


def can_multiply_levels(x: Tensor, levels: Levels) -> bool:
    """Whether `level_matmul` takes these, of which all rows have one of EQUAL_WIDTHS."""
    return takes_levels(x) and levels.packed.device == x.device and not len(levels.places)


def level_matmul(x: Tensor, levels: Levels) -> Tensor:
    """y = ((x u) N^T) v, accumulated in float32; x (..., d1), fp32, bf16 or fp16, of any strides.

    Raises:
        KernelError: Triton cannot compile or launch a kernel on this machine.
    """
    d2, d1 = len(levels.outputs), len(levels.inputs)
    y = x.new_empty((*x.shape[:-1], d2))
    if y.numel() == 0:
        return y
    rows = x.reshape(-1, d1)
    count, bits = len(rows), round(levels.bits)
    steps = levels.outputs, levels.inputs, levels.offsets, levels.columns, levels.rest
    arguments = (
        *(rows, rows.stride(0), rows.stride(1), levels.packed, padded(d1) * bits // 8, *steps, y, count, d1, d2),
    )
    with _launching(x, "levels", bits) as (dtype, operand):
        if count <= DECODE_ROWS:
            level_kernels.few[lambda meta: (-(-d2 // meta["N"]),)](
                *arguments, M=1 << (count - 1).bit_length(), BITS=bits
            )
        else:
            level_kernels.many[lambda meta: (-(-count // meta["M"]) * -(-d2 // meta["N"]),)](
                *arguments, _bucket(count), BITS=bits, OPERAND=operand, ROUND=dtype
            )
    return y


@contextmanager
def _launching(z: Tensor, what: str, bits: int) -> Iterator[tuple[Any, Any]]:
    """For launches: Triton's dtype of z, and that of operands of products of tiles.

    Raises:
        KernelError: Triton cannot compile or launch a kernel on this machine, which is kept in mind.
    """
    dtype = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[z.dtype]
    # The interpreter multiplies bf16 operands as the integers that numpy holds them in.
    operand = tl.float32 if INTERPRETED else dtype
    try:
        with torch.cuda.device(z.device) if z.is_cuda else nullcontext():
            yield dtype, operand
    except torch.OutOfMemoryError:  # by the autotuner, and no fault of the kernels
        raise
    except Exception as error:  # whatever the compiler, the assembler, a C compiler or the driver met
        _failed.add((z.dtype, what, bits))
        raise KernelError(f"{type(error).__name__}: {first_line(error)}") from error


def _bucket(count: int) -> int:
    """What the autotuner is told of a number of rows."""
    return min(max(16, 1 << (count - 1).bit_length()), MOST_ROWS_TOLD)


def _splits(k: int, d2: int, rows: int, multiprocessors: int) -> tuple[int, int]:
    """How many programs split a column, and how many atoms each of them takes."""
    if rows > SPLIT_ROWS:
        return 1, k
    wanted = -(-PROGRAMS * multiprocessors * SPLIT_COLUMNS // d2)
    units = -(-k // SPLIT_UNIT)
    span = SPLIT_UNIT * -(-units // min(wanted, units, MOST_SPLITS))
    return -(-k // span), span


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
