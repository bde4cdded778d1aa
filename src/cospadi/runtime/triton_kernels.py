"""Triton kernels of z S; `ops/triton.py` launches them. Importing this file needs Triton.

All read S as it is stored (docs/format.md): a support mask a column and one stream of values, which is addressed as
32-bit words whatever the width of a value (the two bytes of a bf16 value are 16 bits of the stream). A lane holds one
or several bytes of a column's mask. Where the values of its atoms begin follows from a running count of bits of the
stream, carried from tile to tile, and a prefix sum of popcounts inside the tile; from there on the lane walks over its
mask in groups of four atoms, whose values lie in one 64-bit window of the stream.

Names: M rows of z, N columns of S and T lanes along a column in one tile; BITS a value.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _popcount(word):
    """Set bits of each uint32, int32."""
    pairs = word - ((word >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return ((((nibbles + (nibbles >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _mask_words(rows, inside, first, end, T: tl.constexpr, BYTES: tl.constexpr):
    """Mask bits of the atoms `first`, ... of N columns, uint32 (N, T): lane t holds those from first + 8 BYTES t on.

    rows: pointers to the columns' masks, (N,). inside: which of them exist, (N,). No bit of an atom from `end` on is
    set and no byte that holds none but such atoms is read.
    """
    atom = first + tl.arange(0, T) * (8 * BYTES)
    words = tl.zeros([rows.shape[0], T], tl.uint32)
    for byte in tl.static_range(BYTES):
        held = (atom + 8 * byte) < end
        pointer = rows[:, None] + (atom // 8 + byte)[None, :]
        words |= tl.load(pointer, mask=inside[:, None] & held[None, :], other=0).to(tl.uint32) << (8 * byte)
    kept = tl.minimum(tl.maximum(end - atom, 0), 32).to(tl.uint64)
    return words & ((tl.full([T], 1, tl.uint64) << kept) - 1).to(tl.uint32)[None, :]


@triton.jit
def _window(stream, room, tail, position):
    """The 64 bits of the stream from bit `position` on, uint64 (N, T).

    stream: pointers to the words that `position` counts from, (N, 1). room: whole words of the stream from there on,
    int32 (N, 1). tail: what follows the last whole word, zeros after it. position: int32 (N, T).
    """
    word = position >> 5
    pointer = stream + word
    first = tl.load(pointer, mask=word < room, other=tail).to(tl.uint64)
    second = tl.load(pointer + 1, mask=word < room - 1, other=tail).to(tl.uint64)
    third = tl.load(pointer + 2, mask=word < room - 2, other=tail).to(tl.uint64)
    shift = (position & 31).to(tl.uint64)
    low = (((second << 32) | first) >> shift).to(tl.uint32)
    high = (((third << 32) | second) >> shift).to(tl.uint32)
    return (high.to(tl.uint64) << 32) | low


@triton.jit
def _entry(window, shifts, present, i: tl.constexpr, BITS: tl.constexpr):
    """Entry i of four, float32 (N, T), see `_entries`."""
    code = (window >> ((shifts >> (8 * i)) & 63).to(tl.uint64)).to(tl.uint32) << (32 - BITS)
    if BITS == 16:
        code = tl.where(((present >> (8 * i)) & 1) != 0, code, 0)
    return code.to(tl.float32, bitcast=True)


@triton.jit
def _entries(window, nibble, BITS: tl.constexpr):
    """Entries of S for four atoms of a mask, each float32 (N, T), and how many bits of the stream hold them.

    One multiplication moves the four mask bits to four bytes, another sums them to where in the window each value
    begins. An atom without a value gets a shift past all four of them, where the window holds zeros; with 16 bits
    there is no room for that.
    """
    present = (nibble * 0x00204081) & 0x01010101
    ends = present * (0x01010101 * BITS)
    shifts = ends << 8
    if BITS < 16:
        window &= (1 << (4 * BITS)) - 1
        shifts |= (present ^ 0x01010101) * 56
    entry0 = _entry(window, shifts, present, 0, BITS)
    entry1 = _entry(window, shifts, present, 1, BITS)
    entry2 = _entry(window, shifts, present, 2, BITS)
    entry3 = _entry(window, shifts, present, 3, BITS)
    return entry0, entry1, entry2, entry3, (ends >> 24).to(tl.int32)


@triton.jit
def _columns(support, values, stream_bytes, offsets, column, d2, row_bytes, start, BITS: tl.constexpr, T: tl.constexpr):
    """Where N columns are stored.

    Returns pointers to their masks (N,), which columns exist (N,), pointers to a word of the stream at or before their
    first value (N, 1), whole words of the stream from there on (N, 1), the bytes after its last whole word as a word,
    and where the value of the first atom from `start` on begins, in bits from that word, int32 (N,).
    """
    inside = column < d2
    rows = support + column.to(tl.int64) * row_bytes
    first_bit = tl.load(offsets + column, mask=inside, other=0).to(tl.int64) * BITS
    first_word = first_bit >> 5
    position = (first_bit & 31).to(tl.int32)
    for first in range(0, start, T * 32):
        words = _mask_words(rows, inside, first, start, T, 4)
        position += tl.sum(_popcount(words), 1) * BITS
    words = values.to(tl.pointer_type(tl.uint32))
    whole = stream_bytes // 4
    room = tl.minimum(whole - first_word, 1 << 30).to(tl.int32)
    rest = values.to(tl.pointer_type(tl.uint8)) + whole * 4
    left = stream_bytes - whole * 4
    tail = tl.load(rest, mask=left > 0, other=0).to(tl.uint32)
    tail |= tl.load(rest + 1, mask=left > 1, other=0).to(tl.uint32) << 8
    tail |= tl.load(rest + 2, mask=left > 2, other=0).to(tl.uint32) << 16
    return rows, inside, (words + first_word)[:, None], room[:, None], tail, position


@triton.jit
def _four_of_z(pointers, held):
    """z at four successive atoms, each float32 (M, T), from pointers (M, T, 4)."""
    quads = tl.load(pointers, mask=held, other=0).to(tl.float32)
    even, odd = tl.split(tl.reshape(quads, [quads.shape[0], quads.shape[1], 2, 2]))
    z0, z2 = tl.split(even)
    z1, z3 = tl.split(odd)
    return z0, z1, z2, z3


@triton.jit
def _times(entry, z, ROUND: tl.constexpr):
    """Products (M, N, T) of entries (N, T), rounded to z's dtype first, and z (M, T)."""
    if ROUND.is_fp16():  # The other dtypes hold every entry.
        entry = entry.to(tl.float16).to(tl.float32)
    return entry[None, :, :] * z[:, None, :]


def _decode(
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
    row_bytes,
    span,
    M: tl.constexpr,
    BITS: tl.constexpr,
    ROUND: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Few rows: out[split] = z S over the atoms of each split, summed in float32 without tensor cores.

    Grid (columns / N, splits). z (count, k) with strides z_row, z_atom; out (splits, count, d2); a split is `span`
    atoms, a multiple of 8.
    """
    column = tl.program_id(0) * N + tl.arange(0, N)
    split = tl.program_id(1)
    start = split * span
    end = tl.minimum(start + span, k)
    rows, inside, stream, room, tail, running = _columns(
        support, values, stream_bytes, offsets, column, d2, row_bytes, start, BITS, T
    )
    row = tl.arange(0, M)
    z_rows = z + row.to(tl.int64)[:, None, None] * z_row
    sums = tl.zeros([M, N, T], tl.float32)
    for first in range(start, end, T * BYTES * 8):
        words = _mask_words(rows, inside, first, end, T, BYTES)
        set_bits = _popcount(words)
        position = running[:, None] + (tl.cumsum(set_bits, 1) - set_bits) * BITS
        running += tl.sum(set_bits, 1) * BITS
        lane = (first + tl.arange(0, T) * (8 * BYTES))[:, None] + tl.arange(0, 4)[None, :]
        for nibble in tl.static_range(2 * BYTES):
            window = _window(stream, room, tail, position)
            entry0, entry1, entry2, entry3, taken = _entries(window, (words >> (4 * nibble)) & 15, BITS)
            position += taken
            atom = (lane + 4 * nibble)[None, :, :]
            z0, z1, z2, z3 = _four_of_z(
                z_rows + atom.to(tl.int64) * z_atom, (row < count)[:, None, None] & (atom < end)
            )
            sums += _times(entry0, z0, ROUND)
            sums += _times(entry1, z1, ROUND)
            sums += _times(entry2, z2, ROUND)
            sums += _times(entry3, z3, ROUND)
    pointers = out + (split.to(tl.int64) * count + row)[:, None] * d2 + column[None, :]
    tl.store(pointers, tl.sum(sums, 2), mask=(row < count)[:, None] & inside[None, :])


def _tiles(
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
    row_bytes,
    span,
    bucket,
    BITS: tl.constexpr,
    OPERAND: tl.constexpr,
    ROUND: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
):
    """Many rows: out[split] = z S over the atoms of each split, with tiles of S unpacked for tensor cores.

    Grid (rows / M times columns / N, splits), otherwise as `_decode`. Operands are rounded to ROUND, z's dtype, and
    multiplied as OPERAND. `bucket` only tells the autotuner how many rows there are, roughly.
    """
    row_blocks = tl.cdiv(count, M)
    row = (tl.program_id(0) % row_blocks) * M + tl.arange(0, M)
    column = (tl.program_id(0) // row_blocks) * N + tl.arange(0, N)
    split = tl.program_id(1)
    start = split * span
    end = tl.minimum(start + span, k)
    rows, inside, stream, room, tail, running = _columns(
        support, values, stream_bytes, offsets, column, d2, row_bytes, start, BITS, T
    )
    z_rows = z + row.to(tl.int64)[:, None] * z_row
    sums = tl.zeros([M, N], tl.float32)
    for first in range(start, end, T * 8):
        atom = first + tl.arange(0, T * 8)
        left = tl.load(
            z_rows + atom.to(tl.int64)[None, :] * z_atom,
            mask=(row < count)[:, None] & (atom < end)[None, :],
            other=0,
        ).to(OPERAND)
        words = _mask_words(rows, inside, first, end, T, 1)
        set_bits = _popcount(words)
        position = running[:, None] + (tl.cumsum(set_bits, 1) - set_bits) * BITS
        running += tl.sum(set_bits, 1) * BITS
        low0, low1, low2, low3, taken = _entries(_window(stream, room, tail, position), words & 15, BITS)
        high0, high1, high2, high3, _ = _entries(_window(stream, room, tail, position + taken), words >> 4, BITS)
        # Atom 4 a + 2 b + c of a byte comes to index (a, b, c) of three new axes, the last of which joins last.
        even = tl.join(tl.join(low0, high0), tl.join(low2, high2))
        odd = tl.join(tl.join(low1, high1), tl.join(low3, high3))
        # Rounded after the reshape: one right before the product takes the five axes into shared memory, where Triton
        # 3.6 finds no layout of them for Hopper and Blackwell.
        right = tl.reshape(tl.join(even, odd), [N, T * 8]).to(ROUND).to(OPERAND)
        sums = tl.dot(left, tl.trans(right), sums, input_precision="ieee")
    pointers = out + (split.to(tl.int64) * count + row)[:, None] * d2 + column[None, :]
    tl.store(pointers, sums, mask=(row < count)[:, None] & inside[None, :])


@triton.jit
def add_splits(partial, out, size, splits, BLOCK: tl.constexpr):
    """out (size,) = sum of partial (splits, size), float32, in their order."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for split in range(0, splits):
        sums += tl.load(partial + split * size + index, mask=index < size, other=0)
    tl.store(out + index, sums, mask=index < size)


INTERPRETED = not isinstance(add_splits, triton.JITFunction)
"""Whether Triton's interpreter runs the kernels, on tensors in main memory (TRITON_INTERPRET=1)."""

DECODE_CONFIGS = [
    triton.Config({"N": columns, "T": 32, "BYTES": bytes_}, num_warps=warps)
    for columns, bytes_, warps in [
        (4, 1, 4),
        (8, 1, 2),
        (8, 1, 4),
        (8, 2, 4),
        (16, 1, 4),
        (16, 1, 8),
        (16, 2, 4),
        (32, 1, 8),
        (32, 2, 8),
        (4, 2, 4),
        (4, 4, 4),
        (2, 2, 1),
    ]
]

TILE_CONFIGS = [
    triton.Config({"M": rows, "N": columns, "T": lanes}, num_warps=warps, num_stages=stages)
    for rows, columns, lanes, warps, stages in [
        (16, 16, 16, 2, 1),
        (16, 32, 8, 4, 1),
        (16, 32, 16, 4, 1),
        (16, 32, 16, 4, 2),
        (16, 64, 8, 4, 1),
        (16, 64, 16, 8, 1),
        (32, 32, 8, 4, 1),
        (32, 64, 8, 4, 1),
        (32, 64, 8, 4, 3),
        (64, 64, 8, 4, 1),
        (64, 128, 8, 8, 1),
        (64, 128, 8, 8, 3),
        (128, 64, 8, 8, 1),
        (128, 128, 8, 8, 1),
        (128, 128, 8, 8, 3),
        (128, 256, 8, 8, 1),
        (256, 128, 8, 8, 1),
    ]
]


def fitting(configs: list[Any], arguments: dict[str, Any], **_: Any) -> list[Any]:
    """Configurations whose tiles have about as many rows as there are; none with large tiles of float32."""
    bucket = arguments["bucket"]
    x = arguments["z"] if "z" in arguments else arguments["x"]
    most = 64 * 128 if x.element_size() == 4 else 256 * 128
    fitting = [config for config in configs if min(bucket, 64) <= config.kwargs["M"] <= bucket]
    return [config for config in fitting if config.kwargs["M"] * config.kwargs["N"] <= most]


def _quantiles(call: Callable[[], Any], quantiles: Sequence[float]) -> Any:
    """Milliseconds of a call as the autotuner asks for them; infinite where a configuration does not compile."""
    try:
        return triton.testing.do_bench(call, quantiles=quantiles)
    except torch.OutOfMemoryError:  # says nothing of the configuration
        raise
    except Exception:  # raised again by the launch that follows, if no configuration compiles
        return [float("inf")] * len(quantiles)


def tuned(kernel: Any, configs: list[Any], key: list[str], small: dict[str, int], **options: Any) -> Any:
    """The kernel with its configurations timed at the first call of each key and kept on disk; `small` interpreted."""
    if INTERPRETED:
        return triton.autotune([triton.Config(small)], key)(triton.jit(kernel))
    options["do_bench"] = _quantiles
    # Older releases keep timings in memory only.
    if "cache_results" in inspect.signature(triton.autotune).parameters:
        options["cache_results"] = True
    return triton.autotune(configs, key, **options)(triton.jit(kernel))


decode = tuned(_decode, DECODE_CONFIGS, ["k", "d2", "M", "BITS"], {"N": 32, "T": 16, "BYTES": 2})
tiles = tuned(
    _tiles,
    TILE_CONFIGS,
    ["k", "d2", "bucket", "BITS"],
    {"M": 32, "N": 32, "T": 16},
    prune_configs_by={"early_config_prune": fitting},
)
