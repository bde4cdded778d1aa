"""z S on NVIDIA GPUs, from the packed form of S (docs/format.md). Absent where Triton is.

Up to `DECODE_ROWS` rows are multiplied without tensor cores, up to `SPLIT_ROWS` the atoms may be split over programs
whose partial sums, float32, are then added in a fixed order. Results do not depend on timing, but on the configuration
that the autotuner found fastest for the shape.

Triton keeps these timings, and the compiled kernels, in its cache (~/.triton/cache, or TRITON_CACHE_DIR). Nothing
waits for the GPU after the first call of a shape: it can be captured in a CUDA graph.

Under TRITON_INTERPRET=1, set before Triton is imported, the same kernels run on tensors in main memory.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import torch
from torch import Tensor

from cospadi.errors import KernelError, first_line

try:
    import triton.language as tl

    from cospadi.runtime import triton_kernels as kernels

    AVAILABLE, INTERPRETED = True, kernels.INTERPRETED
except ImportError:
    AVAILABLE, INTERPRETED = False, False

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

_failed: set[tuple[torch.dtype, int]] = set()
"""Dtypes of z and widths of values with a kernel that Triton could not compile or launch here."""


def can_multiply(z: Tensor, support: Tensor, values: Tensor, value_bits: int) -> bool:
    """Whether `sparse_matmul` takes these: CUDA tensors (under the interpreter CPU tensors) of the stored dtypes.

    False also where it has raised `KernelError` for this dtype and width: it would compile in vain at every call.
    """
    if not AVAILABLE or value_bits not in VALUE_BITS or (z.dtype, value_bits) in _failed:
        return False
    stored = torch.bfloat16 if value_bits == 16 else torch.uint8
    return (
        z.device.type == ("cpu" if INTERPRETED else "cuda")
        and support.device == z.device == values.device
        and z.dtype in (torch.float32, torch.bfloat16, torch.float16)
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
    dtype = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[z.dtype]
    try:
        with torch.cuda.device(z.device) if z.is_cuda else nullcontext():
            if count <= DECODE_ROWS:
                kernels.decode[lambda meta: (-(-d2 // meta["N"]), splits)](
                    *arguments, M=1 << (count - 1).bit_length(), BITS=value_bits, ROUND=dtype
                )
            else:
                bucket = min(max(16, 1 << (count - 1).bit_length()), MOST_ROWS_TOLD)
                # The interpreter multiplies bf16 operands as the integers that numpy holds them in.
                operand = tl.float32 if INTERPRETED else dtype
                kernels.tiles[lambda meta: (-(-count // meta["M"]) * -(-d2 // meta["N"]), splits)](
                    *arguments, bucket, BITS=value_bits, OPERAND=operand, ROUND=dtype
                )
            if splits > 1:
                size = count * d2
                kernels.add_splits[(-(-size // ADDED),)](out, y, size, splits, BLOCK=ADDED)
    except torch.OutOfMemoryError:  # by the autotuner, and no fault of the kernels
        raise
    except Exception as error:  # whatever the compiler, the assembler, a C compiler or the driver met
        _failed.add((z.dtype, value_bits))
        raise KernelError(f"{type(error).__name__}: {first_line(error)}") from error
    return y


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
