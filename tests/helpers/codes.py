"""Levels on paths through the trellis, made up."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cospadi.format.codecs.ec import EC, block_rows
from cospadi.format.rans import levels_of


def random_code(d2: int, k: int, generator: torch.Generator, scale: float = 1.0, spread: float = 4.0) -> Tensor:
    """Levels of a standard deviation `spread`, as they are stored, that stand for numbers of about a scale."""
    symbols = (spread / 2 * torch.randn(d2, k, generator=generator)).round().long()
    steps = [torch.randint(-3, 4, (size,), generator=generator, dtype=torch.int16) for size in (d2, k)]
    width = round(4 * math.log2(spread))
    widths = [torch.zeros(d2, dtype=torch.int16), torch.full((k,), width, dtype=torch.int16)]
    return EC.encode_levels(levels_of(symbols, block_rows(d2, k)), scale / spread, *steps, *widths)
