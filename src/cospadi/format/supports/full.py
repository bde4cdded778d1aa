"""full: every entry, and no tensor that says so."""

from __future__ import annotations

from torch import Tensor

from cospadi.format.kinds import Support


class Full(Support):
    """The values are S transposed, (d2, k)."""

    def shape(self, d2: int, k: int) -> None:
        return None

    def values_shape(self, d2: int, k: int, nnz: int) -> list[int]:
        return [d2, k]

    def pack(self, chosen: Tensor | None) -> None:
        return None

    def unpack(self, stored: Tensor | None, k: int) -> None:
        return None

    def gather(self, chosen: Tensor | None, dense: Tensor) -> Tensor:
        return dense

    def scatter(self, stored: Tensor | None, values: Tensor, d2: int, k: int) -> Tensor:
        return values.flatten()[: d2 * k].view(d2, k)


FULL = Full("full", chosen=False)
