"""mask: any entries, by a bit mask: bit j % 8 of byte j // 8 in row c is set where (j, c) is in the support."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cospadi.format import packing
from cospadi.format.kinds import Support


class Mask(Support):
    """uint8 (d2, ceil(k / 8)); the values lie column by column, atoms ascending."""

    def shape(self, d2: int, k: int) -> list[int]:
        return [d2, packing.support_row_bytes(k)]

    def values_shape(self, d2: int, k: int, nnz: int) -> list[int]:
        return [nnz]

    def pack(self, chosen: Tensor | None) -> Tensor:
        assert chosen is not None
        return packing.pack_support(chosen)

    def unpack(self, stored: Tensor | None, k: int) -> Tensor:
        assert stored is not None
        return packing.unpack_support(stored, k)

    def gather(self, chosen: Tensor | None, dense: Tensor) -> Tensor:
        assert chosen is not None
        return dense.masked_select(chosen)

    def scatter(self, stored: Tensor | None, values: Tensor, d2: int, k: int) -> Tensor:
        assert stored is not None
        return packing.unpack_coefficients(stored, values, k)

    def offsets(self, stored: Tensor | None) -> Tensor:
        assert stored is not None
        return packing.column_offsets(stored)

    def problem(self, tensor: Any, d2: int, k: int, nnz: int) -> str | None:
        """Counts the bits, a few rows in memory at a time."""
        rows = max(1, packing.COUNTED_BYTES // packing.support_row_bytes(k))
        count, spilled = 0, False
        for first in range(0, d2, rows):
            read: Tensor = tensor[first : first + rows]
            count += packing.popcount(read)
            spilled |= packing.has_padding_bits(read, k)
        if count != nnz:
            return f"has {count} bits set, config.json says {nnz} nonzeros"
        return f"has bits set past atom {k - 1}" if spilled else None


MASK = Mask("mask", chosen=True, kernel=True)
