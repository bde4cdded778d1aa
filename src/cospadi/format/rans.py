"""Integer levels of trellis-coded quantization <-> bytes: interleaved rANS with tables of Gaussians.

Levels are (d2, d1), row j is output j. Going down a column, state s of the trellis has quantizer q = s & 1: a symbol k
stands for level 2k - sign(k) q, and NEXT[s][k & 1] is the next state. It is 0 at the top of every block of rows.
Level (j, i) is of class rows[j] + cols[i], clamped to LOW .. HIGH: its standard deviation is about 2^(class / 4).

Blocks of `block_rows` rows are streams of their own, one after another. In a block, groups of `lanes` columns follow
each other (the last one may be narrower), in a group rows, in a row lanes. Each lane has a state x of 32 bits, at least
2^16. A block's bytes are the states that its decoder begins with, uint32, and the words that it reads, uint16, all
little-endian. A row is decoded in two steps, in each of which the lanes whose x is less than 2^16 then become
x << 16 | next word, in ascending order:

1. slot = x % 4096 falls into symbol h of the table of (class, q) (`rans_tables.py`; symbols are in the order -H .. H,
   escape); x becomes frequency (x >> 12) + slot - the sum of the frequencies before it.
2. If h is the escape, the low 16 bits of x are k, as int16; else the low b bits of x are those of k below h. x is
   shifted by as many. Where b is 0, k is h.

Where all is right, every x is 2^16 at the end, and no word is left.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from cospadi.format.rans_tables import HIGH, LOW, PRECISION, frequencies, raw_bits, reach
from cospadi.native import best_level, library

__all__ = [
    "CLASSES",
    "HIGH",
    "LANES",
    "LOW",
    "NEXT",
    "PRECISION",
    "STATES",
    "bits_table",
    "decode",
    "encode",
    "levels_of",
    "symbols_of",
]

NEXT = ((0, 2), (5, 7), (1, 3), (6, 4), (2, 0), (4, 6), (3, 1), (7, 5))
"""State and parity of the symbol -> next state: the trellis of eight states of VVC's dependent quantization."""

STATES = len(NEXT)

LANES = (1, 4, 16)

CLASSES = HIGH - LOW + 1

_BOUND = 1 << 16
_SLOTS = 1 << PRECISION
_ESCAPE = -128  # in a table of slots
_ESCAPE_BITS = 16
_SYMBOLS = 128  # room of a table by symbols
_MAGNITUDES = 128  # of `bits_table`

_NO_LEVEL = "a level is none that its state's quantizer has"
_DAMAGED = "the coded levels are damaged: a block does not end as it should"
_REASONS = {2: "there is not enough memory to code the levels", 3: _DAMAGED, 4: _NO_LEVEL}


def symbols_of(levels: Tensor, block_rows: int) -> tuple[Tensor, Tensor]:
    """States of the trellis and symbols, uint8 and int16, both (d2, d1), of levels int16 (d2, d1).

    Raises:
        ValueError: a level that its state's quantizer does not have.
    """
    d2, d1 = levels.shape
    blocks = _blocks(d2, block_rows)
    padded = torch.nn.functional.pad(levels, (0, 0, 0, blocks * block_rows - d2)).view(blocks, block_rows, d1)
    following = torch.tensor(NEXT, dtype=torch.uint8, device=levels.device).flatten()
    states = torch.zeros(padded.shape, dtype=torch.uint8, device=levels.device)
    for r in range(1, block_rows):
        before = states[:, r - 1]
        magnitude = _halved(padded[:, r - 1], before)
        states[:, r] = following[(2 * before + (magnitude & 1)).int()]
    states = states.flatten(0, 1)[:d2]
    symbols = _halved(levels, states) * levels.sign()
    if not torch.equal(_levels(symbols, states & 1), levels.int()):
        raise ValueError(_NO_LEVEL)
    return states, symbols.to(torch.int16)


def levels_of(symbols: Tensor, block_rows: int) -> Tensor:
    """Inverse of `symbols_of`: levels int16 (d2, d1) of symbols, of which level 2k has to be one."""
    levels, following = torch.zeros_like(symbols, dtype=torch.int16), torch.tensor(NEXT, device=symbols.device)
    for r, row in enumerate(symbols.to(torch.int16)):
        if r % block_rows == 0:
            states = torch.zeros(len(row), dtype=torch.int64, device=symbols.device)
        levels[r] = 2 * row - (states & 1) * row.sign()
        states = following[states, (row & 1).long()]
    return levels


def encode(levels: Tensor, rows: Tensor, cols: Tensor, block_rows: int, lanes: int) -> tuple[Tensor, Tensor]:
    """Levels as bytes.

    Args:
        levels: int16 (d2, d1).
        rows, cols: classes' parts, int16 (d2,) and (d1,).
        block_rows: rows that are decoded without the others.
        lanes: 1, 4 or 16 columns that are decoded together.
    Returns:
        uint8 (bytes,), and where blocks begin in it and the last one ends: int64 (blocks + 1,).
    Raises:
        ValueError: a level that its state's quantizer does not have; arguments that do not fit each other.
    """
    block_rows = _checked_rows(rows, cols, block_rows, lanes)
    levels = _checked(levels, rows, cols)
    found, (d2, d1) = _library(levels, rows, cols), levels.shape
    if found is None:
        return _encode(levels, rows, cols, block_rows, lanes)
    tables, blocks = _tables_of(rows, cols), _blocks(d2, block_rows)
    rows, cols = rows.contiguous(), cols.contiguous()
    stream = torch.empty(4 * (blocks * lanes + d2 * d1), dtype=torch.uint8)
    offsets = torch.zeros(blocks + 1, dtype=torch.int64)
    status = found.cospadi_rans_encode(
        levels.data_ptr(),
        d2,
        d1,
        rows.data_ptr(),
        cols.data_ptr(),
        block_rows,
        lanes,
        tables.symbols.data_ptr(),
        tables.reaches.data_ptr(),
        stream.data_ptr(),
        offsets.data_ptr(),
        torch.get_num_threads(),
    )
    if status:
        raise ValueError(_REASONS[status])
    return stream[: int(offsets[-1])].clone(), offsets


def decode(
    stream: Tensor,
    offsets: Tensor,
    rows: Tensor,
    cols: Tensor,
    block_rows: int,
    lanes: int,
    first_block: int = 0,
    last_block: int | None = None,
) -> Tensor:
    """Inverse of `encode` for the blocks before `last_block` from `first_block` on.

    Args:
        stream, offsets: what `encode` gave, all of it.
        rows, cols, block_rows, lanes: those of all levels, as they were given to it.
    Returns:
        int16 (rows of these blocks, d1).
    Raises:
        ValueError: damaged bytes, as far as they show; offsets that are not the stream's.
    """
    block_rows = _checked_rows(rows, cols, block_rows, lanes)
    blocks = _blocks(len(rows), block_rows)
    last_block = blocks if last_block is None else last_block
    if not 0 <= first_block <= last_block <= blocks:
        raise ValueError(f"blocks {first_block} to {last_block} were asked for, and there are {blocks}")
    _check_offsets(stream, offsets, blocks, lanes)
    found = _library(stream, offsets, rows, cols)
    if found is None:
        return _decode(stream, offsets, rows, cols, block_rows, lanes, first_block, last_block)
    tables = _tables_of(rows, cols)
    rows, cols, stream, offsets = rows.contiguous(), cols.contiguous(), stream.contiguous(), offsets.contiguous()
    height = min(last_block * block_rows, len(rows)) - min(first_block * block_rows, len(rows))
    out = torch.empty(height, len(cols), dtype=torch.int16)
    status = found.cospadi_rans_decode(
        stream.data_ptr(),
        offsets.data_ptr(),
        first_block,
        last_block,
        len(rows),
        len(cols),
        rows.data_ptr(),
        cols.data_ptr(),
        block_rows,
        lanes,
        tables.slots.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
        best_level(),
    )
    if status:
        raise ValueError(_REASONS[status])
    return out


@cache
def bits_table() -> Tensor:
    """What a symbol takes: float32 (classes, 2, 128), of class index c - LOW, quantizer q and magnitude |k|.

    The bits are -log2(frequency / 4096), of the escape where |k| needs it, and raw bits. Where raw bits make k and -k
    fall into cells of different size, it is the mean of both.
    """
    tables = _tables()
    for c in range(LOW, HIGH + 1):
        _fill(c)
    magnitudes = torch.arange(_MAGNITUDES, dtype=torch.int32).expand(CLASSES, -1)
    classes = torch.arange(CLASSES)[:, None].expand(-1, _MAGNITUDES)
    bits = torch.zeros(CLASSES, 2, _MAGNITUDES, dtype=torch.float64)
    for sign in (-1, 1):
        index, _, _ = tables.coded(sign * magnitudes, classes)
        for q in (0, 1):
            bits[:, q] += tables.bits[2 * classes + q, index] / 2
    return bits.float()


@dataclass(frozen=True)
class _Tables:
    """What `frequencies` says, as arrays: of class index c and quantizer q in row 2 c + q.

    Attributes:
        symbols: int32 (2 classes, 128): frequency, and the sum of those before it from bit 16 on. Symbol h is entry
            h + H, the escape 2 H + 1.
        bits: float64 (2 classes, 128): what a symbol takes, with its raw bits.
        slots: int32 (2 classes, 4096): frequency in 12 bits, slot - the sum before it in 12, h in 8.
        shifts, reaches: int32 (classes,): b and H.
    """

    symbols: Tensor
    bits: Tensor
    slots: Tensor
    shifts: Tensor
    reaches: Tensor

    def to(self, device: torch.device) -> _Tables:
        """The same on a device."""
        return _Tables(
            *(table.to(device) for table in (self.symbols, self.bits, self.slots, self.shifts, self.reaches))
        )

    def coded(self, symbols: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Symbols int32 of class indices -> indices of entries, raw bits' number and raw bits."""
        shifts, reaches = self.shifts[classes], self.reaches[classes]
        h = symbols >> shifts
        escapes = h.abs() > reaches
        count = torch.where(escapes, _ESCAPE_BITS, shifts)
        return torch.where(escapes, 2 * reaches + 1, h + reaches), count, symbols & ((1 << count) - 1)


@cache
def _tables() -> _Tables:
    """All tables' room; `_fill` fills those of a class."""
    return _Tables(
        symbols=torch.zeros(2 * CLASSES, _SYMBOLS, dtype=torch.int32),
        bits=torch.zeros(2 * CLASSES, _SYMBOLS, dtype=torch.float64),
        slots=torch.zeros(2 * CLASSES, _SLOTS, dtype=torch.int32),
        shifts=torch.tensor([raw_bits(c) for c in range(LOW, HIGH + 1)], dtype=torch.int32),
        reaches=torch.tensor([reach(c) for c in range(LOW, HIGH + 1)], dtype=torch.int32),
    )


@cache
def _fill(c: int) -> None:
    tables, h = _tables(), reach(c)
    symbols = torch.tensor([*range(-h, h + 1), _ESCAPE], dtype=torch.int32)
    raw = torch.tensor([*[raw_bits(c)] * (2 * h + 1), _ESCAPE_BITS])
    for q in (0, 1):
        row, counts = 2 * (c - LOW) + q, torch.tensor(frequencies(c, q), dtype=torch.int32)
        before = (counts.cumsum(0) - counts).int()
        tables.symbols[row, : len(counts)] = counts | before << 16
        tables.bits[row, : len(counts)] = PRECISION - counts.double().log2() + raw
        slots = torch.arange(_SLOTS, dtype=torch.int32)
        each = torch.repeat_interleave(torch.arange(len(counts)), counts)
        tables.slots[row] = counts[each] | (slots - before[each]) << 12 | symbols[each] << 24


def _tables_of(rows: Tensor, cols: Tensor) -> _Tables:
    """The tables, those of these classes filled."""
    sums = {row + col for row in set(rows.tolist()) for col in set(cols.tolist())}
    for c in {min(max(c, LOW), HIGH) for c in sums}:
        _fill(c)
    return _tables()


def _encode(levels: Tensor, rows: Tensor, cols: Tensor, block_rows: int, lanes: int) -> tuple[Tensor, Tensor]:
    """`encode` in plain torch: all blocks and lanes at once, step by step from the last to the first."""
    (d2, d1), device = levels.shape, levels.device
    tables, blocks, groups = _tables_of(rows, cols).to(device), _blocks(d2, block_rows), -(-d1 // lanes)
    states, symbols = symbols_of(levels, block_rows)
    classes = _classes(rows[:, None], cols)
    index, counts, raw = tables.coded(symbols.int(), classes)
    entries = tables.symbols[2 * classes + (states & 1), index]

    def steps(values: Tensor) -> Tensor:
        """(d2, d1) -> (groups * block_rows, blocks, lanes), 0 where there is nothing."""
        padded = torch.nn.functional.pad(values, (0, groups * lanes - d1, 0, blocks * block_rows - d2))
        return padded.view(blocks, block_rows, groups, lanes).permute(2, 1, 0, 3).flatten(0, 1)

    # Steps without a level have frequency 4096 from 0 on, which leaves x as it is.
    exists = steps(torch.ones(levels.shape, dtype=torch.bool, device=device))
    frequency, before = steps(entries & 0xFFFF).long().masked_fill(~exists, _SLOTS), steps(entries >> 16).long()
    count, value = steps(counts).long(), steps(raw).long()
    x = torch.full((blocks, lanes), _BOUND, dtype=torch.int64, device=device)
    words = torch.zeros(len(exists), 2, blocks, lanes, dtype=torch.int32, device=device)
    written = torch.zeros(words.shape, dtype=torch.bool, device=device)
    for step in reversed(range(len(exists))):
        for part, limit in ((1, 1 << (32 - count[step])), (0, frequency[step] << (32 - PRECISION))):
            written[step, part] = full = x >= limit
            words[step, part] = x & 0xFFFF
            x = torch.where(full, x >> 16, x)
            if part:
                x = x << count[step] | value[step]
            else:
                f = frequency[step]
                x = (x // f << PRECISION) + x % f + before[step]
    words, written = words.permute(2, 0, 1, 3).flatten(1), written.permute(2, 0, 1, 3).flatten(1)
    parts = [
        _bytes(part, size)
        for states, read, block in zip(x, written, words, strict=True)
        for part, size in ((states, 4), (block[read], 2))
    ]
    sizes = 4 * lanes + 2 * written.sum(1)
    stream = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8, device=device)
    return stream, torch.nn.functional.pad(sizes.cumsum(0), (1, 0))


def _decode(
    stream: Tensor,
    offsets: Tensor,
    rows: Tensor,
    cols: Tensor,
    block_rows: int,
    lanes: int,
    first_block: int,
    last_block: int,
) -> Tensor:
    """`decode` in plain torch: all blocks and lanes at once, step by step."""
    d1, device, blocks, groups = len(cols), stream.device, last_block - first_block, -(-len(cols) // lanes)
    tables = _tables_of(rows, cols).to(device)
    following = torch.tensor(NEXT, device=device).flatten()
    rows = rows[first_block * block_rows : last_block * block_rows]
    height = len(rows)
    row = torch.nn.functional.pad(rows, (0, blocks * block_rows - height)).view(blocks, block_rows)
    row_exists = (torch.arange(blocks * block_rows, device=device) < height).view(blocks, block_rows)
    col = torch.nn.functional.pad(cols, (0, groups * lanes - d1)).view(groups, lanes)
    col_exists = (torch.arange(groups * lanes, device=device) < d1).view(groups, lanes)
    words = stream.view(-1, 2).int() if len(stream) else stream.new_zeros(1, 2).int()
    words = words[:, 0] | words[:, 1] << 8
    begins, ends = (offsets.to(device)[place : place + blocks] // 2 for place in (first_block, first_block + 1))
    halves = words[begins[:, None] + torch.arange(2 * lanes, device=device)].long().view(blocks, lanes, 2)
    x = halves[..., 0] | halves[..., 1] << 16
    damaged = (x < _BOUND).any()
    place = begins + 2 * lanes

    def refill(x: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        low = x < _BOUND
        after = place[:, None] + low.cumsum(1)
        word = words[(after - 1).clamp(0, len(words) - 1)]
        return torch.where(low, x << 16 | word, x), after[:, -1]

    out = torch.zeros(blocks, block_rows, groups, lanes, dtype=torch.int32, device=device)
    for group in range(groups):
        states = torch.zeros(blocks, lanes, dtype=torch.int64, device=device)
        for r in range(block_rows):
            exists = row_exists[:, r, None] & col_exists[group]
            classes, quantizer = _classes(row[:, r, None], col[group]), states & 1
            entry = tables.slots[2 * classes + quantizer, x & (_SLOTS - 1)]
            x = torch.where(exists, (entry & 0xFFF) * (x >> PRECISION) + (entry >> 12 & 0xFFF), x)
            x, place = refill(x, place)
            h, shift = entry >> 24, tables.shifts[classes]
            escapes = h == _ESCAPE
            count = torch.where(exists, torch.where(escapes, _ESCAPE_BITS, shift), 0)
            raw = (x & ((1 << count) - 1)).int()
            x, place = refill(x >> count, place)
            symbols = torch.where(escapes, (raw << 16) >> 16, h << shift | raw)
            out[:, r, group] = torch.where(exists, _levels(symbols, quantizer), 0)
            states = following[2 * states + (symbols & 1)]
    levels = out.view(blocks * block_rows, groups * lanes)[:height, :d1]
    if damaged or (place != ends).any() or (x != _BOUND).any() or (levels.to(torch.int16) != levels).any():
        raise ValueError(_DAMAGED)
    return levels.to(torch.int16)


def _halved(levels: Tensor, states: Tensor) -> Tensor:
    """|k| of levels, int32."""
    return (levels.int().abs() + (states & 1)) >> 1


def _levels(symbols: Tensor, quantizer: Tensor) -> Tensor:
    """Symbols int32 -> levels int32."""
    return 2 * symbols - quantizer.int() * symbols.sign()


def _classes(rows: Tensor, cols: Tensor) -> Tensor:
    """Class indices, int64."""
    return (rows.long() + cols.long()).clamp(LOW, HIGH) - LOW


def _bytes(values: Tensor, size: int) -> Tensor:
    """The low bytes of integers, little-endian: uint8 (size * values,)."""
    shifts = 8 * torch.arange(size, device=values.device)
    return (values[:, None] >> shifts & 0xFF).to(torch.uint8).flatten()


def _blocks(d2: int, block_rows: int) -> int:
    return -(-d2 // block_rows)


def _library(*tensors: Tensor) -> ctypes.CDLL | None:
    """The library, where there is one and it can reach these."""
    return library() if all(tensor.device.type == "cpu" for tensor in tensors) else None


def _checked_rows(rows: Tensor, cols: Tensor, block_rows: int, lanes: int) -> int:
    """Rows of a block, of which there are no more than rows."""
    if lanes not in LANES or block_rows < 1:
        raise ValueError(f"lanes are 1, 4 or 16 and blocks have a row or more, not {lanes} and {block_rows}")
    for part in (rows, cols):
        if part.dtype != torch.int16 or part.dim() != 1:
            raise ValueError(f"parts of classes are int16 in one dimension, not {part.dtype} of {list(part.shape)}")
    return max(1, min(block_rows, len(rows)))


def _checked(levels: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    if levels.dtype != torch.int16 or levels.shape != (len(rows), len(cols)):
        raise ValueError(
            f"levels are {list(levels.shape)} of {levels.dtype}; {len(rows)} x {len(cols)} of int16 are needed"
        )
    return levels.contiguous()


def _check_offsets(stream: Tensor, offsets: Tensor, blocks: int, lanes: int) -> None:
    if stream.dtype != torch.uint8 or stream.dim() != 1 or offsets.dtype != torch.int64:
        raise ValueError(f"coded levels are uint8 and their offsets int64, not {stream.dtype} and {offsets.dtype}")
    if offsets.shape != (blocks + 1,):
        raise ValueError(f"there are {list(offsets.shape)} offsets; {blocks} blocks have {blocks + 1}")
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(stream):
        raise ValueError(f"offsets go from {int(offsets[0])} to {int(offsets[-1])}, and there are {len(stream)} bytes")
    sizes = offsets.diff()
    if (sizes < 4 * lanes).any() or (sizes % 2).any():
        raise ValueError("blocks are shorter than their coder's states, or end within a word")
