"""Levels of a code in memory: W = v N u, with N in bytes or half bytes and what is too large for them beside it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cospadi import native
from cospadi.format.codecs.ec import EC

GROUP = 32
"""Inputs that lie together; rows are padded to a multiple of them."""

WIDTHS = (4, 8)
"""Bits that a level may have in memory."""

MOST_BESIDE = 0.01
"""Of levels, that may be too large for their bits: each takes 8 bytes and a product of its own."""


class Levels(NamedTuple):
    """A matrix W (d2, d1): W_ji = outputs_j (N_ji + what is beside it) inputs_i.

    Attributes:
        packed: N, uint8 (d2, bytes of a row). With 8 bits a level is an int8; with 4 half a byte, in two's complement:
            of 32 levels, byte b has number b in its low half, and b + 16 in its high one. Rows end with zeros.
        outputs, inputs: float32 (d2,) and (d1,).
        offsets: int32 (d2 + 1,): what is beside row j are the entries from offsets[j] to offsets[j + 1] of
        columns, rest: int32 and float32, an input each and how much its level is larger than N says.
    """

    packed: Tensor
    outputs: Tensor
    inputs: Tensor
    offsets: Tensor
    columns: Tensor
    rest: Tensor

    @property
    def bits(self) -> int:
        """Of a level."""
        return 8 * self.packed.shape[1] // padded(len(self.inputs))


def padded(d1: int) -> int:
    """Levels of a row, with the zeros at its end."""
    return -(-d1 // GROUP) * GROUP


def read_levels(stored: Tensor) -> Levels | Tensor:
    """What codec `ec` has stored; W, float32 (d2, d1), where too many levels are too large for a byte.

    Raises:
        CheckpointError: it is damaged.
    """
    return hold_levels(*EC.decode_levels(stored))


def hold_levels(numbers: Tensor, outputs: Tensor, inputs: Tensor) -> Levels | Tensor:
    """Levels int16 (d2, d1), contiguous, with the steps of outputs and inputs: as `read_levels`."""
    for bits in WIDTHS:
        counts = _count_large(numbers, bits)
        if int(counts.sum()) <= MOST_BESIDE * numbers.numel():
            return pack_levels(numbers, outputs, inputs, bits, counts)
    return numbers * inputs * outputs[:, None]


def _count_large(numbers: Tensor, bits: int) -> Tensor:
    """Levels of each row that are too large for so many bits, int32 (d2,)."""
    found = native.library()
    if found is None or numbers.device.type != "cpu":
        return (_held(numbers, bits) != numbers).sum(1).int()
    (d2, d1), counts = numbers.shape, torch.empty(len(numbers), dtype=torch.int32)
    found.cospadi_count_large(numbers.data_ptr(), d2, d1, bits, counts.data_ptr(), torch.get_num_threads())
    return counts


def _held(numbers: Tensor, bits: int) -> Tensor:
    """The nearest levels that so many bits hold."""
    return numbers.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def pack_levels(numbers: Tensor, outputs: Tensor, inputs: Tensor, bits: int, counts: Tensor | None = None) -> Levels:
    """Levels int16 (d2, d1), contiguous, in so many bits; `counts`, if known, are those of `_count_large`."""
    (d2, d1), device = numbers.shape, numbers.device
    counts = _count_large(numbers, bits) if counts is None else counts
    offsets = torch.zeros(d2 + 1, dtype=torch.int32, device=device)
    offsets[1:] = counts.cumsum(0)
    found = native.library()
    if found is not None and device.type == "cpu":
        packed = torch.empty(d2, padded(d1) * bits // 8, dtype=torch.uint8)
        columns, beside = (torch.empty(int(offsets[-1]), dtype=of) for of in (torch.int32, torch.float32))
        to = [part.data_ptr() for part in (packed, offsets, columns, beside)]
        found.cospadi_pack_levels(numbers.data_ptr(), d2, d1, bits, *to, torch.get_num_threads())
        return Levels(packed, outputs, inputs, offsets, columns, beside)
    kept = _held(numbers, bits).to(torch.int8)
    rest = numbers - kept
    rows, columns = rest.nonzero(as_tuple=True)
    packed = torch.nn.functional.pad(kept, (0, padded(d1) - d1)).view(torch.uint8)
    if bits == 4:
        low, high = packed.view(d2, -1, 2, GROUP // 2).unbind(2)
        packed = ((low & 15) | (high << 4)).reshape(d2, -1)
    return Levels(packed, outputs, inputs, offsets, columns.int(), rest[rows, columns].float())


def dense(levels: Levels) -> Tensor:
    """W, float32 (d2, d1)."""
    packed, (d2, d1) = levels.packed, (len(levels.outputs), len(levels.inputs))
    if levels.bits == 4:
        halves = torch.stack([packed << 4, packed & 240]).view(torch.int8) >> 4
        packed = halves.view(2, d2, -1, GROUP // 2).permute(1, 2, 0, 3).reshape(d2, -1)
    numbers = packed.view(torch.int8)[:, :d1].float()
    counts = levels.offsets.diff().long()
    rows = torch.repeat_interleave(torch.arange(d2, device=numbers.device), counts)
    numbers.index_put_((rows, levels.columns.long()), levels.rest, accumulate=True)
    return numbers * levels.inputs * levels.outputs[:, None]
