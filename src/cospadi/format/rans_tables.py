"""Frequencies of the symbols of `rans`: Gaussians, in integer arithmetic alone, so that every machine has the same.

A class c stands for levels of standard deviation sigma = 2^(c / 4), a quantizer q for the levels that there are: even
ones where q is 0, odd ones and 0 where it is 1; symbol k is level 2k - sign(k) q. The table of (c, q) has symbols
h = k >> b for -H <= h <= H and an escape for those beyond.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

LOW = -12
"""The narrowest class: sigma 1/8."""

HIGH = 40
"""The widest class: sigma 1024."""

PRECISION = 12
"""A table's frequencies have the sum 2 ** PRECISION."""

_POINT = 128  # bits after the point
_CUT = 8  # sigma: where the Gaussian ends, so that its sum needs no pi
_ZERO_EDGE = 39  # hundredths: where the cell of 0 ends if q is 1. Paths use 0 less than a half would say


def raw_bits(c: int) -> int:
    """b: low bits of a symbol that are stored as they are, the fewest with sigma / 2 / 2^b <= 8."""
    return max(0, (c - 13) // 4)


def reach(c: int) -> int:
    """H = ceil(5 sigma / 2 / 2^b) + 1."""
    b, h = raw_bits(c), 0
    while 5**4 << max(c, 0) > (h << (b + 1)) ** 4 << max(-c, 0):
        h += 1
    return h + 1


@cache
def frequencies(c: int, q: int) -> tuple[int, ...]:
    """Of h = -H .. H and of the escape in the table of class c and quantizer q, each at least 1.

    They are the closest to the probabilities in Webster's sense: what is left after 1 each, or the whole part of a
    symbol's due, goes one by one to the largest probability / (2 frequency + 1), the first of equal ones.
    """
    b, h = raw_bits(c), reach(c)
    edges = [_integral(_lower_edge(i << b, q), c) for i in range(-h, h + 2)]
    inside = [upper - lower for lower, upper in pairwise(edges)]
    whole = 2 * _integral(100 * _CUT << 10, c)
    weights = [*inside, whole - sum(inside)]
    total = 1 << PRECISION
    found = [max(1, weight * (total - len(weights)) // whole) for weight in weights]
    for _ in range(total - sum(found)):
        found[max(range(len(found)), key=lambda i: (weights[i] // (2 * found[i] + 1), -i))] += 1
    return tuple(found)


def _lower_edge(k: int, q: int) -> int:
    """Where symbol k's cell begins, in hundredths: midway between levels, but for 0 where q is 1."""
    if q == 0:
        return 200 * k - 100
    if k in (0, 1):
        return _ZERO_EDGE if k else -_ZERO_EDGE
    return 200 * k - 200 if k > 0 else 200 * k


def _integral(edge: int, c: int) -> int:
    """Of exp(-u^2 / 2) from 0 to edge / 100 / sigma, cut at 8, by its Taylor series; _POINT bits after the point."""
    sigma = math.isqrt(math.isqrt(1 << (4 * _POINT + c)))
    u = min((abs(edge) << 2 * _POINT) // (100 * sigma), _CUT << _POINT)
    square = u * u >> _POINT
    term, total, n = u, u, 0
    while term:
        n += 1
        term = (term * square >> _POINT) // (2 * n)
        total += (-1) ** n * (term // (2 * n + 1))
    return total if edge > 0 else -total
