"""int2g64 to int8: integers of few bits, with a scale and a zero for each group of inputs of an output.

    bytes                   what
    2 d2 n                  scales, bf16, output by output; n = ceil(k / g) groups an output, the last may be narrower
    ceil(b d2 n / 8)        zeros, in the same order, in one bit stream
    ceil(b d2 k / 8)        levels, output by output, in one bit stream

A value is (level - zero) times the scale of its group: exact in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from cospadi.format import packing
from cospadi.format.kinds import Codec, Tuned, narrowed, root_mean_square

BITS = (2, 3, 4, 5, 6, 8)

GROUPS = (64, 128, 0)


@dataclass(frozen=True)
class Integers(Codec):
    """Levels from 0 to 2 ** bits - 1.

    Attributes:
        group: inputs that have a scale and a zero in common; 0: all of an output.
    """

    group: int = 0

    def groups(self, k: int) -> int:
        """Of an output."""
        return -(-k // self.group) if self.group else 1

    def shape(self, values: list[int], nbytes: int = 0) -> list[int]:
        return [sum(self._parts(*values))]

    def scale(self, scales: Tensor) -> Tensor:
        """Scales as they are stored, float32: such that every value is a finite number."""
        largest = torch.finfo(torch.bfloat16).max / 2**self.bits
        return scales.clamp(torch.finfo(torch.bfloat16).tiny, largest).to(torch.bfloat16).float()

    def encode_levels(self, levels: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """What is stored of S transposed.

        Args:
            levels: int (d2, k). scales: float (d2, groups), rounded to bf16. zeros: int (d2, groups).
        """
        parts = [packing.pack_codes(part.flatten().to(torch.int32), self.bits) for part in (zeros, levels)]
        numbers = scales.to(torch.bfloat16).clone(memory_format=torch.contiguous_format).flatten()
        return torch.cat([numbers.view(torch.uint8), *parts])

    def decode(self, stored: Tensor, values: list[int]) -> Tensor:
        levels, scales, zeros = self.decode_levels(stored, values)
        group = self.group_of(levels)
        return (levels - zeros[:, group]) * scales[:, group]

    def decode_levels(self, stored: Tensor, values: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Levels int32 (d2, k), scales float32 and zeros int32 (d2, groups)."""
        d2, k = values
        n = self.groups(k)
        scales, zeros, levels = torch.split(stored, self._parts(d2, k))
        return (
            packing.unpack_codes(levels, d2 * k, self.bits).view(d2, k),
            _numbers(scales).view(d2, n),
            packing.unpack_codes(zeros, d2 * n, self.bits).view(d2, n),
        )

    def group_of(self, levels: Tensor) -> Tensor:
        """The group of each input of levels (d2, k), int64 (k,)."""
        k = levels.shape[1]
        return torch.arange(k, device=levels.device) // (self.group or k)

    def tuned(self, stored: Tensor, values: list[int], inputs: int) -> Tuned:
        levels, scales, zeros = self.decode_levels(stored, values)
        numbers = {"levels": levels.float(), "scales": scales}
        size = root_mean_square((levels - zeros[:, self.group_of(levels)]).float())
        return TunedIntegers(
            numbers, {"levels": size * narrowed(inputs), "scales": root_mean_square(scales)}, self, zeros
        )

    def problem(self, tensor: Any, values: list[int]) -> str | None:
        """Scales are read, and the last byte of either stream."""
        d2, k = values
        scales, zeros, _ = self._parts(d2, k)
        if not (_numbers(tensor[:scales]) * (2**self.bits - 1)).isfinite().all():
            return "has scales by which not all levels are finite numbers"
        for last, count in ((scales + zeros, d2 * self.groups(k)), (sum(self._parts(d2, k)), d2 * k)):
            if packing.unused_value_bits_set(tensor[last - 1 : last], count, self.bits):
                return "has bits set past its last value"
        return None

    def _parts(self, d2: int, k: int) -> list[int]:
        """Bytes of scales, zeros and levels."""
        count = d2 * self.groups(k)
        return [2 * count, *(packing.value_stream_bytes(n, self.bits) for n in (count, d2 * k))]


@dataclass(frozen=True)
class TunedIntegers(Tuned):
    """Levels and scales move; zeros, int32 (d2, groups), stay."""

    codec: Integers
    zeros: Tensor

    def rounded(self, name: str, numbers: Tensor) -> Tensor:
        most = 2**self.codec.bits - 1
        if name == "levels":
            return numbers.round().clamp(0, most)
        return self.codec.scale(numbers)

    def values(self, numbers: Mapping[str, Tensor]) -> Tensor:
        group = self.codec.group_of(numbers["levels"])
        return (numbers["levels"] - self.zeros[:, group]) * numbers["scales"][:, group]

    def stored(self, numbers: Mapping[str, Tensor]) -> Tensor:
        return self.codec.encode_levels(numbers["levels"], numbers["scales"], self.zeros)


def _numbers(scales: Tensor) -> Tensor:
    """bf16, as bytes anywhere in memory -> float32."""
    return scales.clone().view(torch.bfloat16).float()


def integers(bits: int, group: int) -> Integers:
    """The codec of so many bits; group 0: all of an output."""
    name = f"int{bits}g{group}" if group else f"int{bits}"
    return Integers(name, bits, torch.uint8, group=group)


INTEGERS = {codec.name: codec for codec in (integers(bits, group) for bits, group in product(BITS, GROUPS))}
"""All of them, by name."""
