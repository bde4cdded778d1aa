"""stored: bf16 (k, d1), row i is atom i."""

from __future__ import annotations

import torch
from torch import Tensor

from cospadi.format.kinds import Dictionary


class Stored(Dictionary):
    """Any D, rounded to bf16."""

    def shape(self, d1: int, k: int) -> list[int]:
        return [k, d1]

    def encode(self, dictionary: Tensor | None) -> Tensor:
        assert dictionary is not None
        largest = float(torch.finfo(torch.bfloat16).max)
        return dictionary.clamp(-largest, largest).to(torch.bfloat16).T.contiguous()

    def decode(self, stored: Tensor | None) -> Tensor:
        assert stored is not None
        return stored.float()


STORED = Stored("stored", torch.bfloat16)
