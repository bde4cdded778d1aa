"""ec: integer levels in an entropy code, with a step for each output and each input.

    bytes               what
    1                   lanes of the coder: 1, 4 or 16
    1                   nothing, 0
    2                   bits of each step of outputs, of inputs, and of each width of outputs, of inputs: four each
    4                   the least of each of these four, int8
    4                   unit, float32
    8                   d2 and k, uint32
    ...                 the four, less the least one, in one bit stream each
    4 (blocks - 1)      where blocks but the first begin, uint32, from the end of this list
    ...                 the blocks, each a stream of its own (format/rans.py)

Numbers are little-endian. Steps are quarter octaves; the step of a level is the unit times those of its output and its
input. Widths are quarter octaves, too: of the levels, of which the stored ones are the weights' (the steps are added).
How many rows a block has follows from d2 and k (`block_rows`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cospadi.errors import CheckpointError
from cospadi.format import rans
from cospadi.format.kinds import Codec

BLOCK = 2**17
"""Levels that a block has at least, where there are as many."""

LEAST_ROWS = 64
"""Rows that a block has at least: the trellis begins anew in each."""

LANES = {16: 50_000, 4: 12_000, 1: 0}
"""Lanes -> levels from which so many are used: each costs 32 bits a block."""

HEADER = 20

LARGEST = 120
"""Of a step and of a width, in size."""

WIDEST = 15
"""Bits that a stream of steps or widths has at most a number."""

OCTAVE = (1.0, 1.1875, 1.4140625, 1.6796875)
"""Quarters of an octave, as bf16 has them."""


def block_rows(d2: int, k: int) -> int:
    """Rows of a block."""
    return min(d2, max(LEAST_ROWS, -(-BLOCK // k)))


def step_of(quarters: Tensor) -> Tensor:
    """The steps that quarter octaves stand for, float32, exact on any machine."""
    quarters = quarters.to(torch.int32)
    octave = torch.tensor(OCTAVE, dtype=torch.float32, device=quarters.device)
    return torch.ldexp(octave[quarters & 3], quarters >> 2)


class Head(NamedTuple):
    """What is stored beside the levels.

    Attributes:
        outputs, inputs: steps, float32 (d2,) and (k,), the unit among the second.
        rows, cols: widths, int16 (d2,) and (k,).
        nbytes: of it.
    """

    lanes: int
    outputs: Tensor
    inputs: Tensor
    rows: Tensor
    cols: Tensor
    nbytes: int

    @property
    def height(self) -> int:
        """Rows of a block."""
        return block_rows(len(self.rows), len(self.cols))


class Ec(Codec):
    """Sizes depend on what is stored, so that config.json tells them."""

    def shape(self, values: list[int], nbytes: int = 0) -> list[int]:
        return [nbytes]

    def encode_levels(
        self, levels: Tensor, unit: float, outputs: Tensor, inputs: Tensor, rows: Tensor, cols: Tensor
    ) -> Tensor:
        """What is stored of N transposed.

        Args:
            levels: int16 (d2, k). unit: a float32 number.
            outputs, inputs: steps, int16 quarter octaves (d2,) and (k,), at most LARGEST in size. rows, cols: widths,
                likewise, cut there.
        """
        (d2, k), device = levels.shape, levels.device
        outputs, inputs, rows, cols = (part.cpu() for part in (outputs, inputs, rows, cols))
        rows, cols = rows.clamp(-LARGEST, LARGEST), cols.clamp(-LARGEST, LARGEST)
        height = block_rows(d2, k)
        lanes = next(lanes for lanes, least in LANES.items() if height * k >= least)
        packed = [_pack(part) for part in (outputs, inputs, rows + outputs, cols + inputs)]
        (rows, cols) = (_unpack(*packed[2], d2) - outputs, _unpack(*packed[3], k) - inputs)
        stream, offsets = rans.encode(levels.cpu(), rows, cols, height, lanes)
        header = np.zeros(HEADER, np.uint8)
        header[0] = lanes
        header[2:4] = [packed[0][0] << 4 | packed[1][0], packed[2][0] << 4 | packed[3][0]]
        header[4:8].view(np.int8)[:] = [least for _, least, _ in packed]
        header[8:12].view("<f4")[:] = unit
        header[12:].view("<u4")[:] = d2, k
        head = np.concatenate([header, *(stream for _, _, stream in packed)])
        return _join(torch.from_numpy(head), stream, offsets).to(device)

    def head(self, stored: Tensor) -> Tensor:
        """What is stored but the levels: header, steps and widths."""
        content = stored[:HEADER].cpu().contiguous().numpy()
        counts = self._sizes(stored) * 2
        sizes = (-(-count * bits // 8) for count, bits in zip(counts, _widths(content), strict=True))
        return stored[: HEADER + sum(sizes)].clone()

    def put_back(self, head: Tensor, levels: Tensor) -> Tensor:
        """What was stored, from its head and the levels, int16 (d2, k): the same bytes."""
        found = self._read_head(head)
        stream, offsets = rans.encode(levels.cpu(), found.rows, found.cols, found.height, found.lanes)
        return _join(head.cpu(), stream, offsets).to(head.device)

    def _content(self, stored: Tensor) -> tuple[Head, Tensor, Tensor]:
        """What is stored, taken apart: the head, the stream of the blocks, and their offsets in it, int64.

        Raises:
            ValueError: it cannot be read; the message reads like "ends before its blocks begin".
        """
        head = self._read_head(stored)
        start = head.nbytes + 4 * (-(-len(head.rows) // head.height) - 1)
        if len(stored) < start:
            raise ValueError("ends before its blocks begin")
        content = stored.cpu().contiguous()
        inner = content[head.nbytes : start].numpy().copy().view("<u4").astype(np.int64)
        offsets = torch.from_numpy(np.concatenate([[0], inner, [len(content) - start]]))
        if not (offsets.diff() >= 4 * head.lanes).all():
            raise ValueError("has blocks that do not follow each other")
        return head, content[start:], offsets

    def _read_head(self, stored: Tensor) -> Head:
        """
        Raises:
            ValueError: it cannot be read.
        """
        d2, k = self._sizes(stored)
        content = stored.cpu().contiguous().numpy()
        lanes, bits = int(content[0]), _widths(content)
        unit = float(content[8:12].view("<f4")[0])
        if lanes not in LANES or content[1] or d2 < 1 or k < 1 or not 0 < unit < math.inf:
            raise ValueError("has a header that makes no sense")
        counts, place, found = (d2, k, d2, k), HEADER, []
        for count, size, least in zip(counts, bits, content[4:8].view(np.int8), strict=True):
            end = place + -(-count * size // 8)
            if end > len(content):
                raise ValueError("ends before its steps and widths do")
            found.append(_unpack(size, int(least), content[place:end], count))
            place = end
        outputs, inputs, rows, cols = found
        return Head(lanes, step_of(outputs), unit * step_of(inputs), rows - outputs, cols - inputs, place)

    def decode_levels(self, stored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """N transposed, int16 (d2, k), and the steps of outputs and inputs, float32, on the stored tensor's device.

        Raises:
            CheckpointError: it is damaged.
        """
        try:
            head, stream, offsets = self._content(stored)
            levels = rans.decode(stream, offsets, head.rows, head.cols, head.height, head.lanes)
        except ValueError as error:
            raise CheckpointError(
                f"levels in a code cannot be read ({error}). cospadi verify tells which tensor is damaged"
            ) from None
        device = stored.device
        return levels.to(device), head.outputs.to(device), head.inputs.to(device)

    def decode(self, stored: Tensor, values: list[int]) -> Tensor:
        """As everywhere.

        Raises:
            CheckpointError: it is damaged.
        """
        levels, outputs, inputs = self.decode_levels(stored)
        return (levels * inputs * outputs[:, None]).flatten()[: math.prod(values)].view(values)

    def problem(self, tensor: Any, values: list[int]) -> str | None:
        stored, count = tensor[:], math.prod(values)
        try:
            if self.room(stored) != count:
                return f"holds {self.room(stored)} values, config.json says {count}"
            self._content(stored)
        except ValueError as error:
            return str(error)
        return None

    def room(self, stored: Tensor) -> int:
        return math.prod(self._sizes(stored))

    def _sizes(self, stored: Tensor) -> tuple[int, int]:
        """d2 and k.

        Raises:
            ValueError: it has no header.
        """
        if len(stored) < HEADER:
            raise ValueError(f"has {len(stored)} bytes, fewer than a header")
        d2, k = stored[12:HEADER].cpu().contiguous().numpy().view("<u4")
        return int(d2), int(k)


def _widths(content: np.ndarray) -> list[int]:
    """Bits of each of the four lists of steps and widths, as the header says."""
    return [int(content[2 + i // 2]) >> (4 if i % 2 == 0 else 0) & 15 for i in range(4)]


def _join(head: Tensor, stream: Tensor, offsets: Tensor) -> Tensor:
    """What is stored."""
    inner = torch.from_numpy(offsets[1:-1].numpy().astype("<u4").view(np.uint8))
    return torch.cat([head, inner, stream])


def _pack(numbers: Tensor) -> tuple[int, int, np.ndarray]:
    """Bits of each number's distance from the least one, that one, and the stream of the distances."""
    least = max(-128, min(127, int(numbers.min())))
    above = (numbers.to(torch.int32) - least).clamp(0, 2**WIDEST - 1).numpy()
    bits = int(above.max()).bit_length()
    each = ((above[:, None] >> np.arange(bits)) & 1).astype(np.uint8)
    return bits, least, np.packbits(each.flatten(), bitorder="little")


def _unpack(bits: int, least: int, stream: np.ndarray, count: int) -> Tensor:
    """The numbers, int16 (count,)."""
    if not bits:
        return torch.full((count,), least, dtype=torch.int16)
    each = np.unpackbits(stream, count=count * bits, bitorder="little").reshape(count, bits).astype(np.int64)
    return torch.from_numpy(((each << np.arange(bits)).sum(1) + least).astype(np.int16))


EC = Ec("ec", 0, torch.uint8)
