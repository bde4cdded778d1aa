"""The whitened problem and its solution: min ||A - D S||_F over D (d1 x k) and column-sparse S (k x d2), A = L W."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """A projection, or several side by side, in the whitened metric.

    Attributes:
        target: A = L W, float (d1, d2).
        unwhiten: D_L (d1, n) -> L^-1 D_L in float64, for solvers that ask how large an atom is in the weights; None
            where L = I.
        members: d2 of each projection side by side in A; empty for one.
    """

    target: Tensor
    unwhiten: Callable[[Tensor], Tensor] | None = None
    members: tuple[int, ...] = ()


@dataclass(frozen=True)
class MetricProblem:
    """Weights and the metric of their error, for solvers whose dictionary is the identity: S (d1, d2) is near W itself.

    The error of E = W - S is tr(Gamma E^T G E), where Gamma has a block for each member: to second order what E costs
    in the loss, with the Kronecker factors of its Fisher matrix (K-FAC, Martens and Grosse 2015).

    Attributes:
        weight: W of a projection, or of several that read the same input side by side, float32 (d1, d2).
        gram: G = X^T X, float32 (d1, d1), symmetric, positive semidefinite and maybe singular; None stands for I.
        outputs: what errors at the outputs cost: Gamma, float32, in blocks (width, width) of the outputs side by side
            or, where only its diagonal is known, (width,). Empty: I.
        members: d2 of each projection side by side in W.
    """

    weight: Tensor
    gram: Tensor | None
    outputs: tuple[Tensor, ...]
    members: tuple[int, ...]


@dataclass(frozen=True)
class Factorization:
    """A ~ D S.

    Attributes:
        dictionary: D in the whitened metric, float (d1, k), unit columns; None for D = I, where S is near W.
        coefficients: S, float (k, d2), zero outside the support.
        support: bool (k, d2), the stored entries of S: s in each column, or s d2 anywhere. None where all of S
            is stored, which is dense.
        errors: ||A - D S||_F / ||A||_F after each iteration.
    """

    dictionary: Tensor | None
    coefficients: Tensor
    support: Tensor | None = None
    errors: list[float] = field(default_factory=list)


class Grid(NamedTuple):
    """Quarter octaves, one of each output and one of each input; those of both add up.

    Attributes:
        rows: int16 (d2,). cols: int16 (d1,).
    """

    rows: Tensor
    cols: Tensor

    def moved(self, octaves: float) -> Grid:
        """So many octaves up."""
        return Grid(self.rows, self.cols + round(4 * octaves))


@dataclass(frozen=True)
class Coder:
    """What a solver of levels must know of their code.

    Attributes:
        transitions: state and parity of a symbol -> next state; a state's lowest bit is its quantizer.
        bits: of a symbol's magnitude, float32 (classes, 2 quantizers, symbols). lowest: the class that is the first.
        block_rows: (d1, d2) -> outputs after which the path begins anew.
        step: quarter octaves, int16 -> float32, about 2 ** (1 / 4) to their power.
        encode: (levels int16 (d1, d2), unit, steps, widths) -> uint8. The step of a level is the unit times those of
            its output and its input; its class is the sum of their widths.
    """

    transitions: Sequence[Sequence[int]]
    bits: Tensor
    lowest: int
    block_rows: Callable[[int, int], int]
    step: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor, float, Grid, Grid], Tensor]


@dataclass(frozen=True)
class IntegerCoder:
    """What a solver of integers of few bits must know of how they are stored.

    Attributes:
        most: the largest level; the least is 0.
        group: inputs of an output that have a scale and a zero in common; 0: all of them.
        scale: scales as they come back, positive and finite, from scales of any size, float32.
        encode: (levels (d1, d2), scales (groups, d2), zeros (groups, d2)) -> uint8.
    """

    most: int
    group: int
    scale: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor, Tensor, Tensor], Tensor]


class Member(NamedTuple):
    """A projection as levels.

    Attributes:
        weight: what they stand for, float32 (d1, d2). code: uint8.
    """

    weight: Tensor
    code: Tensor


@dataclass(frozen=True)
class Coded:
    """Projections that read the same, as levels."""

    members: tuple[Member, ...]

    @property
    def nbytes(self) -> int:
        """Of the codes."""
        return sum(member.code.numel() for member in self.members)


@dataclass(frozen=True)
class SolverOptions:
    """What a solver may be told; each takes what concerns it.

    Attributes:
        iterations: alternations T at most.
        update: dictionary update of K-SVD.
        tolerance: stop once an iteration lowers the error by less than this fraction; 0 runs all of them.
        seed: of the initial dictionary.
        memory_bytes: working memory that batched sparse coding may take; beyond rounding, results do not depend on it.
        start: a solution to begin from, for solvers that can.
        on_iteration: called with (iteration from 1, relative error).
    """

    iterations: int = 60
    update: Literal["power", "pca", "mod"] = "power"
    tolerance: float = 0.0
    seed: int = 42
    memory_bytes: int = 256 * 2**20
    start: Factorization | None = None
    on_iteration: Callable[[int, float], None] | None = None


def relative_error(target: Tensor, approximation: Tensor) -> float:
    """||A - B||_F / ||A||_F, summed in float64; 0 for a zero A that is met exactly."""
    scale = torch.linalg.vector_norm(target, dtype=torch.float64)
    distance = torch.linalg.vector_norm(target - approximation, dtype=torch.float64)
    return float(distance / scale) if scale > 0 else float(distance)
