"""The CPU kernels of the C++ library (`native.py`).

Decoding (a few rows of z) reads the packed mask and values as they are. With more rows, columns of S are unpacked a
tile at a time, and multiplied in the library (bf16 where AVX-512 has products of it), or by torch's matrix product.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache

import torch
from torch import Tensor

from cospadi import compat, native
from cospadi.native import best_level, library
from cospadi.runtime.levels import Levels

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""z's dtypes, as the library numbers them."""

DECODE_ROWS = 24
"""Up to this many rows of z are multiplied by the library; more go through tiles that torch multiplies, but where
`_takes_any_rows`."""

LEVEL_ROWS = 16
"""The same of levels."""

DENSE_ROWS = 8
"""Up to this many rows `dense_matmul` beats torch's product; with 16 the two are about even."""

TILE_BYTES = 8 << 20
"""Unpacked coefficients that a tile has at most. Few large products beat many small ones, but as much as 32 MB the
system makes anew for each product."""

_REASONS = {1: "the stored values are fewer than the support mask has bits", 2: "there is not enough memory"}

AVAILABLE = library() is not None
"""Whether the package's installation built the library."""


def can_multiply(z: Tensor, support: Tensor, values: Tensor, value_bits: int) -> bool:
    """Whether the library was built and takes these tensors."""
    return (
        z.is_cpu
        and support.is_cpu
        and values.is_cpu
        and z.dtype in DTYPES
        and value_bits > 0
        and values.dtype == (torch.bfloat16 if value_bits == 16 else torch.uint8)
        and support.is_contiguous()
        and values.is_contiguous()
        and AVAILABLE
    )


def sparse_matmul(
    z: Tensor, support: Tensor, values: Tensor, offsets: Tensor, k: int, value_bits: int, level: int | None = None
) -> Tensor:
    """y = z S for z (..., k); see `op.sparse_matmul`. `level` is one of `native.levels()`.

    Raises:
        ValueError: values that do not match the mask, or offsets that are not `packing.column_offsets`.
    """
    d2 = support.shape[0]
    rows = z.numel() // k if k else math.prod(z.shape[:-1])
    if offsets.dtype != torch.int32 or offsets.shape != (d2 + 1,) or not offsets.is_cpu:
        raise ValueError(f"offsets are {list(offsets.shape)} of {offsets.dtype}; {d2 + 1} of int32 on CPU are needed")
    if rows == 0 or d2 == 0 or k == 0:
        return z.new_zeros((*z.shape[:-1], d2))
    level = best_level() if level is None else level
    if rows > DECODE_ROWS and not _takes_any_rows(z.dtype, level):
        return _through_tiles(z, support, values, offsets, k, value_bits, level)
    z = z.contiguous()
    y = z.new_empty((*z.shape[:-1], d2))
    stored = _stored(support, values, offsets, k, value_bits, level)
    _check(_library().cospadi_multiply(z.data_ptr(), y.data_ptr(), rows, DTYPES[z.dtype], *stored))
    return y


@cache
def _takes_any_rows(dtype: torch.dtype, level: int) -> bool:
    """Whether the library's products of many rows are as fast as torch's, which use AMX where the CPU has it."""
    tiles = bool(_library().cospadi_level_multiplies_tiles(level))
    as_fast = level == native.levels().get("amx") or not compat.cpu_multiplies_in_tiles()
    return dtype == torch.bfloat16 and tiles and as_fast


def can_multiply_dense(x: Tensor, matrix: Tensor) -> bool:
    """Whether `dense_matmul` takes these: bf16, on CPU, few rows, and an instruction set made for it."""
    return (
        AVAILABLE
        and x.is_cpu
        and matrix.is_cpu
        and x.dtype == matrix.dtype == torch.bfloat16
        and x.dim() > 0
        and x.shape[-1:] == matrix.shape[1:]
        and 0 < x.numel() <= DENSE_ROWS * x.shape[-1]
        and matrix.is_contiguous()
        and _multiplies_dense()
    )


@cache
def _multiplies_dense() -> bool:
    return bool(_library().cospadi_level_multiplies_dense(best_level()))


def dense_matmul(x: Tensor, matrix: Tensor) -> Tensor:
    """x matrix^T for x (..., d1) and matrix (k, d1) in bf16: what torch computes, at more of the memory's speed."""
    x = x.contiguous()
    z = x.new_empty((*x.shape[:-1], matrix.shape[0]))
    k, d1 = matrix.shape
    threads, level = torch.get_num_threads(), best_level()
    rows = x.numel() // d1
    _check(
        _library().cospadi_multiply_dense(x.data_ptr(), z.data_ptr(), rows, matrix.data_ptr(), k, d1, threads, level)
    )
    return z


def unpack(
    support: Tensor,
    values: Tensor,
    offsets: Tensor,
    k: int,
    value_bits: int,
    dtype: torch.dtype,
    level: int | None = None,
) -> Tensor:
    """S transposed as a dense (d2, k) matrix, exact in float32 and bf16."""
    out = torch.empty(support.shape[0], k, dtype=_unpacked_dtype(dtype))
    _unpack_to(out, 0, _stored(support, values, offsets, k, value_bits, level))
    return out.to(dtype)


def has_entries(support: Tensor | None, numbers: Tensor) -> bool:
    """Whether `scatter` and `gather` take a mask and these numbers."""
    return (
        AVAILABLE
        and support is not None
        and support.is_cpu
        and numbers.is_cpu
        and numbers.dtype in (torch.float32, torch.bfloat16)
        and support.is_contiguous()
    )


def scatter(support: Tensor, values: Tensor, offsets: Tensor, k: int) -> Tensor:
    """S transposed as a dense (d2, k) matrix, float32, of plain values, float (nnz,).

    Args:
        offsets: those of the mask.

    Raises:
        ValueError: the mask is of another shape, or has more or fewer bits than there are values.
    """
    values, d2 = values.float().contiguous(), support.shape[0]
    _check_mask(support, d2, k)
    if values.numel() != int(offsets[-1]):
        raise ValueError(f"there are {values.numel()} values, and the support mask has {int(offsets[-1])} bits")
    dense = torch.empty(d2, k, dtype=torch.float32, device="cpu")
    given = support.data_ptr(), offsets.data_ptr(), d2, k, torch.get_num_threads()
    _library().cospadi_scatter(values.data_ptr(), dense.data_ptr(), *given)
    return dense


def gather(support: Tensor, dense: Tensor, offsets: Tensor) -> Tensor:
    """The entries of a dense (d2, k) matrix, float32 or bf16, that the mask has: float32 (nnz,).

    Raises:
        ValueError: the mask is of another shape.
    """
    dense, (d2, k) = dense.contiguous(), dense.shape
    _check_mask(support, d2, k)
    values = torch.empty(int(offsets[-1]), dtype=torch.float32, device="cpu")
    given = support.data_ptr(), offsets.data_ptr(), d2, k, torch.get_num_threads()
    _library().cospadi_gather(dense.data_ptr(), dense.dtype == torch.bfloat16, values.data_ptr(), *given)
    return values


def _check_mask(support: Tensor, d2: int, k: int) -> None:
    if support.shape != (d2, (k + 7) // 8):
        raise ValueError(f"the matrix is {d2} x {k}, and the support mask {list(support.shape)}")


def _through_tiles(
    z: Tensor, support: Tensor, values: Tensor, offsets: Tensor, k: int, value_bits: int, level: int | None
) -> Tensor:
    d2, through = support.shape[0], _unpacked_dtype(z.dtype)
    result = z.new_empty((*z.shape[:-1], d2))  # no view: callers may write to it
    y, stored = result.view(-1, d2), _stored(support, values, offsets, k, value_bits, level)
    z = z.reshape(-1, k).to(through)  # a half would not hold every stored value
    tiles = -(-d2 * k * through.itemsize // TILE_BYTES)
    columns = -(-d2 // tiles)
    room = torch.empty(columns, k, dtype=through)  # one for all tiles: memory that was written before is faster
    for begin in range(0, d2, columns):
        tile = room[: min(columns, d2 - begin)]
        _unpack_to(tile, begin, stored)
        y[:, begin : begin + columns] = torch.nn.functional.linear(z, tile)
    return result


def takes_levels(x: Tensor) -> bool:
    """Whether `level_matmul` takes x with levels that lie as on CPU."""
    return AVAILABLE and x.is_cpu and x.dtype in DTYPES


def can_multiply_levels(x: Tensor, levels: Levels) -> bool:
    """Whether `level_matmul` takes these."""
    return takes_levels(x) and levels.by_output and not levels.packed.is_cuda


def level_matmul(x: Tensor, levels: Levels, level: int | None = None) -> Tensor:
    """y = ((x u) N^T) v for x (..., d1); `level` is one of `native.levels()`. All of `levels` is contiguous."""
    if not levels.by_output:
        raise ValueError("all rows of the levels have one width, as a GPU's kernels ask for")
    d2, d1 = levels.shape
    rows = x.numel() // d1 if d1 else math.prod(x.shape[:-1])
    level = best_level() if level is None else level
    if rows > LEVEL_ROWS and not _takes_any_rows(x.dtype, level):
        return _levels_through_tiles(x, levels, level)
    x, y = x.contiguous(), x.new_empty((*x.shape[:-1], d2))
    packed, places, outputs, inputs, *beside = levels.addresses
    status = _library().cospadi_multiply_levels(
        x.data_ptr(), y.data_ptr(), rows, DTYPES[x.dtype], packed, places, *beside, d2, d1, outputs, inputs,
        torch.get_num_threads(), level,
    )  # fmt: skip
    if status:
        _check(status)
    return y


def _levels_through_tiles(x: Tensor, levels: Levels, level: int) -> Tensor:
    d2, d1 = len(levels.outputs), len(levels.inputs)
    through = _unpacked_dtype(x.dtype)
    result = x.new_empty((*x.shape[:-1], d2))  # no view: callers may write to it
    x, y = x.reshape(-1, d1), result.view(-1, d2)
    scaled = torch.mul(x, levels.inputs, out=torch.empty(x.shape, dtype=through))
    outputs = -(-d2 // -(-d2 * d1 * through.itemsize // TILE_BYTES))
    room = torch.empty(outputs, d1, dtype=through)
    for begin in range(0, d2, outputs):
        end = min(begin + outputs, d2)
        tile = unpack_levels(levels, begin, end, room[: end - begin], level)
        torch.mul(torch.nn.functional.linear(scaled, tile), levels.outputs[begin:end], out=y[:, begin:end])
    return result


def unpack_levels(levels: Levels, begin: int, end: int, out: Tensor, level: int | None = None) -> Tensor:
    """Rows of N with what is beside it, in out (end - begin, d1), float32 or bf16: exact up to 256."""
    given = out.data_ptr(), DTYPES[out.dtype], begin, end
    level = best_level() if level is None else level
    packed, places, _, _, *beside = levels.addresses
    _library().cospadi_unpack_levels(*given, packed, places, *beside, out.shape[1], torch.get_num_threads(), level)
    return out


def _unpacked_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _unpack_to(out: Tensor, begin: int, stored: tuple[int, ...]) -> None:
    """Columns of S from `begin` on as the rows of out (columns, k)."""
    end = begin + out.shape[0]
    _check(_library().cospadi_unpack(out.data_ptr(), DTYPES[out.dtype], begin, end, *stored))


def _stored(
    support: Tensor, values: Tensor, offsets: Tensor, k: int, value_bits: int, level: int | None
) -> tuple[int, ...]:
    """The arguments that stand for S, and those after it, as the library takes them."""
    return (
        support.data_ptr(),
        values.data_ptr(),
        values.numel() * values.element_size(),
        offsets.data_ptr(),
        support.shape[0],
        k,
        value_bits,
        torch.get_num_threads(),
        best_level() if level is None else level,
    )


def _library() -> ctypes.CDLL:
    found = library()
    assert found is not None, "callers ask `can_multiply` first"
    return found


def _check(status: int) -> None:
    if status:
        raise ValueError(f"the coefficients cannot be read: {_REASONS[status]}")
