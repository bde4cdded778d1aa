"""FLOPs, and what the usual ones cost: a multiplication with an addition counts as two."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Flops:
    """Floating-point operations.

    Attributes:
        products: of matrix products and attention.
        others: of factorizations and triangular solves, which run at a fraction of the speed, mostly in float64.
    """

    products: float = 0.0
    others: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.products + other.products, self.others + other.others)

    def __mul__(self, count: float) -> Flops:
        return Flops(self.products * count, self.others * count)

    @property
    def total(self) -> float:
        return self.products + self.others


def cholesky(n: int) -> float:
    """Of a Cholesky factor of an n x n matrix."""
    return n**3 / 3


def triangular(n: int, columns: int) -> float:
    """Of a triangular solve, n x n, for some right-hand sides."""
    return float(n**2 * columns)


def eigh(n: int) -> float:
    """Of all eigenvalues and eigenvectors of a symmetric n x n matrix."""
    return 9.0 * n**3


def qr(rows: int, columns: int) -> float:
    """Of Q and R of a tall matrix."""
    return 4.0 * rows * columns**2


def svd(rows: int, columns: int) -> float:
    """Of all singular values and vectors, the thin ones."""
    small, large = min(rows, columns), max(rows, columns)
    return 6.0 * large * small**2 + 20.0 * small**3
