"""Triton kernels of z S; `triton.py` launches them. Importing this file needs Triton.

All read S as it is stored (docs/format.md): a support mask a column and one stream of values, which is addressed as
32-bit words whatever the width of a value (the two bytes of a bf16 value are 16 bits of the stream). A lane holds a
byte of a column's mask. Where the values of its atoms begin follows from a running count of bits of the stream, carried
from tile to tile, and a prefix sum of popcounts inside the tile; from there on the lane takes four atoms at a time,
whose values lie in one 64-bit window of the stream, and shifts the window by a value at every bit that is set.

The 32 lanes along a column are those of one warp, so that prefix sums are shuffles, and two counts lie in one number,
so that one prefix sum serves both. All lanes of a program lie on one axis: of two, releases of Triton choose different
ones to lay along a warp. Masks are loaded a tile ahead. Tiles that are whole, in programs that do not come near the end
of the stream, are taken without a check; others follow in a loop of their own.

`zero` is 0, which the compiler is not to know: it keeps loads of bytes from being joined, which would put neighbours
into one lane, and popcounts of a few bits from being taken apart.

Names: M rows of z, N columns of S, S warps for a column; BITS a value.
"""

from __future__ import annotations

import triton
import triton.language as tl

LANES = tl.constexpr(32)
UNITS = tl.constexpr(2)
"""Bytes of a column's mask that a lane of `decode` holds, 32 bytes from each other."""


@triton.jit
def _popcount(word):
    """Set bits of each uint32, int32. LLVM knows the idiom, unless it can tell that some of the bits are 0."""
    pairs = word - ((word >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return ((((nibbles + (nibbles >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


INTERPRETED = not isinstance(_popcount, triton.JITFunction)
"""Whether Triton's interpreter runs the kernels, on tensors in main memory (TRITON_INTERPRET=1)."""

PLAIN = tl.constexpr(INTERPRETED)
"""Whether operands of products of tiles are float32: the interpreter would multiply the integers that hold a bf16."""


@triton.jit
def _zero(k):
    """See above. The second term makes a number that Triton knows, 1, a tensor, too."""
    return (k >> 31) + tl.program_id(0) * 0


@triton.jit
def _columns(support, values, stream_bytes, offsets, column, after, d2, k, BITS: tl.constexpr):
    """Where columns are stored, one a lane; those that do not exist are the last one. `after` follows them all.

    Returns pointers to their masks, pointers to a word of the stream at or before their first value, whole words of the
    stream from there on, the bytes after its last whole word as a word, where the first value begins, in bits from that
    word, and whether every window of theirs lies in whole words.
    """
    there = tl.minimum(column, d2 - 1)
    masks = support + there.to(tl.int64) * tl.cdiv(k, 8)
    first_bit = tl.load(offsets + there).to(tl.int64) * BITS
    last_bit = tl.load(offsets + tl.minimum(after, d2)).to(tl.int64) * BITS
    first_word = first_bit >> 5
    words = values.to(tl.pointer_type(tl.uint32)) + first_word
    whole = stream_bytes // 4
    room = tl.minimum(whole - first_word, 1 << 30).to(tl.int32)
    rest = values.to(tl.pointer_type(tl.uint8)) + whole * 4
    left = stream_bytes % 4
    tail = tl.load(rest, mask=left > 0, other=0).to(tl.uint32)
    tail |= tl.load(rest + 1, mask=left > 1, other=0).to(tl.uint32) << 8
    tail |= tl.load(rest + 2, mask=left > 2, other=0).to(tl.uint32) << 16
    return masks, words, room, tail, (first_bit & 31).to(tl.int32), (last_bit >> 5) + 3 <= whole


@triton.jit
def _masks(columns, byte, end, zero):
    """Bytes of the columns' masks, uint32, zeros from byte `end` on."""
    return tl.load(columns + byte, mask=byte < end, other=0).to(tl.uint32) | zero.to(tl.uint32)


@triton.jit
def _inside(masks, byte, k):
    """Masks without the bits that are set past the last atom."""
    return masks & ((1 << tl.minimum(tl.maximum(k - 8 * byte, 0), 8)) - 1).to(tl.uint32)


@triton.jit
def _counted(columns, byte, length, end, zero, STEP: tl.constexpr):
    """Set bits of the masks that a lane meets from its byte on, STEP by STEP over `length` bytes, int32."""
    count = tl.zeros([byte.shape[0]], tl.int32)
    for first in range(0, length, 8 * STEP):
        for step in tl.static_range(8):  # loaded at once
            count += _popcount(_masks(columns, byte + (first + step * STEP), end, zero))
    return count


@triton.jit
def _window(words, room, tail, position, CHECK: tl.constexpr):
    """The 64 bits of the stream from bit `position` on, uint64."""
    word = position >> 5
    pointer = words + word
    if CHECK:
        first = tl.load(pointer, mask=word < room, other=tail)
        second = tl.load(pointer + 1, mask=word < room - 1, other=tail)
        third = tl.load(pointer + 2, mask=word < room - 2, other=tail)
    else:
        first = tl.load(pointer)
        second = tl.load(pointer + 1)
        third = tl.load(pointer + 2)
    shift = (position & 31).to(tl.uint64)
    low = (((second.to(tl.uint64) << 32) | first) >> shift).to(tl.uint32)
    high = (((third.to(tl.uint64) << 32) | second) >> shift).to(tl.uint32)
    return (high.to(tl.uint64) << 32) | low


@triton.jit
def _value(window, BITS: tl.constexpr):
    """The value that a window begins with, float32."""
    return (window.to(tl.uint32) << (32 - BITS)).to(tl.float32, bitcast=True)


@triton.jit
def _four(window, masks, BITS: tl.constexpr):
    """Values for four atoms, the lowest bits of the masks, float32, and which of them have one."""
    present0 = (masks & 1) != 0
    present1 = (masks & 2) != 0
    present2 = (masks & 4) != 0
    value0 = _value(window, BITS)
    window = tl.where(present0, window >> BITS, window)
    value1 = _value(window, BITS)
    rest = tl.where(present1, window >> BITS, window).to(tl.uint32)  # two values at most
    value2 = _value(rest, BITS)
    rest = tl.where(present2, rest >> BITS, rest)
    return value0, value1, value2, _value(rest, BITS), present0, present1, present2, (masks & 8) != 0


@triton.jit
def _eight_of_z(pointers, atom, k, CHECK: tl.constexpr):
    """z at eight successive atoms, each float32 (T,), from pointers and atoms (T, 8)."""
    z = tl.load(pointers, mask=atom < k, other=0) if CHECK else tl.load(pointers)
    z = z.to(tl.float32)
    even, odd = tl.split(tl.reshape(z, [z.shape[0], 4, 2]))
    first, second = tl.split(tl.reshape(even, [z.shape[0], 2, 2]))
    third, fourth = tl.split(tl.reshape(odd, [z.shape[0], 2, 2]))
    z0, z4 = tl.split(first)
    z2, z6 = tl.split(second)
    z1, z5 = tl.split(third)
    z3, z7 = tl.split(fourth)
    return z0, z1, z2, z3, z4, z5, z6, z7


@triton.jit
def _add(sums, value, present, z, HALF: tl.constexpr):
    """Sums (M, N, T) and the products of values, rounded to z's dtype first, and z."""
    M: tl.constexpr = sums.shape[0]
    N: tl.constexpr = sums.shape[1]
    T: tl.constexpr = sums.shape[2]
    if HALF:  # The other dtypes hold every value.
        value = value.to(tl.float16).to(tl.float32)
    value, present = tl.reshape(value, [1, N, T]), tl.reshape(present, [1, N, T])
    return tl.where(present, sums + value * tl.reshape(z, [M, 1, T]), sums)


@triton.jit
def _decode_tile(
    sums, running, masks, words, room, tail, z, z_atom, byte, z_byte, k, zero, S: tl.constexpr, BITS: tl.constexpr,
    CHECK: tl.constexpr,
):  # fmt: skip
    """One tile of `decode`: sums (M, N, T) and where the next tile's values begin, (N, S)."""
    N: tl.constexpr = sums.shape[1]
    HALF: tl.constexpr = z.dtype.element_ty.is_fp16()
    atom = z_byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    z0, z1, z2, z3, z4, z5, z6, z7 = _eight_of_z(z[:, None] + atom.to(tl.int64) * z_atom, atom, k, CHECK)
    if CHECK:
        masks = _inside(masks, byte, k)
    # The counts of both units of a lane in one number.
    field = (tl.arange(0, UNITS) * 16)[None, :, None, None]
    counts = tl.sum(tl.reshape(_popcount(masks), [N, UNITS, S, LANES]) * ((1 << field) | zero), 1)
    totals = tl.sum(counts, 2)
    before = tl.cumsum(counts, 2) - counts + (totals << 16)[:, :, None]
    position = running[:, None, :, None] + ((before[:, None, :, :] >> field) & 0xFFFF) * BITS
    position = tl.reshape(position, [masks.shape[0]])
    running += ((totals & 0xFFFF) + (totals >> 16)) * BITS
    value0, value1, value2, value3, present0, present1, present2, present3 = _four(
        _window(words, room, tail, position, CHECK), masks, BITS
    )
    sums = _add(sums, value0, present0, z0, HALF)
    sums = _add(sums, value1, present1, z1, HALF)
    sums = _add(sums, value2, present2, z2, HALF)
    sums = _add(sums, value3, present3, z3, HALF)
    position += _popcount(masks & (15 | zero)) * BITS
    value0, value1, value2, value3, present0, present1, present2, present3 = _four(
        _window(words, room, tail, position, CHECK), masks >> 4, BITS
    )
    sums = _add(sums, value0, present0, z4, HALF)
    sums = _add(sums, value1, present1, z5, HALF)
    sums = _add(sums, value2, present2, z6, HALF)
    sums = _add(sums, value3, present3, z7, HALF)
    return sums, running


@triton.jit
def decode(
    z,
    z_row,
    z_atom,
    support,
    values,
    stream_bytes,
    offsets,
    y,
    count,
    k,
    d2,
    BITS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    S: tl.constexpr,
):
    """Few rows: y = z S, summed in float32 without tensor cores. Grid (columns / N); S warps, each for a span of atoms.

    z (count, k) with strides z_row, z_atom; y (count, d2).
    """
    STEP: tl.constexpr = UNITS * LANES
    T: tl.constexpr = STEP * S
    zero = _zero(k)
    span = tl.cdiv(k, S * STEP * 8) * STEP
    mask_bytes = tl.cdiv(k, 8)
    lane = tl.arange(0, N * T)  # (column, unit, warp, lane)
    part = lane // LANES % S * span
    byte = part + lane // (LANES * S) % UNITS * LANES + (lane % LANES | zero)
    first_column = tl.program_id(0) * N
    masks, words, room, tail, first, safe = _columns(
        support, values, stream_bytes, offsets, first_column + lane // T, first_column + N, d2, k, BITS
    )
    running = tl.max(tl.max(tl.reshape(first, [N, UNITS, S, LANES]), 3), 1)
    if S > 1:
        counts = _counted(masks, byte, span, tl.minimum(part + span, mask_bytes), zero, STEP)
        counts = tl.sum(tl.sum(tl.reshape(counts, [N, UNITS, S, LANES]), 3), 1)
        running += (tl.cumsum(counts, 1) - counts) * BITS
    z_lane = tl.arange(0, M * T)
    z_byte = z_lane // LANES % S * span + z_lane // (LANES * S) % UNITS * LANES + z_lane % LANES
    z_rows = z + tl.minimum(z_lane // T, count - 1).to(tl.int64) * z_row
    whole = safe.to(tl.int32) * (tl.maximum(k // 8 - (S - 1) * span, 0) // STEP * STEP)
    sums = tl.zeros([M, N, T], tl.float32)
    held = _masks(masks, byte, mask_bytes, zero)
    for start in range(0, whole, STEP):
        following = _masks(masks, byte + (start + STEP), mask_bytes, zero)
        sums, running = _decode_tile(
            sums, running, held, words, room, tail, z_rows, z_atom, byte + start, z_byte + start, k, zero, S, BITS,
            CHECK=False,
        )  # fmt: skip
        held = following
    for start in range(whole, span, STEP):
        following = _masks(masks, byte + (start + STEP), mask_bytes, zero)
        sums, running = _decode_tile(
            sums, running, held, words, room, tail, z_rows, z_atom, byte + start, z_byte + start, k, zero, S, BITS,
            CHECK=True,
        )  # fmt: skip
        held = following
    row = tl.arange(0, M)
    column = first_column + tl.arange(0, N)
    pointers = y + row.to(tl.int64)[:, None] * d2 + column[None, :]
    tl.store(pointers, tl.sum(sums, 2), mask=(row < count)[:, None] & (column < d2)[None, :])


@triton.jit
def _unpacked(
    running, masks, words, room, tail, byte, k, zero, BITS: tl.constexpr, DTYPE: tl.constexpr, CHECK: tl.constexpr
):
    """A tile of S (N, 256) from masks (32 N,), and where the next tile's values begin, (2, N / 2)."""
    N: tl.constexpr = 2 * running.shape[1]
    if CHECK:
        masks = _inside(masks, byte, k)
    # The counts of two columns in one number.
    field = (tl.arange(0, 2) * 16)[:, None, None]
    counts = tl.sum(tl.reshape(_popcount(masks), [2, N // 2, LANES]) * ((1 << field) | zero), 0)
    totals = tl.sum(counts, 1)
    before = ((tl.cumsum(counts, 1) - counts)[None, :, :] >> field) & 0xFFFF
    position = tl.reshape(running[:, :, None] + before * BITS, [N * LANES])
    running += ((totals[None, :] >> (tl.arange(0, 2) * 16)[:, None]) & 0xFFFF) * BITS
    value0, value1, value2, value3, present0, present1, present2, present3 = _four(
        _window(words, room, tail, position, CHECK), masks, BITS
    )
    position += _popcount(masks & (15 | zero)) * BITS
    value4, value5, value6, value7, present4, present5, present6, present7 = _four(
        _window(words, room, tail, position, CHECK), masks >> 4, BITS
    )
    nothing = zero.to(tl.float32, bitcast=True)  # no constant, which LLVM would rather select among 16 bits
    # Atom 4 a + 2 b + c of a byte comes to index (a, b, c) of three new axes, the last of which joins last.
    first = tl.join(tl.where(present0, value0, nothing), tl.where(present4, value4, nothing))
    third = tl.join(tl.where(present2, value2, nothing), tl.where(present6, value6, nothing))
    second = tl.join(tl.where(present1, value1, nothing), tl.where(present5, value5, nothing))
    fourth = tl.join(tl.where(present3, value3, nothing), tl.where(present7, value7, nothing))
    return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), [N, 8 * LANES]).to(DTYPE), running


@triton.jit
def _tile_product(
    sums, running, masks, words, room, tail, z, z_atom, byte, start, k, zero, BITS: tl.constexpr, CHECK: tl.constexpr
):
    """One tile of `tiles`: sums (M, N) and where the next tile's values begin, (2, N / 2)."""
    ROUND: tl.constexpr = z.dtype.element_ty
    atom = (8 * start + tl.arange(0, 8 * LANES))[None, :]
    pointers = z + atom.to(tl.int64) * z_atom
    left = tl.load(pointers, mask=atom < k, other=0) if CHECK else tl.load(pointers)
    right, running = _unpacked(running, masks, words, room, tail, byte, k, zero, BITS, ROUND, CHECK)
    if PLAIN:
        sums = tl.dot(left.to(tl.float32), tl.trans(right.to(tl.float32)), sums, input_precision="ieee")
    else:
        sums = tl.dot(left, tl.trans(right), sums)
    return sums, running


@triton.jit
def tiles(
    z,
    z_row,
    z_atom,
    support,
    values,
    stream_bytes,
    offsets,
    out,
    count,
    k,
    d2,
    span,
    BITS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Up to M rows, of bf16 or fp16: out[split] = z S over the atoms of each split, with S unpacked for tensor cores.

    Grid (columns / N, splits), otherwise as `decode`. out (splits, count, d2); a split is `span` bytes of the masks, a
    multiple of 32.
    """
    zero = _zero(k)
    mask_bytes = tl.cdiv(k, 8)
    lane = tl.arange(0, N * LANES)
    byte = lane % LANES | zero
    first_column = tl.program_id(0) * N
    masks, words, room, tail, first, safe = _columns(
        support, values, stream_bytes, offsets, first_column + lane // LANES, first_column + N, d2, k, BITS
    )
    running = tl.max(tl.reshape(first, [2, N // 2, LANES]), 2)
    split = tl.program_id(1)
    begin = split * span
    end = tl.minimum(begin + span, mask_bytes)
    counts = _counted(masks, byte, begin, begin, zero, LANES)
    running += tl.sum(tl.reshape(counts, [2, N // 2, LANES]), 2) * BITS
    row = tl.arange(0, M)
    z_rows = (z + tl.minimum(row, count - 1).to(tl.int64) * z_row)[:, None]
    whole = begin + safe.to(tl.int32) * ((tl.minimum(end, k // 8) - begin) // LANES * LANES)
    sums = tl.zeros([M, N], tl.float32)
    held = _masks(masks, byte + begin, mask_bytes, zero)
    for start in range(begin, whole, LANES):
        following = _masks(masks, byte + (start + LANES), mask_bytes, zero)
        sums, running = _tile_product(
            sums, running, held, words, room, tail, z_rows, z_atom, byte + start, start, k, zero, BITS, CHECK=False
        )
        held = following
    for start in range(whole, end, LANES):
        following = _masks(masks, byte + (start + LANES), mask_bytes, zero)
        sums, running = _tile_product(
            sums, running, held, words, room, tail, z_rows, z_atom, byte + start, start, k, zero, BITS, CHECK=True
        )
        held = following
    column = first_column + tl.arange(0, N)
    pointers = out + (split.to(tl.int64) * count + row)[:, None] * d2 + column[None, :]
    tl.store(pointers, sums, mask=(row < count)[:, None] & (column < d2)[None, :])


@triton.jit
def unpack(support, values, stream_bytes, offsets, out, k, d2, BITS: tl.constexpr, N: tl.constexpr):
    """S transposed, out (d2, k). Grid (columns / N)."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    zero = _zero(k)
    mask_bytes = tl.cdiv(k, 8)
    lane = tl.arange(0, N * LANES)
    byte = lane % LANES | zero
    first_column = tl.program_id(0) * N
    masks, words, room, tail, first, safe = _columns(
        support, values, stream_bytes, offsets, first_column + lane // LANES, first_column + N, d2, k, BITS
    )
    running = tl.max(tl.reshape(first, [2, N // 2, LANES]), 2)
    whole = safe.to(tl.int32) * (k // 8 // LANES * LANES)
    column = first_column + tl.arange(0, N)[:, None]
    atom = tl.arange(0, 8 * LANES)[None, :]
    rows = out + column.to(tl.int64) * k
    held = _masks(masks, byte, mask_bytes, zero)
    for start in range(0, whole, LANES):
        following = _masks(masks, byte + (start + LANES), mask_bytes, zero)
        entries, running = _unpacked(running, held, words, room, tail, byte + start, k, zero, BITS, DTYPE, CHECK=False)
        tl.store(rows + (8 * start + atom), entries, mask=column < d2)
        held = following
    for start in range(whole, mask_bytes, LANES):
        following = _masks(masks, byte + (start + LANES), mask_bytes, zero)
        entries, running = _unpacked(running, held, words, room, tail, byte + start, k, zero, BITS, DTYPE, CHECK=True)
        tl.store(rows + (8 * start + atom), entries, mask=(column < d2) & (8 * start + atom < k))
        held = following


@triton.jit
def add_splits(partial, out, size, splits, BLOCK: tl.constexpr):
    """out (size,) = sum of partial (splits, size), float32, in their order."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for split in range(0, splits):
        sums += tl.load(partial + split * size + index, mask=index < size, other=0)
    tl.store(out + index, sums, mask=index < size)
