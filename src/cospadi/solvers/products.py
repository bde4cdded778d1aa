"""Matrix products faster than torch's plain ones: by symmetry, by precision."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cospadi import compat

SMALLEST_QUICK = 32
"""Smaller side of a matrix from which bf16 products are taken: below, they gain nothing."""
HALVED = 512
"""Columns from which the halves of a symmetric product are worth the calls."""


def self_product(matrix: Tensor) -> Tensor:
    """M^T M (k, k) for M (rows, k); from 512 columns on its lower half is copied: 5/8 of the FLOPs of all."""
    k = matrix.shape[1]
    if k < HALVED:
        return matrix.T @ matrix
    product = torch.empty(k, k, dtype=matrix.dtype, device=matrix.device)
    width = -(-k // 4)
    for start in range(0, k, width):
        panel = slice(start, min(start + width, k))
        product[panel, start:] = matrix[:, panel].T @ matrix[:, start:]
        product[panel.stop :, panel] = product[panel, panel.stop :].T
    return product


def self_product_flops(rows: float, k: int) -> float:
    """Multiplications and additions of `self_product`."""
    return (2.0 if k < HALVED else 1.25) * rows * k**2


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 matrices faster than float32 ones."""
    return device.type == "cuda" or compat.cpu_multiplies_bf16()


def rough_products(device: torch.device) -> str:
    """The least precision of float32 products that still leaves enough digits to fit a dictionary with.

    "medium", but for CPUs with AMX, where it would leave three digits.
    """
    return "high" if device.type == "cpu" and compat.cpu_multiplies_in_tiles() else "medium"


_PRECISION = threading.RLock()


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """How float32 products may be computed inside this block: "highest", "high" (TF32) or "medium" (one bf16 product).

    A CPU with AMX takes "medium" by its word; see `rough_products`.

    Torch has one setting for the whole process, so that blocks of several threads wait for each other. Where somebody
    has set it backend by backend, which torch does not let mix with this, it stays as it is.
    """
    with _PRECISION:
        try:
            before = torch.get_float32_matmul_precision()
        except RuntimeError:
            before = None
        if before is not None:
            torch.set_float32_matmul_precision(precision)
        try:
            yield
        finally:
            if before is not None:
                torch.set_float32_matmul_precision(before)
