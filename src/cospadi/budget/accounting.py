"""Storage accounting of every layout, in bits and bytes, and (k, s) from a ratio. No such formula stands elsewhere.

Names follow the paper (arXiv 2509.22075): a projection is d1 x d2 (d1 inputs, d2 outputs), its dictionary d1 x k,
its coefficients k x d2 with s nonzeros a column, rho = k / s. A group of projections that share a dictionary counts
as one projection with d2 = sum of the members' d2, except that each member's mask rows and value stream are padded
to whole bytes on their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

DENSE_BITS = 16
"""Bits a weight costs in a dense projection, whatever the dtype it came in (the paper's bf16 words)."""

VALUE_UNIT = 4
"""Values that fill whole bytes at every width: four of 14 bits are seven bytes."""

Accounting = Literal["exact", "eq10", "eq11"]


@dataclass(frozen=True)
class Parts:
    """What one group of projections costs, part by part, in bits or in bytes as the function that made it says.

    For a low-rank layout `dictionary` is the left factor, `values` the right one and `support` is 0.
    """

    dictionary: int
    support: int
    values: int

    @property
    def total(self) -> int:
        return self.dictionary + self.support + self.values

    def __add__(self, other: Parts) -> Parts:
        return Parts(self.dictionary + other.dictionary, self.support + other.support, self.values + other.values)


def dense_bytes(d1: int, d2: int) -> int:
    """Bytes of a dense d1 x d2 projection at 16 bits a weight."""
    return d1 * d2 * DENSE_BITS // 8


def support_row_bytes(k: int) -> int:
    """Bytes of one column's support mask: k bits, padded to whole bytes."""
    return (k + 7) // 8


def value_stream_bytes(nnz: int, value_bits: int) -> int:
    """Bytes of a projection's packed values: nnz * value_bits bits, padded to whole bytes."""
    return (nnz * value_bits + 7) // 8


def sparse_bits(d1: int, d2: int, k: int, s: int, value_bits: int) -> Parts:
    """The paper's count, in bits and without padding: d1 k words, s d2 values, k d2 mask bits (Eq. 10, Eq. 11)."""
    return Parts(dictionary=DENSE_BITS * d1 * k, support=k * d2, values=value_bits * s * d2)


def sparse_bytes(d1: int, d2s: Sequence[int], k: int, s: int, value_bits: int) -> Parts:
    """Bytes on disk of a group of projections (d1 x d2 for each d2 in d2s) over one dictionary of k atoms."""
    return Parts(
        dictionary=d1 * k * DENSE_BITS // 8,
        support=sum(d2 * support_row_bytes(k) for d2 in d2s),
        values=sum(value_stream_bytes(s * d2, value_bits) for d2 in d2s),
    )


def free_bytes(d1: int, d2s: Sequence[int], k: int, nonzeros: int, value_bits: int) -> Parts:
    """Bytes on disk of a group whose `nonzeros` lie anywhere, each member holding a multiple of VALUE_UNIT of them."""
    return Parts(
        dictionary=d1 * k * DENSE_BITS // 8,
        support=sum(d2 * support_row_bytes(k) for d2 in d2s),
        values=value_stream_bytes(nonzeros, value_bits),
    )


def low_rank_bytes(d1: int, d2s: Sequence[int], r: int) -> Parts:
    """Bytes on disk of a rank-r factorization, the left factor (d1 x r) shared by the group (Eq. 9)."""
    word = DENSE_BITS // 8
    return Parts(dictionary=word * d1 * r, support=0, values=word * r * sum(d2s))


def eq9_rank(ratio: float, d1: int, d2: int) -> int:
    """Largest r with ratio <= 1 - r (d1 + d2) / (d1 d2) (Eq. 9)."""
    return math.floor((1 - _decimal(ratio)) * d1 * d2 / (d1 + d2))


def eq10_size(ratio: float, d1: int, d2: int, rho: float) -> tuple[int, int]:
    """Largest k, and s = k / rho rounded down, with bf16 values and a mask of k d2 bits (Eq. 10)."""
    k = math.floor((1 - _decimal(ratio)) * d1 * d2 / (d1 + d2 / _decimal(rho) + Fraction(d2, DENSE_BITS)))
    return k, math.floor(k / _decimal(rho))


def eq11_size(ratio: float, d1: int, d2: int, rho: float) -> tuple[int, int]:
    """Largest k, and s = k / rho rounded down, where the truncated value bits pay for the mask (Eq. 11, rho = 2)."""
    k = math.floor((1 - _decimal(ratio)) * d1 * d2 / (d1 + d2 / _decimal(rho)))
    return k, math.floor(k / _decimal(rho))


def byte_budget(ratio: float, d1: int, d2s: Sequence[int]) -> int:
    """Most bytes a group may take so that 1 - bytes / dense bytes is at least `ratio`."""
    return math.floor((1 - _decimal(ratio)) * dense_bytes(d1, sum(d2s)))


def exact_rank(budget: int, d1: int, d2s: Sequence[int]) -> int:
    """Largest r whose low-rank bytes fit the budget (0 where not even rank one does)."""
    return budget // low_rank_bytes(d1, d2s, 1).total


def exact_size(budget: int, d1: int, d2s: Sequence[int], rho: float, value_bits: int) -> tuple[int, int]:
    """Largest k with s = max(1, floor(k / rho)) whose real bytes fit the budget, then the largest s for that k.

    Returns (0, 0) where not even one atom fits.
    """

    def fits(k: int, s: int) -> bool:
        return sparse_bytes(d1, d2s, k, s, value_bits).total <= budget

    def s_of(k: int) -> int:
        return max(1, math.floor(k / _decimal(rho)))

    k = _largest(lambda k: fits(k, s_of(k)), budget // (d1 * DENSE_BITS // 8))
    if k == 0:
        return 0, 0
    return k, _largest(lambda s: fits(k, s), k)


def free_size(budget: int, d1: int, d2s: Sequence[int], rho: float, value_bits: int) -> tuple[int, int]:
    """Largest k whose k d2 / rho nonzeros fit the budget, then the most nonzeros for that k, in units of VALUE_UNIT.

    Returns (0, 0) where not even one atom fits.
    """

    def most(k: int) -> int:
        left = budget - free_bytes(d1, d2s, k, 0, value_bits).total
        return max(0, min(left * 8 // value_bits // VALUE_UNIT * VALUE_UNIT, most_nonzeros(d2s, k)))

    def asked(k: int) -> Fraction:
        return min(k * sum(d2s) / _decimal(rho) - VALUE_UNIT, Fraction(most_nonzeros(d2s, k)))

    k = _largest(lambda k: most(k) >= asked(k), budget // (d1 * 2))
    return (k, most(k)) if k and most(k) else (0, 0)


def most_nonzeros(d2s: Sequence[int], k: int) -> int:
    """Nonzeros that a group has room for, each member holding a multiple of VALUE_UNIT of them."""
    return sum(k * d2 // VALUE_UNIT * VALUE_UNIT for d2 in d2s)


def _decimal(value: float) -> Fraction:
    """The number that was written: 0.3 is 3/10, not the nearest binary fraction; no byte is lost to rounding."""
    return Fraction(str(value))


def _largest(fits: Callable[[int], bool], upper: int) -> int:
    """Largest n in 1..upper with fits(n), for a predicate that is true up to some n and false after it; 0 if none."""
    low, high = 0, upper
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
