"""What a stored projection chooses: a kind of dictionary, a kind of support, a codec; and what each has to tell.

A kind is one file that makes one instance of these classes, and one line in its folder's table. Nothing else compares
kinds by name: what differs between them is asked here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cospadi.format import packing


@dataclass(frozen=True)
class Dictionary(ABC):
    """How D (d1, k) is stored, once for the projections that share it.

    Attributes:
        name: in config.json.
        dtype: of its tensor, where it has one.
    """

    name: str
    dtype: torch.dtype = torch.bfloat16

    @abstractmethod
    def shape(self, d1: int, k: int) -> list[int] | None:
        """Of its tensor; None where there is none, and z = x."""

    @abstractmethod
    def encode(self, dictionary: Tensor | None) -> Tensor | None:
        """D, float (d1, k), None for I -> what is stored."""

    @abstractmethod
    def decode(self, stored: Tensor | None) -> Tensor | None:
        """What is stored -> D transposed, float32 (k, d1), row i is atom i; None for I."""

    def atoms(self, d1: int) -> int | None:
        """k, where d1 alone decides it."""
        return None

    def nbytes(self, d1: int, k: int) -> int:
        shape = self.shape(d1, k)
        return 0 if shape is None else math.prod(shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Support(ABC):
    """Which entries of S (k, d2) are stored. Its tensor is uint8.

    Attributes:
        name: in config.json.
        chosen: whether entries are chosen; else all are stored, the values are S transposed, (d2, k), and config.json
            says nnz 0.
        kernel: whether its tensor is the bit mask that the kernels read.
    """

    name: str
    chosen: bool
    kernel: bool = False

    @abstractmethod
    def shape(self, d2: int, k: int) -> list[int] | None:
        """Of its tensor; None where there is none."""

    @abstractmethod
    def values_shape(self, d2: int, k: int, nnz: int) -> list[int]:
        """Of the values, before they are encoded."""

    @abstractmethod
    def pack(self, chosen: Tensor | None) -> Tensor | None:
        """bool (d2, k), row c is the support of column c (None where all entries are stored) -> its tensor."""

    @abstractmethod
    def unpack(self, stored: Tensor | None, k: int) -> Tensor | None:
        """Inverse of `pack`."""

    @abstractmethod
    def gather(self, chosen: Tensor | None, dense: Tensor) -> Tensor:
        """The stored entries of S transposed, (d2, k) -> the values in their shape."""

    @abstractmethod
    def scatter(self, stored: Tensor | None, values: Tensor, d2: int, k: int) -> Tensor:
        """Its tensor and the values, of any shape, at least as many as are stored -> S transposed, dense (d2, k)."""

    def offsets(self, stored: Tensor | None) -> Tensor | None:
        """Where each column's values begin, int32 (d2 + 1,), for kernels; None where no kernel reads it."""
        return None

    def problem(self, tensor: Any, d2: int, k: int, nnz: int) -> str | None:
        """What is wrong with a tensor of the right dtype and shape that can be read in slices; None where all is well.

        Reads like "has 3 bits set, config.json says 4 nonzeros".
        """
        return None

    def count(self, d2: int, k: int, nnz: int) -> int:
        """Values of a projection."""
        return math.prod(self.values_shape(d2, k, nnz))

    def nbytes(self, d2: int, k: int) -> int:
        shape = self.shape(d2, k)
        return 0 if shape is None else math.prod(shape)


@dataclass(frozen=True)
class Tuned(ABC):
    """Stored values while they are trained: the numbers that move, and the way back to as many bytes.

    Attributes:
        numbers: name -> float32 tensor, as they come back from what is stored.
        units: name -> the size that a step of training is a fraction of.
    """

    numbers: dict[str, Tensor]
    units: dict[str, float]

    @abstractmethod
    def rounded(self, name: str, numbers: Tensor) -> Tensor:
        """Numbers of that name, float32, as they come back once they were stored."""

    @abstractmethod
    def values(self, numbers: Mapping[str, Tensor]) -> Tensor:
        """The values that rounded numbers stand for, float32, in their shape; gradients pass through."""

    @abstractmethod
    def stored(self, numbers: Mapping[str, Tensor]) -> Tensor:
        """What is stored of rounded numbers."""


def root_mean_square(numbers: Tensor) -> float:
    """Of all numbers; 0 where there are none."""
    return float((numbers.square().sum(dtype=torch.float64) / max(1, numbers.numel())).sqrt())


NARROW = 64
"""Inputs at which a step of a matrix is as large as one of a vector."""


def narrowed(inputs: int) -> float:
    """What a step of a matrix is to be multiplied by: 1 / inputs, as of Adam at any width [G. Yang et al., Tensor
    Programs V, 2022], since an output sums over the inputs, whose weights move together."""
    return NARROW / inputs


@dataclass(frozen=True)
class Codec(ABC):
    """How values are stored.

    Attributes:
        name: in config.json.
        bits: a value's width; 0 where values have codes of different lengths, and config.json tells how many bytes all
            of them take.
        levels: whether values are integers with steps, as a solver has found them together. They are all of S, since
            zero is a level, and other numbers cannot be put in their place; `tuned` says what of them can move.
        dtype: of its tensor.
        plain: whether its tensor is the values themselves, as numbers that can be multiplied and trained.
        kernel_bits: the width that kernels are told, if they read it; 0 if they do not.
    """

    name: str
    bits: int
    dtype: torch.dtype
    plain: bool = False
    kernel_bits: int = 0
    levels: ClassVar[bool] = True

    @property
    def coded(self) -> bool:
        """Whether values have codes of different lengths."""
        return self.bits == 0

    @abstractmethod
    def shape(self, values: list[int], nbytes: int = 0) -> list[int]:
        """Of its tensor, for values of this shape, which take so many bytes where config.json tells."""

    @abstractmethod
    def decode(self, stored: Tensor, values: list[int]) -> Tensor:
        """What is stored -> float32 values of this shape, exact."""

    @abstractmethod
    def tuned(self, stored: Tensor, values: list[int], inputs: int) -> Tuned:
        """What of stored values of this shape training may move.

        Args:
            inputs: of S, its rows.
        """

    def room(self, stored: Tensor) -> int:
        """Values that a stored tensor has room for: all there are, and what else its bits would hold."""
        return stored.numel() * stored.element_size() * 8 // self.bits

    def problem(self, tensor: Any, values: list[int]) -> str | None:
        """As `Support.problem`, of values of this shape."""
        return None

    def nbytes(self, values: list[int]) -> int:
        """Of values of this shape, where that alone decides it."""
        assert not self.coded
        return math.prod(self.shape(values)) * self.dtype.itemsize


@dataclass(frozen=True)
class Numbers(Codec):
    """A codec that stores each number by itself, in as many bits as any other."""

    levels: ClassVar[bool] = False

    @abstractmethod
    def encode(self, values: Tensor) -> Tensor:
        """float values, rounded once from float32, saturating -> what is stored."""

    def rounded(self, values: Tensor) -> Tensor:
        """float32 values of any shape as they come back once they were stored."""
        return packing.from_codes(packing.to_codes(values, self.bits), self.bits)

    def tuned(self, stored: Tensor, values: list[int], inputs: int) -> Tuned:
        numbers = self.decode(stored, values)
        return TunedNumbers({"entries": numbers}, {"entries": root_mean_square(numbers) * narrowed(inputs)}, self)


@dataclass(frozen=True)
class TunedNumbers(Tuned):
    """Every value moves by itself."""

    codec: Numbers

    def rounded(self, name: str, numbers: Tensor) -> Tensor:
        return self.codec.rounded(numbers)

    def values(self, numbers: Mapping[str, Tensor]) -> Tensor:
        return numbers["entries"]

    def stored(self, numbers: Mapping[str, Tensor]) -> Tensor:
        return self.codec.encode(numbers["entries"])
