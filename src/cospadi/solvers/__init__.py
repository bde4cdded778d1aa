"""Solvers: functions (Problem, k, s, options) -> Factorization and their FLOPs, one file each, listed in one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cospadi.errors import UserError
from cospadi.solvers import alps, eigen, gptq, htp, ksvd, magnitude, mod_htp, procrustes, rtn, sparsegpt, svd, trellis
from cospadi.solvers.flops import Flops
from cospadi.solvers.problem import (
    Coded,
    Coder,
    Factorization,
    Grid,
    IntegerCoder,
    MetricProblem,
    Problem,
    SolverOptions,
)

__all__ = [
    "SOLVERS",
    "Coded",
    "Coder",
    "Factorization",
    "Flops",
    "Grid",
    "IntegerCoder",
    "MetricProblem",
    "Problem",
    "Solver",
    "SolverOptions",
    "find_solver",
]


FISHER = ("fisher", "output", "weights")
"""Metrics of solvers of the whitened problem, whose columns may be weighed."""


@dataclass(frozen=True)
class Solver:
    """What the rest of the package must know of a solver.

    Attributes:
        solve: (Problem, k, s, options) -> Factorization, where the support is full k is the rank and s is ignored; or
            (MetricProblem, nonzeros, options) -> Factorization, where the dictionary is the identity; or
            (MetricProblem, bytes, Coder, options) -> Coded, where values are levels in a code; or
            (MetricProblem, IntegerCoder, options) -> Coded, where they are integers of as many bits as it says.
        flops: (d1, d2, k, s, options) -> what a solve costs; where the dictionary is the identity, with a Gram. Solvers
            with the metric two-sided take the widths of Gamma's full blocks as one more.
        metrics: what it can measure errors in, best first where blocks are not refined; see Recipe.metric.
        support: how the support of S is stored, and dictionary: how D is, by the names of the kinds in `format`.
        codecs: of its values: of several the one of the most bytes that fit; none leaves it to the recipe.
        free_support: whether it spreads s d2 nonzeros over the whole matrix, s any number; else a column gets s.
        iterations: T, unless the recipe tells.
        coded: whether it is told bytes and finds levels in a code.
        integers: whether it is told an IntegerCoder and finds levels.
    """

    solve: Callable[..., Any]
    flops: Callable[..., Flops]
    metrics: tuple[str, ...] = FISHER
    support: str = "mask"
    dictionary: str = "stored"
    codecs: tuple[str, ...] = ()
    free_support: bool = False
    iterations: int = 60
    coded: bool = False
    integers: bool = False

    @property
    def levels(self) -> bool:
        """Whether it finds levels, which stay as it has found them."""
        return self.coded or self.integers

    @property
    def identity(self) -> bool:
        """Whether it takes weights and their metric, and finds S alone."""
        return self.dictionary == "identity"


def _identity(
    solve: Callable[..., Factorization],
    flops: Callable[..., Flops],
    metrics: tuple[str, ...],
    iterations: int = 1,
) -> Solver:
    def of_size(d1: int, d2: int, _k: int, s: float, options: SolverOptions, *widths: Sequence[int]) -> Flops:
        return flops(d1, d2, round(s * d2), options, *widths)

    return Solver(solve, of_size, metrics, dictionary="identity", free_support=True, iterations=iterations)


def _integers(solve: Callable[..., Coded], flops: Callable[..., Flops], metrics: tuple[str, ...]) -> Solver:
    return Solver(
        solve, flops, metrics, support="full", dictionary="identity", codecs=rtn.CODECS, iterations=1, integers=True
    )


SOLVERS: dict[str, Solver] = {
    "htp": _identity(htp.htp, htp.flops, ("two-sided", *FISHER), iterations=12),
    "mod-htp": Solver(mod_htp.mod_htp, mod_htp.flops, free_support=True),
    "ksvd": Solver(ksvd.ksvd, ksvd.flops),
    "procrustes": Solver(procrustes.procrustes, procrustes.flops),
    "eigen": Solver(eigen.eigen, eigen.flops),
    "svd-llm": Solver(svd.truncated_svd, svd.flops, support="full", codecs=("bf16",)),
    "svd": Solver(svd.truncated_svd, svd.flops, ("weights",), support="full", codecs=("bf16",)),
    "trellis": Solver(
        trellis.trellis,
        trellis.flops,
        FISHER,
        support="full",
        dictionary="identity",
        codecs=("ec",),
        iterations=trellis.ATTEMPTS,
        coded=True,
    ),
    "magnitude": _identity(magnitude.magnitude, magnitude.flops, ("weights",)),
    "wanda": _identity(magnitude.wanda, magnitude.flops, ("output",)),
    "sparsegpt": _identity(sparsegpt.sparsegpt, sparsegpt.flops, ("output",)),
    "alps": _identity(alps.alps, alps.flops, ("output",), iterations=300),
    "rtn": _integers(rtn.rtn, rtn.flops, ("weights",)),
    "gptq": _integers(gptq.gptq, gptq.flops, ("output",)),
}


def find_solver(name: str) -> Solver:
    """The solver of that name.

    Raises:
        UserError: there is none.
    """
    if name not in SOLVERS:
        raise UserError(f"solver {name} is not known. Use one of {', '.join(SOLVERS)}")
    return SOLVERS[name]
