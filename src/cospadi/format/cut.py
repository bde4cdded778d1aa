"""A part of a stored S, stored again: what a device gets of a layer that several devices share."""

from __future__ import annotations

from torch import Tensor

from cospadi.format.schema import StoredProjection


def cut(
    entry: StoredProjection, support: Tensor, values: Tensor, outputs: Tensor, atoms: Tensor
) -> tuple[Tensor, Tensor]:
    """Some columns and rows of S, stored as all of it was, exactly.

    A stream of values cannot be narrowed where it lies, since values of other columns fill its bytes: it is decoded,
    and encoded again.

    Args:
        entry: of a projection whose support chooses entries.
        support, values: its tensors.
        outputs: bool (d2,), which columns to keep. atoms: bool (k,), which rows.
    Returns:
        The two tensors of what is kept.
    """
    kind, codec = entry.form.support_kind, entry.form.numbers
    chosen = kind.unpack(support, entry.k)
    assert chosen is not None
    kept = kind.gather(chosen, outputs[:, None] & atoms)
    packed = kind.pack(chosen[outputs][:, atoms])
    assert packed is not None
    return packed, codec.encode(codec.decode(values, entry.values_shape)[kept])
