"""Plain torch: what every other backend is held to."""

from __future__ import annotations

import torch
from torch import Tensor

from cospadi.format.codecs import CODECS
from cospadi.format.supports import SUPPORTS


def coefficients(
    support: Tensor | None, values: Tensor, d2: int, k: int, kind: str, codec: str | None, dtype: torch.dtype
) -> Tensor:
    """S transposed as a dense (d2, k) matrix; arguments as for `op.sparse_matmul`."""
    if codec is not None:
        values = CODECS[codec].decode(values, SUPPORTS[kind].values_shape(d2, k, CODECS[codec].room(values)))
    return SUPPORTS[kind].scatter(support, values.to(dtype), d2, k)
