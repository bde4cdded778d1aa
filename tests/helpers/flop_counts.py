"""FLOPs that torch meets while something runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from cospadi.solvers.flops import cholesky, eigh, qr, svd, triangular

aten = torch.ops.aten

PRODUCTS = {
    aten.mv: lambda matrix, *_, **__: 2 * matrix[0] * matrix[1],
    aten.addr_: lambda matrix, *_, **__: 2 * matrix[0] * matrix[1],
    aten.addmm_: lambda _, left, right, *__, **___: 2 * left[0] * left[1] * right[1],
}
"""Products that torch's own counter leaves out."""

OTHERS = {
    aten._linalg_eigh: lambda matrix, *_, **__: round(eigh(matrix[-1])),
    aten._linalg_svd: lambda matrix, *_, **__: round(svd(*matrix[-2:])),
    aten.linalg_pinv: lambda matrix, *_, **__: round(eigh(matrix[-1])) + 2 * matrix[-1] ** 3,
    aten.linalg_qr: lambda matrix, *_, **__: round(qr(*matrix[-2:])),
    aten.linalg_cholesky_ex: lambda matrix, *_, **__: round(cholesky(matrix[-1])),
    aten.linalg_solve_triangular: lambda matrix, right, *_, left=True, **__: round(
        triangular(matrix[-1], right[-1 if left else -2])
    ),
    aten._linalg_solve_ex: lambda matrix, right, *_, **__: round(
        2 * cholesky(matrix[-1]) + 2 * triangular(matrix[-1], right[-1])
    ),
}


def counted(run: Callable[[], object]) -> tuple[int, int]:
    """FLOPs of products and of factorizations."""
    with FlopCounterMode(display=False, custom_mapping=PRODUCTS | OTHERS) as counter:
        run()
    of_each: dict[Any, int] = counter.get_flop_counts()["Global"]
    others = sum(count for operation, count in of_each.items() if operation in OTHERS)
    return sum(of_each.values()) - others, others
