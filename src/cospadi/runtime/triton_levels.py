"""Triton kernels of y = ((x u) N^T) v for small integers N in memory (`runtime/levels.py`); `triton.py` launches them.

All rows have one of `levels.EQUAL_WIDTHS`, in planes: the four lowest bits of all levels of a row, then the others.
The numbers in a 32-bit word are of inputs that lie apart, so that the first numbers of words that lie together are of
inputs that lie together, and so on: each thread finds in the words that it has read what belongs to the x and the steps
that it has read, and nothing has to pass from thread to thread. What is too large for its bits lies beside, contiguous
for the outputs of a program.

Names: M rows of x, N outputs and T words of a plane in one tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE = tl.constexpr(128)
"""`levels.TILE`."""

BESIDE = tl.constexpr(64)
"""Levels beside the others that are taken at once."""


@triton.jit
def _field(words, i: tl.constexpr, BITS: tl.constexpr, offset: tl.constexpr, times: tl.constexpr):
    """The i-th number of BITS bits in each word, less an offset, times a power of two, float32.

    The bits become the lowest of 2 ** 23 as a float; all that follows is exact.
    """
    place: tl.constexpr = i * BITS % 16
    scale: tl.constexpr = times / (1 << place)
    if i * BITS >= 16:
        words >>= 16
    number = ((words & (((1 << BITS) - 1) << place)) | 0x4B000000).to(tl.float32, bitcast=True)
    return number * scale - (8388608.0 * scale + offset * times)


@triton.jit
def _inputs(word, i: tl.constexpr, BITS: tl.constexpr):
    """Which input the i-th numbers in some words of a row's plane belong to."""
    each: tl.constexpr = TILE * BITS // 32
    return word // each * TILE + i * each + word % each


@triton.jit
def _steps(inputs, place, d1):
    """u of some inputs, 0 past the last."""
    return tl.load(inputs + place, mask=place < d1, other=0)


@triton.jit
def _scaled(x, x_column, place, u, exist, d1):
    """x u of one row at some inputs, float32 (T,)."""
    return tl.load(x + place.to(tl.int64) * x_column, mask=(place < d1) & exist, other=0).to(tl.float32) * u


@triton.jit
def _entries(columns, rest, start, last, starts, ends, d1):
    """Some of what is beside levels: inputs (BESIDE,), d1 past the last, and what it is by output, float32 (N, BESIDE).

    starts, ends: of each output's entries, (N,).
    """
    entry = start + tl.arange(0, BESIDE)
    place = tl.load(columns + entry, mask=entry < last, other=d1)
    more = tl.load(rest + entry, mask=entry < last, other=0)
    mine = (entry[None, :] >= starts[:, None]) & (entry[None, :] < ends[:, None])
    return place, tl.where(mine, more[None, :], 0.0)


@triton.jit
def _spans(offsets, output, d2, N: tl.constexpr):
    """Where what is beside the levels of N outputs begins and ends: of all, and of each, (N,)."""
    first = tl.program_id(0) * N
    starts = tl.load(offsets + tl.minimum(output, d2))
    ends = tl.load(offsets + tl.minimum(output + 1, d2))
    return tl.load(offsets + tl.minimum(first, d2)), tl.load(offsets + tl.minimum(first + N, d2)), starts, ends


@triton.jit
def _add_plane(
    rows,
    inside,
    x,
    x_row,
    x_column,
    inputs,
    count,
    d1,
    tiles,
    BITS: tl.constexpr,
    offset: tl.constexpr,
    M: tl.constexpr,
    T: tl.constexpr,
):
    """Products of one plane with up to four rows of x, float32 (N,) each; rows: pointers to its words, (N, 1)."""
    x1, x2, x3 = x + x_row, x + 2 * x_row, x + 3 * x_row
    sums0 = tl.zeros([rows.shape[0], T], tl.float32)
    sums1, sums2, sums3 = sums0, sums0, sums0
    words_a_row = tiles * (4 * BITS)
    for first in range(0, words_a_row, T):
        word = first + tl.arange(0, T)
        held = inside[:, None] & (word < words_a_row)[None, :]
        words = tl.load(rows + word[None, :], mask=held, other=0)
        for i in tl.static_range(32 // BITS):
            place = _inputs(word, i, BITS)
            u = _steps(inputs, place, d1)
            number = _field(words, i, BITS, offset, 1)
            sums0 += number * _scaled(x, x_column, place, u, True, d1)[None, :]
            if M > 1:
                sums1 += number * _scaled(x1, x_column, place, u, count > 1, d1)[None, :]
            if M > 2:
                sums2 += number * _scaled(x2, x_column, place, u, count > 2, d1)[None, :]
                sums3 += number * _scaled(x3, x_column, place, u, count > 3, d1)[None, :]
    return tl.sum(sums0, 1), tl.sum(sums1, 1), tl.sum(sums2, 1), tl.sum(sums3, 1)


@triton.jit
def few(
    x,
    x_row,
    x_column,
    packed,
    outputs,
    inputs,
    offsets,
    columns,
    rest,
    y,
    count,
    d1,
    d2,
    tiles,
    BITS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
):
    """One to four rows, without tensor cores. Grid (outputs / N). x (count, d1) with strides x_row, x_column; y (count,
    d2). tiles: of TILE inputs in a row. M: count, or more. T: words of a plane."""
    output = tl.program_id(0) * N + tl.arange(0, N)
    inside = output < d2
    low_offset: tl.constexpr = 8 if BITS == 4 else 0
    rows = (packed + output.to(tl.int64) * (tiles * (16 * BITS))).to(tl.pointer_type(tl.uint32))[:, None]
    sums0, sums1, sums2, sums3 = _add_plane(
        rows, inside, x, x_row, x_column, inputs, count, d1, tiles, 4, low_offset, M, T
    )
    if BITS > 4:
        high: tl.constexpr = BITS - 4
        more0, more1, more2, more3 = _add_plane(
            *(rows + tiles * 16, inside, x, x_row, x_column, inputs, count, d1, tiles),
            *(high, 1 << high - 1, M, T),
        )
        sums0 += 16 * more0
        sums1 += 16 * more1
        sums2 += 16 * more2
        sums3 += 16 * more3
    begin, last, starts, ends = _spans(offsets, output, d2, N)
    for start in range(begin, last, BESIDE):
        place, more = _entries(columns, rest, start, last, starts, ends, d1)
        u = _steps(inputs, place, d1)
        sums0 += tl.sum(more * _scaled(x, x_column, place, u, True, d1)[None, :], 1)
        if M > 1:
            sums1 += tl.sum(more * _scaled(x + x_row, x_column, place, u, count > 1, d1)[None, :], 1)
        if M > 2:
            sums2 += tl.sum(more * _scaled(x + 2 * x_row, x_column, place, u, count > 2, d1)[None, :], 1)
            sums3 += tl.sum(more * _scaled(x + 3 * x_row, x_column, place, u, count > 3, d1)[None, :], 1)
    step = tl.load(outputs + output, mask=inside, other=0)
    tl.store(y + output, sums0 * step, mask=inside)
    if M > 1:
        tl.store(y + d2 + output, sums1 * step, mask=inside & (count > 1))
    if M > 2:
        tl.store(y + 2 * d2 + output, sums2 * step, mask=inside & (count > 2))
        tl.store(y + 3 * d2 + output, sums3 * step, mask=inside & (count > 3))


@triton.jit
def _dot_plane(
    sums,
    rows,
    inside,
    x_rows,
    x_column,
    exist,
    inputs,
    d1,
    tiles,
    BITS: tl.constexpr,
    offset: tl.constexpr,
    times: tl.constexpr,
    OPERAND: tl.constexpr,
    ROUND: tl.constexpr,
    T: tl.constexpr,
):
    """sums (M, N) and `times` the products of one plane; x_rows: pointers to the rows of x, (M, 1)."""
    words_a_row = tiles * (4 * BITS)
    for first in range(0, words_a_row, T):
        word = first + tl.arange(0, T)
        words = tl.load(rows + word[None, :], mask=inside[:, None] & (word < words_a_row)[None, :], other=0)
        for i in tl.static_range(32 // BITS):
            place = _inputs(word, i, BITS)
            left = tl.load(x_rows + place[None, :] * x_column, mask=exist & (place < d1)[None, :], other=0)
            left = (left.to(tl.float32) * _steps(inputs, place, d1)[None, :]).to(ROUND).to(OPERAND)
            right = _field(words, i, BITS, offset, times).to(OPERAND)
            sums = tl.dot(left, tl.trans(right), sums)
    return sums


@triton.jit
def many(
    x,
    x_row,
    x_column,
    packed,
    outputs,
    inputs,
    offsets,
    columns,
    rest,
    y,
    count,
    d1,
    d2,
    tiles,
    BITS: tl.constexpr,
    OPERAND: tl.constexpr,
    ROUND: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
):
    """Some rows, for tensor cores. Grid (outputs / N, rows / M), otherwise as `few`.

    x u is rounded to ROUND, x's dtype, levels are exact in it; both are multiplied as OPERAND.
    """
    output = tl.program_id(0) * N + tl.arange(0, N)
    row = tl.program_id(1) * M + tl.arange(0, M)
    inside, exist = output < d2, (row < count)[:, None]
    low_offset: tl.constexpr = 8 if BITS == 4 else 0
    rows = (packed + output.to(tl.int64) * (tiles * (16 * BITS))).to(tl.pointer_type(tl.uint32))[:, None]
    x_rows = x + row.to(tl.int64)[:, None] * x_row
    sums = tl.zeros([M, N], tl.float32)
    sums = _dot_plane(
        sums, rows, inside, x_rows, x_column, exist, inputs, d1, tiles, 4, low_offset, 1, OPERAND, ROUND, T
    )
    if BITS > 4:
        high: tl.constexpr = BITS - 4
        sums = _dot_plane(
            *(sums, rows + tiles * 16, inside, x_rows, x_column, exist, inputs, d1, tiles),
            *(high, 1 << high - 1, 16, OPERAND, ROUND, T),
        )
    begin, last, starts, ends = _spans(offsets, output, d2, N)
    for start in range(begin, last, BESIDE):
        place, more = _entries(columns, rest, start, last, starts, ends, d1)
        left = tl.load(x_rows + place[None, :] * x_column, mask=exist & (place < d1)[None, :], other=0).to(tl.float32)
        left = (left * _steps(inputs, place, d1)[None, :]).to(ROUND).to(OPERAND)
        right = more.to(ROUND)  # two parts hold it
        sums = tl.dot(left, tl.trans(right.to(OPERAND)), sums)
        sums = tl.dot(left, tl.trans((more - right.to(tl.float32)).to(OPERAND)), sums)
    step = tl.load(outputs + output, mask=inside, other=0)
    pointers = y + row.to(tl.int64)[:, None] * d2 + output[None, :]
    tl.store(pointers, sums * step[None, :], mask=exist & inside[None, :])


@triton.jit
def unpack(packed, outputs, inputs, weight, d1, d2, tiles, BITS: tl.constexpr, N: tl.constexpr, T: tl.constexpr):
    """weight (d2, d1) = W without what is beside its levels. Grid (outputs / N, words of a row's low plane / T)."""
    output = tl.program_id(0) * N + tl.arange(0, N)
    word = tl.program_id(1) * T + tl.arange(0, T)
    inside = (output < d2)[:, None] & (word < tiles * 16)[None, :]
    rows = (packed + output.to(tl.int64) * (tiles * (16 * BITS))).to(tl.pointer_type(tl.uint32))[:, None]
    words = tl.load(rows + word[None, :], mask=inside, other=0)
    high: tl.constexpr = BITS - 4
    each: tl.constexpr = 4 * high  # words of the other plane in a tile
    step = tl.load(outputs + output, mask=output < d2, other=0)[:, None]
    pointers = weight + output.to(tl.int64)[:, None] * d1
    for i in tl.static_range(8):
        place = _inputs(word, i, 4)
        if BITS == 4:
            number = _field(words, i, 4, 8, 1)
        else:
            inner = place % TILE
            where = tiles * 16 + place // TILE * each + inner % each
            others = tl.load(rows + where[None, :], mask=inside, other=0) >> (inner // each * high)[None, :]
            number = _field(words, i, 4, 0, 1) + _field(others, 0, high, 1 << high - 1, 16)
        w = number * _steps(inputs, place, d1)[None, :] * step
        tl.store(pointers + place[None, :], w, mask=inside & (place < d1)[None, :])


@triton.jit
def put_beside(outputs, inputs, offsets, columns, rest, weight, d1, BITS: tl.constexpr):
    """Elements of `weight` (d2, d1) with something beside their level, which is the largest or the smallest of its
    bits. Grid (outputs,)."""
    output = tl.program_id(0)
    start, last = tl.load(offsets + output), tl.load(offsets + output + 1)
    step = tl.load(outputs + output)
    largest: tl.constexpr = (1 << BITS - 1) - 1
    least: tl.constexpr = -127 if BITS == 8 else -(1 << BITS - 1)
    for first in range(start, last, BESIDE):
        entry = first + tl.arange(0, BESIDE)
        place = tl.load(columns + entry, mask=entry < last, other=0)
        more = tl.load(rest + entry, mask=entry < last, other=0)
        level = more + tl.where(more > 0, largest, least)
        w = level * tl.load(inputs + place) * step
        tl.store(weight + output.to(tl.int64) * d1 + place, w, mask=entry < last)
