"""The top bits of a bf16, in one little-endian bit stream: what codecs of 10 to 14 bits have in common."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cospadi.format import packing
from cospadi.format.kinds import Numbers


class Stream(Numbers):
    """Value i is bits b i to b i + b - 1 of the stream; unused bits of its last byte are 0."""

    def shape(self, values: list[int], nbytes: int = 0) -> list[int]:
        return [packing.value_stream_bytes(math.prod(values), self.bits)]

    def encode(self, values: Tensor) -> Tensor:
        return packing.pack_values(values.flatten(), self.bits)

    def decode(self, stored: Tensor, values: list[int]) -> Tensor:
        return packing.unpack_values(stored, math.prod(values), self.bits).view(values)

    def problem(self, tensor: Any, values: list[int]) -> str | None:
        spare = packing.unused_value_bits_set(tensor[-1:], math.prod(values), self.bits)
        return "has bits set past its last value" if spare else None


def stream(name: str, bits: int) -> Stream:
    """The codec of the top `bits` bits of a bf16, an even number that kernels read: 10, 12 or 14."""
    return Stream(name, bits, torch.uint8, kernel_bits=bits)
