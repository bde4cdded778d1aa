"""identity: D = I, and no tensor: S is the weight itself, column c of S row c of `nn.Linear`'s weight."""

from __future__ import annotations

from torch import Tensor

from cospadi.format.kinds import Dictionary


class Identity(Dictionary):
    """k is d1, z is x, and every projection is its own owner."""

    def shape(self, d1: int, k: int) -> None:
        return None

    def encode(self, dictionary: Tensor | None) -> None:
        return None

    def decode(self, stored: Tensor | None) -> None:
        return None

    def atoms(self, d1: int) -> int:
        return d1


IDENTITY = Identity("identity")
