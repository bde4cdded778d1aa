"""Levels of a code in memory: W = v N u, N in the bits that a row's levels need, and what is too large beside it."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from cospadi import native
from cospadi.format.codecs.ec import EC
from cospadi.runtime import pages

GROUP = 32
"""Inputs that lie together; rows are padded to a multiple of them."""

MARGIN = 64
"""Bytes after the last row, which kernels may read."""

WIDTHS = range(2, 9)
"""Bits that the levels of a row may have in memory."""

EQUAL_WIDTHS = (4, 6, 8)
"""Those of all rows where the GPU's kernels read them."""

TILE = 128
"""Inputs that lie together there; rows are padded to a multiple of them."""

BESIDE_BITS = 64
"""What a level beside the others takes."""

MOST_BESIDE = 0.01
"""Of all levels; where more would, a layer is dense."""

_CHUNK = 1 << 22
"""Levels that are unpacked at once."""


class _Parts(NamedTuple):
    packed: Tensor
    places: Tensor
    outputs: Tensor
    inputs: Tensor
    offsets: Tensor
    columns: Tensor
    rest: Tensor


class Levels(_Parts):
    """A matrix W (d2, d1): W_ji = outputs_j (N_ji + what is beside it) inputs_i.

    Attributes:
        packed: N, uint8 (bytes,), row after row, and MARGIN bytes. Row j is a little-endian stream of levels, in two's
            complement of w_j bits, which zeros fill up to a multiple of GROUP. Of 8 bits -128 is not used. Where all
            rows have one of EQUAL_WIDTHS, as `_planes` tells.
        places: int32 (d2 + 1,): w_0 + ... + w_(j-1). A row's bytes are GROUP / 8 w_j for each GROUP of inputs. Empty
            where all rows have one of EQUAL_WIDTHS.
        outputs, inputs: float32 (d2,) and (d1,).
        offsets: int32 (d2 + 1,): what is beside row j are the entries from offsets[j] to offsets[j + 1] of
        columns, rest: int32 and float32, an input each and how much its level is larger than N says.

    What follows from these is kept beside them, since it takes as long as a small product.
    """

    @cached_property
    def shape(self) -> tuple[int, int]:
        """d2 and d1."""
        return len(self.outputs), len(self.inputs)

    @cached_property
    def by_output(self) -> bool:
        """Whether each row has a width of its own."""
        return len(self.places) > 0

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """Of the tensors, in their order, which never get other memory."""
        return tuple(part.data_ptr() for part in self)

    def __getstate__(self) -> None:
        """Copies have addresses of their own."""

    @property
    def bits(self) -> float:
        """Of a level, on average over the rows."""
        held = padded(self.shape[1]) if self.by_output else tiled(self.shape[1])
        return 8 * (len(self.packed) - MARGIN) / (self.shape[0] * held)


def padded(d1: int) -> int:
    """Levels of a row, with the zeros at its end."""
    return -(-d1 // GROUP) * GROUP


def tiled(d1: int) -> int:
    """The same where all rows have one width."""
    return -(-d1 // TILE) * TILE


def read_levels(stored: Tensor) -> Levels | Tensor:
    """What codec `ec` has stored; W, float32 (d2, d1), where too many levels are too large for a byte.

    Raises:
        CheckpointError: it is damaged.
    """
    return hold_levels(*EC.decode_levels(stored))


def hold_levels(numbers: Tensor, outputs: Tensor, inputs: Tensor) -> Levels | Tensor:
    """As `read_levels`, of levels int16 (d2, d1), contiguous, and steps of outputs and inputs, for the device that they
    are on."""
    most = MOST_BESIDE * numbers.numel()
    if numbers.device.type == "cpu":
        widths, counts = choose_widths(numbers)
        if int(counts.sum()) <= most:
            return pack_levels(numbers, outputs, inputs, widths, counts)
    else:
        counts = _count_large(numbers)
        taken = {
            tiled(numbers.shape[1]) * numbers.shape[0] * bits + BESIDE_BITS * total: bits
            for bits, total in zip(WIDTHS, counts.sum(1).tolist(), strict=True)
            if bits in EQUAL_WIDTHS and total <= most
        }
        if taken:
            bits = taken[min(taken)]
            return pack_levels(numbers, outputs, inputs, bits, counts[bits - WIDTHS[0]])
    return numbers * inputs * outputs[:, None]


def choose_widths(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The bits by which each row of levels int16 (d2, d1) takes the least memory, and how many of its levels are too
    large for them, both int32 (d2,)."""
    counts = _count_large(numbers)
    widths = torch.tensor(WIDTHS, dtype=torch.int32, device=numbers.device)[:, None]
    best = (padded(numbers.shape[1]) * widths + BESIDE_BITS * counts).argmin(0, keepdim=True)
    return widths[0] + best[0].int(), counts.gather(0, best)[0]


def _count_large(numbers: Tensor) -> Tensor:
    """Levels of each row that are too large for so many bits, int32 (widths, d2)."""
    found, (d2, d1) = native.library(), numbers.shape
    if found is None or numbers.device.type != "cpu":
        return torch.stack([(_held(numbers, bits) != numbers).sum(1) for bits in WIDTHS]).int()
    counts = torch.empty(len(WIDTHS), d2, dtype=torch.int32)
    found.cospadi_count_large(numbers.data_ptr(), d2, d1, counts.data_ptr(), torch.get_num_threads())
    return counts


def _held(numbers: Tensor, bits: int | Tensor) -> Tensor:
    """The nearest levels that so many bits hold."""
    most = 2 ** (torch.as_tensor(bits, device=numbers.device) - 1) - 1
    least = torch.where(most == 127, -127, -most - 1)
    return numbers.clamp(least.to(numbers.dtype), most.to(numbers.dtype))


def pack_levels(
    numbers: Tensor, outputs: Tensor, inputs: Tensor, widths: Tensor | int, counts: Tensor | None = None
) -> Levels:
    """Levels int16 (d2, d1), contiguous, in so many bits by row, int32 (d2,), or one of EQUAL_WIDTHS for all. `counts`,
    where they are known, are how many levels of each row are too large for them, int32 (d2,)."""
    (d2, d1), device = numbers.shape, numbers.device
    equal = widths if isinstance(widths, int) else 0
    widths = torch.as_tensor(widths, dtype=torch.int32, device=device).expand(d2)
    if counts is None:
        counts = _count_large(numbers).gather(0, widths.long()[None] - WIDTHS[0])[0]
    places, offsets = (torch.nn.functional.pad(each.cumsum(0), (1, 0)).int() for each in (widths, counts))
    unit, total = (tiled(d1) if equal else padded(d1)) // 8, int(offsets[-1])
    nbytes = int(places[-1]) * unit + MARGIN
    packed = pages.zeros(nbytes) if device.type == "cpu" else torch.zeros(nbytes, dtype=torch.uint8, device=device)
    columns = torch.empty(total, dtype=torch.int32, device=device)
    rest = torch.empty(total, dtype=torch.float32, device=device)
    levels = Levels(packed, places[:0].clone() if equal else places, outputs, inputs, offsets, columns, rest)
    found = native.library()
    if found is not None and device.type == "cpu" and not equal:
        to = [part.data_ptr() for part in (packed, places, offsets, columns, rest)]
        found.cospadi_pack_levels(numbers.data_ptr(), d2, d1, *to, torch.get_num_threads())
        return levels
    kept = _held(numbers, widths[:, None])
    beside = numbers - kept
    rows, found_columns = beside.nonzero(as_tuple=True)
    columns.copy_(found_columns)
    rest.copy_(beside[rows, found_columns])
    if equal:
        packed[: nbytes - MARGIN] = _planes(torch.nn.functional.pad(kept, (0, tiled(d1) - d1)), equal).flatten()
        return levels
    eights = torch.nn.functional.pad(kept, (0, padded(d1) - d1)).view(d2, -1, 8)
    for bits in WIDTHS:
        (rows,) = (widths == bits).nonzero(as_tuple=True)
        words = torch.zeros(len(rows), unit, dtype=torch.int64, device=device)
        for i in range(8):
            words |= (eights[rows, :, i].long() & (2**bits - 1)) << bits * i
        each = words.view(torch.uint8).view(len(rows), unit, 8)[:, :, :bits].reshape(len(rows), unit * bits)
        packed[(places[rows].long() * unit)[:, None] + torch.arange(bits * unit, device=device)] = each
    return levels


def _planes(numbers: Tensor, bits: int) -> Tensor:
    """Rows of levels (d2, d1) in one of EQUAL_WIDTHS, d1 a multiple of TILE; uint8 (d2, d1 bits / 8).

    A level plus 2 ** (bits - 1) is a number of `bits` bits. For the whole row lie first the 4 lowest of them, then the
    others, if there are. Numbers of b bits are in words of 32, little-endian, 4 b of them for a TILE: word w has those
    of its inputs w, w + 4 b, w + 8 b, ..., from its lowest bits.
    """
    raised = (numbers.int() + (1 << bits - 1)).view(len(numbers), -1, TILE)
    planes = [_to_words(raised & 15, 4)]
    if bits > 4:
        planes.append(_to_words(raised >> 4, bits - 4))
    return torch.cat([plane.flatten(1) for plane in planes], 1).view(torch.uint8)


def _to_words(numbers: Tensor, bits: int) -> Tensor:
    """Words int32 (d2, tiles, 4 bits) of numbers int32 (d2, tiles, TILE)."""
    parts = numbers.view(*numbers.shape[:2], 32 // bits, -1)
    words = torch.zeros_like(parts[:, :, 0])
    for i in range(32 // bits):
        words |= parts[:, :, i] << bits * i
    return words


def _from_words(words: Tensor, bits: int) -> Tensor:
    """The inverse of `_to_words`."""
    parts = [(words >> bits * i) & ((1 << bits) - 1) for i in range(32 // bits)]
    return torch.cat(parts, 2)


def _from_planes(levels: Levels) -> Tensor:
    """N, int32 (d2, d1), of rows of one width."""
    (d2, d1), bits = levels.shape, round(levels.bits)
    rows = levels.packed[: len(levels.packed) - MARGIN].view(torch.int32).view(d2, -1)
    low = tiled(d1) // 8
    numbers = _from_words(rows[:, :low].reshape(d2, -1, TILE * 4 // 32), 4)
    if bits > 4:
        numbers += _from_words(rows[:, low:].reshape(d2, -1, TILE * (bits - 4) // 32), bits - 4) << 4
    return numbers.flatten(1)[:, :d1] - (1 << bits - 1)


def dense(levels: Levels) -> Tensor:
    """W, float32 (d2, d1)."""
    return all_levels(levels) * levels.inputs * levels.outputs[:, None]


def all_levels(levels: Levels) -> Tensor:
    """N and what is beside it, float32 (d2, d1)."""
    d2, d1, device = len(levels.outputs), len(levels.inputs), levels.packed.device
    numbers = torch.empty(d2, d1, dtype=torch.float32, device=device)
    if not levels.by_output:
        return _with_beside(numbers.copy_(_from_planes(levels)), levels)
    unit, places = padded(d1) // 8, levels.places.long()
    places, widths = places[:-1], places.diff()
    step = max(1, _CHUNK // padded(d1))
    eight = torch.arange(8, device=device)
    for first in range(0, d2, step):
        place, width = places[first : first + step, None, None], widths[first : first + step, None, None]
        byte = place * unit + torch.arange(unit, device=device)[:, None] * width + eight
        words = levels.packed[byte].view(torch.int64)
        sign = 1 << (width - 1)
        some = (((words >> width * eight) & (2 * sign - 1)) ^ sign) - sign
        numbers[first : first + step] = some.flatten(1)[:, :d1]
    return _with_beside(numbers, levels)


def _with_beside(numbers: Tensor, levels: Levels) -> Tensor:
    """Adds what is beside them to levels float32 (d2, d1), in place."""
    counts, each = levels.offsets.diff().long(), torch.arange(len(numbers), device=numbers.device)
    rows = torch.repeat_interleave(each, counts, output_size=len(levels.columns))
    return numbers.index_put_((rows, levels.columns.long()), levels.rest, accumulate=True)
