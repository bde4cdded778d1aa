"""Solvers: functions (Problem, k, s, options) -> Factorization, one file each, listed in one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cospadi.errors import UserError
from cospadi.solvers.eigen import eigen
from cospadi.solvers.ksvd import ksvd
from cospadi.solvers.mod_htp import mod_htp
from cospadi.solvers.problem import Factorization, Problem, SolverOptions
from cospadi.solvers.procrustes import procrustes
from cospadi.solvers.svd import truncated_svd

__all__ = ["SOLVERS", "Factorization", "Problem", "Solver", "SolverOptions", "find_solver"]


@dataclass(frozen=True)
class Solver:
    """What the rest of the package must know of a solver.

    Attributes:
        solve: the function; where its support is full, k is the rank and s is ignored.
        support: how the support of S is stored, and dictionary: how D is, by the names of the kinds in `format`.
        codec: of its values, where it is always the same; None leaves it to the recipe.
        whitened: whether it minimises the calibrated error; False means L = I whatever the recipe says.
        free_support: whether it spreads s d2 nonzeros over the whole matrix, s any number; else a column gets s.
    """

    solve: Callable[[Problem, int, Any, SolverOptions], Factorization]
    support: str
    dictionary: str = "stored"
    codec: str | None = None
    whitened: bool = True
    free_support: bool = False


SOLVERS: dict[str, Solver] = {
    "mod-htp": Solver(mod_htp, "mask", free_support=True),
    "ksvd": Solver(ksvd, "mask"),
    "procrustes": Solver(procrustes, "mask"),
    "eigen": Solver(eigen, "mask"),
    "svd-llm": Solver(truncated_svd, "full", codec="bf16"),
    "svd": Solver(truncated_svd, "full", codec="bf16", whitened=False),
}


def find_solver(name: str) -> Solver:
    """The solver of that name.

    Raises:
        UserError: there is none.
    """
    if name not in SOLVERS:
        raise UserError(f"solver {name} is not known. Use one of {', '.join(SOLVERS)}")
    return SOLVERS[name]
