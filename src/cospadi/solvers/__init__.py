"""Solvers: functions (Problem, k, s, options) -> Factorization and their FLOPs, one file each, listed in one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from cospadi.errors import UserError
from cospadi.solvers import eigen, ksvd, mod_htp, procrustes, svd
from cospadi.solvers.flops import Flops
from cospadi.solvers.problem import Factorization, Problem, SolverOptions

__all__ = ["SOLVERS", "Factorization", "Flops", "Problem", "Solver", "SolverOptions", "find_solver"]


@dataclass(frozen=True)
class Solver:
    """What the rest of the package must know of a solver.

    Attributes:
        solve: the function; k is the rank and s is ignored for the low-rank layout.
        flops: (d1, d2, k, s, options, again) -> what a solve costs; `again` on a Problem that was solved before, at
            another size or this one, without what that has kept.
        layout: how its result is stored.
        whitened: whether it minimises the calibrated error; False means L = I whatever the recipe says.
        free_support: whether it spreads s d2 nonzeros over the whole matrix, s any number; else a column gets s.
    """

    solve: Callable[[Problem, int, Any, SolverOptions], Factorization]
    flops: Callable[[int, int, int, float, SolverOptions, bool], Flops]
    layout: Literal["sparse-dictionary", "low-rank"]
    whitened: bool = True
    free_support: bool = False


SOLVERS: dict[str, Solver] = {
    "mod-htp": Solver(mod_htp.mod_htp, mod_htp.flops, "sparse-dictionary", free_support=True),
    "ksvd": Solver(ksvd.ksvd, ksvd.flops, "sparse-dictionary"),
    "procrustes": Solver(procrustes.procrustes, procrustes.flops, "sparse-dictionary"),
    "eigen": Solver(eigen.eigen, eigen.flops, "sparse-dictionary"),
    "svd-llm": Solver(svd.truncated_svd, svd.flops, "low-rank"),
    "svd": Solver(svd.truncated_svd, svd.flops, "low-rank", whitened=False),
}


def find_solver(name: str) -> Solver:
    """The solver of that name.

    Raises:
        UserError: there is none.
    """
    if name not in SOLVERS:
        raise UserError(f"solver {name} is not known. Use one of {', '.join(SOLVERS)}")
    return SOLVERS[name]
