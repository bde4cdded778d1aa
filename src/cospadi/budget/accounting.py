"""The paper's counts, and (k, s) from a ratio. Bytes on disk are `Form.nbytes`: no such formula stands elsewhere.

Names follow the paper (arXiv 2509.22075): a projection is d1 x d2 (d1 inputs, d2 outputs), its dictionary d1 x k,
its coefficients k x d2 with s nonzeros a column, rho = k / s. A group of projections that share a dictionary counts
as one projection with d2 = sum of the members' d2, except that each member's support and values are padded to whole
bytes on their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

from cospadi.format.form import DENSE_BITS, Form, Parts, dense_bytes

VALUE_UNIT = 4
"""Values that fill whole bytes at every even width: four of 14 bits are seven bytes."""


def sparse_bits(d1: int, d2: int, k: int, s: int, value_bits: int) -> Parts:
    """The paper's count, in bits and without padding: d1 k words, s d2 values, k d2 mask bits (Eq. 10, Eq. 11)."""
    return Parts(dictionary=DENSE_BITS * d1 * k, support=k * d2, values=value_bits * s * d2)


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


def exact_rank(budget: int, form: Form, d1: int, d2s: Sequence[int]) -> int:
    """Largest k whose real bytes fit the budget where all of S is stored (0 where not even one atom does)."""

    def fits(k: int) -> bool:
        return form.nbytes(d1, d2s, k, [k * d2 for d2 in d2s]).total <= budget

    return _largest(fits, budget // _atom_bytes(form, d1))


def exact_size(budget: int, form: Form, d1: int, d2s: Sequence[int], rho: float) -> tuple[int, int]:
    """Largest k with s = max(1, floor(k / rho)) whose real bytes fit the budget, then the largest s for that k.

    Returns (0, 0) where not even one atom fits.
    """

    def fits(k: int, s: int) -> bool:
        return form.nbytes(d1, d2s, k, [s * d2 for d2 in d2s]).total <= budget

    def s_of(k: int) -> int:
        return max(1, math.floor(k / _decimal(rho)))

    k = _largest(lambda k: fits(k, s_of(k)), budget // _atom_bytes(form, d1))
    if k == 0:
        return 0, 0
    return k, _largest(lambda s: fits(k, s), k)


def free_size(budget: int, form: Form, d1: int, d2s: Sequence[int], rho: float) -> tuple[int, int]:
    """Largest k whose k d2 / rho nonzeros fit the budget, then the most nonzeros for that k, in units of VALUE_UNIT.

    They lie anywhere, each member holding a multiple of VALUE_UNIT of them. Where the dictionary is I, k is d1 whatever
    rho. Returns (0, 0) where not even one atom, or value, fits.
    """

    def most(k: int) -> int:
        left = budget - form.nbytes(d1, d2s, k, []).total
        return max(0, min(left * 8 // form.codec.bits // VALUE_UNIT * VALUE_UNIT, most_nonzeros(d2s, k)))

    def asked(k: int) -> Fraction:
        return min(k * sum(d2s) / _decimal(rho) - VALUE_UNIT, Fraction(most_nonzeros(d2s, k)))

    k = form.dictionary_kind.atoms(d1) or _largest(lambda k: most(k) >= asked(k), budget // _atom_bytes(form, d1))
    return (k, most(k)) if k and most(k) else (0, 0)


def _atom_bytes(form: Form, d1: int) -> int:
    """Bytes of an atom of a dictionary that is stored."""
    return form.dictionary_kind.nbytes(d1, 1)


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
