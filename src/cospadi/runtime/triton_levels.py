"""Triton kernels of y = ((x u) N^T) v for small integers N in memory (`runtime/levels.py`); `triton.py` launches them.

All rows have 4 bits, or all 8. With 4 bits byte b has number 2 b in its low half and 2 b + 1 in its high one: two
products, each with half of x. What is too large for its bits lies beside, contiguous for the outputs of a program.

Names: M rows of x, N outputs and T bytes along a row of levels in one tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cospadi.runtime.triton_kernels import fitting, tuned

BESIDE = tl.constexpr(16)
"""Levels beside the others that are taken at once."""


@triton.jit
def _lines(x, x_row, packed, row_bytes, row, output, count, d2):
    """Which outputs there are (N,), pointers to their levels (N, 1); which rows of x, and pointers to them (M, 1)."""
    rows = (packed + output.to(tl.int64) * row_bytes)[:, None]
    return output < d2, rows, (row < count)[:, None], x + row.to(tl.int64)[:, None] * x_row


@triton.jit
def _stored(rows, inside, byte, row_bytes):
    """Some bytes of the rows, int32 (N, T)."""
    held = inside[:, None] & (byte < row_bytes)[None, :]
    return tl.load(rows + byte[None, :], mask=held, other=0).to(tl.int32)


@triton.jit
def _store(y, sums, outputs, row, output, exist, inside, d2):
    """Sums (M, N), times the steps of the outputs, to y (count, d2)."""
    v = tl.load(outputs + output, mask=inside, other=0)
    pointers = y + row.to(tl.int64)[:, None] * d2 + output[None, :]
    tl.store(pointers, sums * v[None, :], mask=exist & inside[None, :])


@triton.jit
def _scaled(x_rows, x_column, inputs, exist, place, d1):
    """x u at some inputs, float32 (M, T). x_rows: pointers (M, 1), of which `exist`, (M, 1), says which there are."""
    inside = place < d1
    u = tl.load(inputs + place, mask=inside, other=0)
    pointers = x_rows + place.to(tl.int64)[None, :] * x_column
    return tl.load(pointers, mask=exist & inside[None, :], other=0).to(tl.float32) * u[None, :]


@triton.jit
def _signed(stored, BITS: tl.constexpr):
    """Integers of BITS bits in two's complement, in the lowest bits of int32, as float32."""
    sign: tl.constexpr = 1 << (BITS - 1)
    return ((stored ^ sign) - sign).to(tl.float32)


@triton.jit
def _beside(x_rows, x_column, inputs, exist, offsets, columns, rest, output, inside, d1, ROUND: tl.constexpr):
    """Of each output what is beside its levels, float32 (M, N)."""
    starts = tl.load(offsets + output, mask=inside, other=0)
    ends = tl.load(offsets + output + 1, mask=inside, other=0)
    first, end = tl.min(tl.where(inside, starts, 2147483647), 0), tl.max(ends, 0)
    sums = tl.zeros([x_rows.shape[0], output.shape[0]], tl.float32)
    for start in range(first, end, BESIDE):
        entry = start + tl.arange(0, BESIDE)
        held = entry < end
        column = tl.load(columns + entry, mask=held, other=d1)
        more = tl.load(rest + entry, mask=held, other=0)
        x = _scaled(x_rows, x_column, inputs, exist, column, d1).to(ROUND).to(tl.float32)
        mine = (entry[None, :] >= starts[:, None]) & (entry[None, :] < ends[:, None])
        right = tl.where(mine, more[None, :], 0.0)
        if x_rows.shape[0] < 16:
            sums += tl.sum(x[:, None, :] * right[None, :, :], 2)
        else:
            sums = tl.dot(x, tl.trans(right), sums, input_precision="ieee")
    return sums


def _few(
    x,
    x_row,
    x_column,
    packed,
    row_bytes,
    outputs,
    inputs,
    offsets,
    columns,
    rest,
    y,
    count,
    d1,
    d2,
    M: tl.constexpr,
    BITS: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
):
    """Few rows, without tensor cores. Grid (outputs / N). x (count, d1) with strides x_row, x_column; y (count, d2)."""
    output = tl.program_id(0) * N + tl.arange(0, N)
    row = tl.arange(0, M)
    inside, rows, exist, x_rows = _lines(x, x_row, packed, row_bytes, row, output, count, d2)
    sums = tl.zeros([M, N, T], tl.float32)
    for first in range(0, row_bytes, T):
        byte = first + tl.arange(0, T)
        stored = _stored(rows, inside, byte, row_bytes)
        if BITS == 8:
            sums += _signed(stored, 8)[None, :, :] * _scaled(x_rows, x_column, inputs, exist, byte, d1)[:, None, :]
        else:
            low = _scaled(x_rows, x_column, inputs, exist, 2 * byte, d1)
            high = _scaled(x_rows, x_column, inputs, exist, 2 * byte + 1, d1)
            sums += _signed(stored & 15, 4)[None, :, :] * low[:, None, :]
            sums += _signed(stored >> 4, 4)[None, :, :] * high[:, None, :]
    beside = _beside(x_rows, x_column, inputs, exist, offsets, columns, rest, output, inside, d1, tl.float32)
    _store(y, tl.sum(sums, 2) + beside, outputs, row, output, exist, inside, d2)


def _many(
    x,
    x_row,
    x_column,
    packed,
    row_bytes,
    outputs,
    inputs,
    offsets,
    columns,
    rest,
    y,
    count,
    d1,
    d2,
    bucket,
    BITS: tl.constexpr,
    OPERAND: tl.constexpr,
    ROUND: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
):
    """Many rows, for tensor cores. Grid (rows / M times outputs / N), otherwise as `_few`.

    x u is rounded to ROUND, x's dtype, levels are exact in it; both are multiplied as OPERAND. `bucket` only tells the
    autotuner how many rows there are, roughly.
    """
    row_blocks = tl.cdiv(count, M)
    row = (tl.program_id(0) % row_blocks) * M + tl.arange(0, M)
    output = (tl.program_id(0) // row_blocks) * N + tl.arange(0, N)
    inside, rows, exist, x_rows = _lines(x, x_row, packed, row_bytes, row, output, count, d2)
    sums = tl.zeros([M, N], tl.float32)
    for first in range(0, row_bytes, T):
        byte = first + tl.arange(0, T)
        stored = _stored(rows, inside, byte, row_bytes)
        if BITS == 8:
            left = _scaled(x_rows, x_column, inputs, exist, byte, d1).to(ROUND).to(OPERAND)
            right = _signed(stored, 8).to(OPERAND)
            sums = tl.dot(left, tl.trans(right), sums, input_precision="ieee")
        else:
            left = _scaled(x_rows, x_column, inputs, exist, 2 * byte, d1).to(ROUND).to(OPERAND)
            right = _signed(stored & 15, 4).to(OPERAND)
            sums = tl.dot(left, tl.trans(right), sums, input_precision="ieee")
            left = _scaled(x_rows, x_column, inputs, exist, 2 * byte + 1, d1).to(ROUND).to(OPERAND)
            right = _signed(stored >> 4, 4).to(OPERAND)
            sums = tl.dot(left, tl.trans(right), sums, input_precision="ieee")
    sums += _beside(x_rows, x_column, inputs, exist, offsets, columns, rest, output, inside, d1, ROUND)
    _store(y, sums, outputs, row, output, exist, inside, d2)


FEW_CONFIGS = [
    triton.Config({"N": outputs, "T": lanes}, num_warps=warps)
    for outputs, lanes, warps in [
        (4, 128, 2), (4, 256, 4), (8, 128, 4), (8, 64, 2), (16, 64, 4), (16, 128, 8), (2, 256, 2), (32, 32, 4),
    ]
]  # fmt: skip

MANY_CONFIGS = [
    triton.Config({"M": rows, "N": outputs, "T": lanes}, num_warps=warps, num_stages=stages)
    for rows, outputs, lanes, warps, stages in [
        (16, 32, 64, 4, 2), (16, 64, 64, 4, 3), (16, 128, 64, 4, 3), (32, 64, 64, 4, 3), (64, 64, 64, 4, 3),
        (64, 128, 32, 8, 3), (128, 64, 32, 4, 3), (128, 128, 32, 8, 3), (128, 128, 64, 8, 3), (128, 256, 32, 8, 3),
    ]
]  # fmt: skip

few = tuned(_few, FEW_CONFIGS, ["d1", "d2", "M", "BITS"], {"N": 32, "T": 32})
many = tuned(
    _many,
    MANY_CONFIGS,
    ["d1", "d2", "bucket", "BITS"],
    {"M": 32, "N": 32, "T": 32},
    prune_configs_by={"early_config_prune": fitting},
)
