"""z S on NVIDIA GPUs, from the packed form of S (docs/format.md), and products of levels. Absent where Triton is.

Up to `DECODE_ROWS` rows are multiplied without tensor cores, up to `TILE_ROWS` with S unpacked a tile at a time; there
the atoms may be split over programs whose partial sums, float32, are then added in a fixed order. For more rows S is
unpacked to a dense matrix first, in each call, which takes little beside the product itself. Configurations follow from
the shape, the rows and the GPU alone, and so does the order in which numbers are added.

Triton keeps the compiled kernels in its cache (~/.triton/cache, or TRITON_CACHE_DIR). Nothing waits for the GPU: every
call after the first of a kind can be captured in a CUDA graph.

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
from cospadi.runtime.levels import EQUAL_WIDTHS, TILE, Levels, tiled

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
DECODE_COLUMNS = 2
DECODE_TILE = 512
"""Atoms that a warp takes at once where rows are few."""

DECODE_WARPS = 16
"""That each multiprocessor should have there, if several to a column can provide them."""

MOST_SPANS = 8

TILE_ROWS = 64
TILE_COLUMNS = 32
TILE_WARPS = 4
PROGRAMS = 2
"""Of `tiles` that each multiprocessor should have, if splits can provide them."""

MOST_SPLITS = 16
SPLIT_UNIT = 32
"""Bytes of a mask that a split holds a multiple of."""

UNPACKED_COLUMNS = 2
ADDED = 1024

LEVEL_ROWS = 64
"""Up to so many rows are multiplied by levels as they are; for more a matrix is unpacked."""

WORDS_A_WARP = 128
"""Of a plane of levels: 16 bytes a thread."""

MOST_WARPS = 8
WARPS_WANTED = 8
"""Of a multiprocessor, where a few rows are multiplied by levels."""

UNPACKED_OUTPUTS = 4

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
    count = z.numel() // k if k else 0
    if not count or not d2:
        return z.new_zeros((*z.shape[:-1], d2))
    if count > (DECODE_ROWS if z.dtype is torch.float32 else TILE_ROWS):  # tensor cores would round float32
        return torch.nn.functional.linear(z, unpack(support, values, offsets, k, value_bits, z.dtype))
    y = z.new_empty((*z.shape[:-1], d2))
    rows = z if z.dim() == 2 else z.reshape(-1, k)
    values = _aligned(values)
    stored = support, values, values.numel() * values.element_size(), offsets
    with _launching(z, "values", value_bits):
        if count <= DECODE_ROWS:
            columns, spans = few_values(k, d2, _multiprocessors(z.device))
            kernels.decode[(-(-d2 // columns),)](
                *(rows, *rows.stride(), *stored, y, count, k, d2),
                *(value_bits, 1 << (count - 1).bit_length(), columns, spans),
                num_warps=spans,
            )
            return y
        m, columns, warps, splits = many_values(k, d2, count, _multiprocessors(z.device))
        span = SPLIT_UNIT * -(-k // (8 * SPLIT_UNIT * splits))
        splits = -(-k // (8 * span))
        out = y if splits == 1 else torch.empty((splits, count, d2), dtype=torch.float32, device=z.device)
        kernels.tiles[(-(-d2 // columns), splits)](
            *(rows, *rows.stride(), *stored, out, count, k, d2, span, value_bits, m, columns),
            num_warps=warps,
            num_stages=1,  # with more Triton would take the values through shared memory
        )
        if splits > 1:
            kernels.add_splits[(-(-y.numel() // ADDED),)](out, y, y.numel(), splits, ADDED)
    return y


def few_values(k: int, d2: int, multiprocessors: int) -> tuple[int, int]:
    """Columns of a program, and how many warps divide the atoms of each among them."""
    spans, programs = 1, -(-d2 // DECODE_COLUMNS)
    while spans < MOST_SPANS and programs * spans < DECODE_WARPS * multiprocessors and spans * DECODE_TILE < k:
        spans *= 2
    return DECODE_COLUMNS, spans


def many_values(k: int, d2: int, rows: int, multiprocessors: int) -> tuple[int, int, int, int]:
    """Rows and columns of a program, its warps, and how many programs divide the atoms of a column among them."""
    splits = max(1, PROGRAMS * multiprocessors // -(-d2 // TILE_COLUMNS))
    m = 16 if rows <= 16 else TILE_ROWS
    return m, TILE_COLUMNS, TILE_WARPS, min(splits, -(-k // (8 * SPLIT_UNIT)), MOST_SPLITS)


def unpack(support: Tensor, values: Tensor, offsets: Tensor, k: int, value_bits: int, dtype: torch.dtype) -> Tensor:
    """S transposed as a dense (d2, k) matrix, exact in float32 and bf16; arguments as for `sparse_matmul`.

    Raises:
        KernelError: Triton cannot compile or launch a kernel on this machine.
    """
    d2 = support.shape[0]
    made = dtype if dtype in DTYPES else torch.float32
    out = torch.empty((d2, k), dtype=made, device=support.device)
    if out.numel():
        values = _aligned(values)
        with _launching(out, "values", value_bits):
            kernels.unpack[(-(-d2 // UNPACKED_COLUMNS),)](
                *(support, values, values.numel() * values.element_size(), offsets, out, k, d2),
                *(value_bits, UNPACKED_COLUMNS),
                num_warps=1,
            )
    return out.to(dtype)


def _aligned(values: Tensor) -> Tensor:
    """Values that can be read as words."""
    return values.clone() if values.data_ptr() % 4 else values


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
    d2, d1 = levels.shape
    y = x.new_empty((*x.shape[:-1], d2))
    if y.numel() == 0:
        return y
    rows, bits = x.reshape(-1, d1), round(levels.bits)
    count = len(rows)
    most = LEVEL_ROWS if x.dtype is not torch.float32 else DECODE_ROWS  # tensor cores would round the levels
    if count > most:
        return torch.nn.functional.linear(x, unpack_levels(levels, x.dtype))
    steps = levels.outputs, levels.inputs, levels.offsets, levels.columns, levels.rest
    strides = rows.stride()
    arguments = (rows, *strides, levels.packed, *steps, y, count, d1, d2, tiled(d1) // TILE)
    with _launching(x, "levels", bits) as (dtype, operand):
        if count <= DECODE_ROWS:
            outputs, words, warps = few_levels(d1, d2, bits, count, _multiprocessors(x.device))
            level_kernels.few[(-(-d2 // outputs),)](
                *arguments, BITS=bits, M=1 << (count - 1).bit_length(), N=outputs, T=words, num_warps=warps
            )
        else:
            m, outputs, words, warps, stages = many_levels(d2, count, _multiprocessors(x.device))
            level_kernels.many[(-(-d2 // outputs), -(-count // m))](
                *(*arguments, bits, operand, dtype, m, outputs, words), num_warps=warps, num_stages=stages
            )
    return y


def few_levels(d1: int, d2: int, bits: int, rows: int, multiprocessors: int) -> tuple[int, int, int]:
    """Outputs of a program, words of a plane that it takes at once, and its warps."""
    narrowest = min(4, bits - 4) if bits > 4 else 4
    warps = 1
    while warps < MOST_WARPS and 2 * warps * WORDS_A_WARP <= tiled(d1) * narrowest // 32:
        warps *= 2
    outputs = 16 if rows < 3 else 8
    while outputs > 4 and -(-d2 // outputs) * warps < WARPS_WANTED * multiprocessors:
        outputs //= 2
    return outputs, WORDS_A_WARP * warps, warps


def many_levels(d2: int, rows: int, multiprocessors: int) -> tuple[int, int, int, int, int]:
    """Rows and outputs of a program, words of a plane that it takes at once, its warps, and stages of its loads."""
    m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    outputs = 64
    while outputs > 16 and -(-d2 // outputs) < 2 * multiprocessors:
        outputs //= 2
    return m, outputs, 64 if m < 64 else 32, 4, 2


def unpack_levels(levels: Levels, dtype: torch.dtype) -> Tensor:
    """W (d2, d1) in a dtype.

    Raises:
        KernelError: Triton cannot compile or launch a kernel on this machine.
    """
    (d2, d1), bits = levels.shape, round(levels.bits)
    weight = levels.inputs.new_empty((d2, d1), dtype=dtype)
    tiles = tiled(d1) // TILE
    with _launching(weight, "levels", bits):
        level_kernels.unpack[(-(-d2 // UNPACKED_OUTPUTS), -(-tiles * 16 // WORDS_A_WARP))](
            *(levels.packed, levels.outputs, levels.inputs, weight, d1, d2, tiles),
            *(bits, UNPACKED_OUTPUTS, WORDS_A_WARP),
        )
        if len(levels.columns):
            beside = levels.outputs, levels.inputs, levels.offsets, levels.columns, levels.rest
            level_kernels.put_beside[(d2,)](*beside, weight, d1, bits, num_warps=1)
    return weight


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
        elsewhere = z.is_cuda and z.device.index != torch.cuda.current_device()
        with torch.cuda.device(z.device) if elsewhere else nullcontext():
            yield dtype, operand
    except torch.OutOfMemoryError:  # no fault of the kernels
        raise
    except Exception as error:  # whatever the compiler, the assembler, a C compiler or the driver met
        _failed.add((z.dtype, what, bits))
        raise KernelError(f"{type(error).__name__}: {first_line(error)}") from error


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
