"""Solvers: functions (Problem, k, s, options) -> Factorization and their FLOPs, one file each, listed in one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cospadi.errors import UserError
from cospadi.solvers import eigen, ksvd, mod_htp, procrustes, svd
from cospadi.solvers.flops import Flops
from cospadi.solvers.problem import Factorization, Problem, SolverOptions

__all__ = ["SOLVERS", "Factorization", "Flops", "Problem", "Solver", "SolverOptions", "find_solver"]


@dataclass(frozen=True)
class Solver:
    """What the rest of the package must know of a solver.

    Attributes:
        solve: the function; where its support is full, k is the rank and s is ignored.
        flops: (d1, d2, k, s, options, again) -> what a solve costs; `again` on a Problem that was solved before, at
            another size or this one, without what that has kept.
        support: how the support of S is stored, and dictionary: how D is, by the names of the kinds in `format`.
        codec: of its values, where it is always the same; None leaves it to the recipe.
        whitened: whether it minimises the calibrated error; False means L = I whatever the recipe says.
        free_support: whether it spreads s d2 nonzeros over the whole matrix, s any number; else a column gets s.
        quick_products: products that differ between sizes and are in bf16 where the hardware is fast at it.
    """

    solve: Callable[[Problem, int, Any, SolverOptions], Factorization]
    flops: Callable[[int, int, int, float, SolverOptions, bool], Flops]
    support: str
    dictionary: str = "stored"
    codec: str | None = None
    whitened: bool = True
    free_support: bool = False
    quick_products: int = 0


SOLVERS: dict[str, Solver] = {
    "mod-htp": Solver(mod_htp.mod_htp, mod_htp.flops, "mask", free_support=True, quick_products=5),
    "ksvd": Solver(ksvd.ksvd, ksvd.flops, "mask"),
    "procrustes": Solver(procrustes.procrustes, procrustes.flops, "mask"),
    "eigen": Solver(eigen.eigen, eigen.flops, "mask"),
    "svd-llm": Solver(svd.truncated_svd, svd.flops, "full", codec="bf16"),
    "svd": Solver(svd.truncated_svd, svd.flops, "full", codec="bf16", whitened=False),
}


def find_solver(name: str) -> Solver:
    """The solver of that name.

    Raises:
        UserError: there is none.
    """
    if name not in SOLVERS:
        raise UserError(f"solver {name} is not known. Use one of {', '.join(SOLVERS)}")
    return SOLVERS[name]
