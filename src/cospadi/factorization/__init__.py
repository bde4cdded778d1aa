"""Solvers: functions (Problem, k, s, options) -> Factorization, one file each, listed in one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cospadi.errors import UserError
from cospadi.factorization.eigen import eigen
from cospadi.factorization.ksvd import ksvd
from cospadi.factorization.problem import Factorization, Problem, SolverOptions
from cospadi.factorization.procrustes import procrustes
from cospadi.factorization.svd import truncated_svd

__all__ = ["SOLVERS", "Factorization", "Problem", "Solver", "SolverOptions", "find_solver"]


@dataclass(frozen=True)
class Solver:
    """What the rest of the package must know of a solver.

    Attributes:
        solve: the function; k is the rank and s is ignored for the low-rank layout.
        layout: how its result is stored.
        whitened: whether it minimises the calibrated error; False means L = I whatever the recipe says.
    """

    solve: Callable[[Problem, int, int, SolverOptions], Factorization]
    layout: Literal["sparse-dictionary", "low-rank"]
    whitened: bool = True


SOLVERS: dict[str, Solver] = {
    "ksvd": Solver(ksvd, "sparse-dictionary"),
    "procrustes": Solver(procrustes, "sparse-dictionary"),
    "eigen": Solver(eigen, "sparse-dictionary"),
    "svd-llm": Solver(truncated_svd, "low-rank"),
    "svd": Solver(truncated_svd, "low-rank", whitened=False),
}


def find_solver(name: str) -> Solver:
    """The solver of that name.

    Raises:
        UserError: there is none.
    """
    if name not in SOLVERS:
        raise UserError(f"solver {name} is not known. Use one of {', '.join(SOLVERS)}")
    return SOLVERS[name]
