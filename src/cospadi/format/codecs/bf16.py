"""bf16: values as torch has them, in their own shape."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cospadi.format import packing
from cospadi.format.kinds import Numbers


class Bf16(Numbers):
    """Sixteen bits a value."""

    def shape(self, values: list[int], nbytes: int = 0) -> list[int]:
        return values

    def encode(self, values: Tensor) -> Tensor:
        return packing.pack_values(values, 16)

    def decode(self, stored: Tensor, values: list[int]) -> Tensor:
        return stored.flatten()[: math.prod(values)].float().view(values)


BF16 = Bf16("bf16", 16, torch.bfloat16, plain=True, kernel_bits=16)
