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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cospadi.errors import CheckpointError
from cospadi.format import rans
from cospadi.format.kinds import Codec, Tuned

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
        lanes, unit, (outputs, inputs, rows, cols), nbytes = self._lists(stored)
        return Head(lanes, step_of(outputs), unit * step_of(inputs), rows - outputs, cols - inputs, nbytes)

    def _lists(self, stored: Tensor) -> tuple[int, float, list[Tensor], int]:
        """Lanes, unit, the four lists, int16, and the bytes of all that.

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
        return lanes, unit, found, place

    def tuned(self, stored: Tensor, values: list[int], inputs: int) -> Tuned:
        """Unit and steps; the code of the levels stays, and with it every width."""
        levels, _, _ = self.decode_levels(stored)
        _, unit, (of_outputs, of_inputs, rows, cols), _ = self._lists(self.head(stored))
        bits, least = _widths(stored[:HEADER].cpu().numpy()), stored[4:8].cpu().numpy().view(np.int8)
        bounds = {}
        for name, place, steps, sums in (("outputs", 0, of_outputs, rows), ("inputs", 1, of_inputs, cols)):
            # Both, the steps and their sums with widths that do not change, must fit the bits that they have.
            low, high = (torch.full_like(steps, -LARGEST), torch.full_like(steps, LARGEST))
            for numbers, which in ((steps, place), (sums, place + 2)):
                first = int(least[which])
                low = torch.maximum(low, first - numbers + steps)
                high = torch.minimum(high, first + 2 ** bits[which] - 1 - numbers + steps)
            bounds[name] = (low.float().to(stored.device), high.float().to(stored.device))
        found = {
            "unit": torch.zeros(1, device=stored.device),
            "outputs": of_outputs.float().to(stored.device),
            "inputs": of_inputs.float().to(stored.device),
        }
        quarter = 4 / math.log(2)
        return TunedSteps(found, {"unit": 1.0, "outputs": quarter, "inputs": quarter}, stored, levels, unit, bounds)

    def with_steps(self, stored: Tensor, unit: float, outputs: Tensor, inputs: Tensor) -> Tensor:
        """The same levels with other steps, quarter octaves that fit the bits of those that are there."""
        content = stored.cpu().contiguous().numpy().copy()
        _, _, before, _ = self._lists(self.head(stored))
        moved = [outputs.cpu().to(torch.int16) - before[0], inputs.cpu().to(torch.int16) - before[1]]
        content[8:12].view("<f4")[:] = unit
        place = HEADER
        for numbers, change, bits, least in zip(
            before, moved * 2, _widths(content), content[4:8].view(np.int8), strict=True
        ):
            stream = _stream(numbers + change - int(least), bits)
            content[place : place + len(stream)] = stream
            place += len(stream)
        return torch.from_numpy(content).to(stored.device)

    def decode_levels(self, stored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """N transposed, int16 (d2, k), and the steps of outputs and inputs, float32, on the stored tensor's device.

        Raises:
            CheckpointError: it is damaged.
        """
        try:
            head, stream, offsets = self._content(stored.cpu())  # once, not for every part of it
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


@dataclass(frozen=True)
class TunedSteps(Tuned):
    """ln of the unit over what it was, and the steps of outputs and inputs in quarter octaves; levels stay as they are
    coded.

    Attributes:
        code: what was stored. levels: int16 (d2, k). unit: what it was.
        bounds: "outputs" and "inputs" -> the least and the largest step that each may have.
    """

    code: Tensor
    levels: Tensor
    unit: float
    bounds: Mapping[str, tuple[Tensor, Tensor]]

    def rounded(self, name: str, numbers: Tensor) -> Tensor:
        return numbers if name == "unit" else numbers.round().clamp(*self.bounds[name])

    def values(self, numbers: Mapping[str, Tensor]) -> Tensor:
        outputs, inputs = (_smooth(numbers[name]) for name in ("outputs", "inputs"))
        return self.levels * (self.unit * numbers["unit"].exp() * inputs) * outputs[:, None]

    def stored(self, numbers: Mapping[str, Tensor]) -> Tensor:
        unit = float(self.unit * numbers["unit"].exp())
        return EC.with_steps(self.code, unit, numbers["outputs"], numbers["inputs"])


def _smooth(quarters: Tensor) -> Tensor:
    """`step_of`, with the gradient of 2^(q / 4)."""
    exact = quarters.detach()
    return step_of(exact) * ((quarters - exact) * (math.log(2) / 4)).exp()


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
    return bits, least, _stream(torch.from_numpy(above), bits)


def _stream(numbers: Tensor, bits: int) -> np.ndarray:
    """Numbers from 0 on as a stream of so many bits each."""
    each = ((numbers.numpy()[:, None] >> np.arange(bits)) & 1).astype(np.uint8)
    return np.packbits(each.flatten(), bitorder="little")


def _unpack(bits: int, least: int, stream: np.ndarray, count: int) -> Tensor:
    """The numbers, int16 (count,)."""
    if not bits:
        return torch.full((count,), least, dtype=torch.int16)
    each = np.unpackbits(stream, count=count * bits, bitorder="little").reshape(count, bits).astype(np.int64)
    return torch.from_numpy(((each << np.arange(bits)).sum(1) + least).astype(np.int16))


EC = Ec("ec", 0, torch.uint8)
