"""Supports of given size: the largest entries of a matrix, and how many of them each member of a group holds.

Where blocks and members are rows, matrices hold a column of S in a row: S^T (d2, k).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CACHED_ENTRIES = {"cpu": 2**20, "cuda": 2**27}
"""Entries of S that iterations work on at once; on a CPU few enough to stay in cache."""
BLOCK_ENTRIES = 2**22
"""Entries of a matrix that are sorted or compared at once."""


def keep_largest_entries(matrix: Tensor, n: int, blocks: Sequence[slice]) -> None:
    """Set all but the n largest magnitudes of some rows to zero, in place; of equal ones the first stay. No sort.

    Float32 magnitudes order as their bit patterns do: a histogram of the upper half of the bits finds the bin that
    holds the threshold, and only what lies in that bin is looked at again.

    Args:
        matrix: float32 (rows, k), contiguous. blocks: the rows concerned, in pieces.
    """
    if n >= sum(block.stop - block.start for block in blocks) * matrix.shape[1]:
        return
    if n == 0:
        for block in blocks:
            matrix[block] = 0
        return

    def bits(block: slice) -> Tensor:
        return matrix[block].abs().view(torch.int32)

    histogram = torch.zeros(2**15, dtype=torch.int64, device=matrix.device)
    for block in blocks:
        histogram += torch.bincount((bits(block) >> 16).flatten(), minlength=2**15)
    above = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, n))
    bin_ = 2**15 - 1 - place
    missing = n - int(above[place] - histogram[bin_])
    candidates = torch.cat([row[(row >> 16) == bin_] for row in map(bits, blocks)])
    threshold = int(torch.kthvalue(candidates, len(candidates) - missing + 1).values)
    surplus = int((candidates >= threshold).sum()) - missing
    for block in reversed(blocks):
        magnitudes = bits(block)
        matrix[block].mul_(magnitudes >= threshold)
        if surplus and threshold:
            ties = (magnitudes == threshold).flatten().nonzero()[:, 0]
            matrix[block].view(-1)[ties[max(0, len(ties) - surplus) :]] = 0
            surplus = max(0, surplus - len(ties))


def member_portions(codes: Tensor, nonzeros: int, members: Sequence[int], blocks: Sequence[slice]) -> list[int]:
    """Nonzeros of each member as the largest entries of all fall, in multiples of four where the sum is one.

    Args:
        codes: float32 (d2, k), contiguous; only magnitudes count. nonzeros: of all members, at most d2 k.
        members: rows of each. blocks: all rows, in pieces.
    """
    if len(members) == 1:
        return [nonzeros]
    kept = codes.clone()
    keep_largest_entries(kept, nonzeros, blocks)
    counts = [int(kept[member].count_nonzero()) for member in member_spans(members)]
    return rounded_portions(counts, nonzeros, [width * codes.shape[1] for width in members])


def even_portions(nonzeros: int, members: Sequence[int], rows: int) -> list[int]:
    """Nonzeros of each member at one density, in multiples of four where the sum is one; `rows` is d1."""
    if len(members) == 1:
        return [nonzeros]
    wanted = [nonzeros * width // sum(members) for width in members]
    return rounded_portions(wanted, nonzeros, [width * rows for width in members])


def rounded_portions(wanted: Sequence[int], nonzeros: int, room: Sequence[int]) -> list[int]:
    """Numbers near the wanted ones that sum up to `nonzeros`, in multiples of four where that is one and they fit.

    Args:
        wanted: of each member, their sum at most `nonzeros`. room: the most that each can hold.
    """
    whole = [most // 4 * 4 for most in room]
    unit, room = (4, whole) if nonzeros % 4 == 0 and nonzeros <= sum(whole) else (1, room)
    portions = [count // unit * unit for count in wanted]
    while (left := nonzeros - sum(portions)) > 0:  # less than one unit a member, unless A is nearly zero
        neediest = max(
            (member for member in range(len(room)) if portions[member] < room[member]),
            key=lambda member: wanted[member] - portions[member],
        )
        step = min(room[neediest] - portions[neediest], unit * max(1, left // unit // len(room)))
        portions[neediest] += step
    return portions


def fill_support(support: Tensor, n: int) -> None:
    """Add the first free entries of a bool matrix until `n` are set, in place.

    Coefficients that came out as 0 are stored as such.
    """
    missing = n - int(support.sum())
    if missing > 0:
        free = (~support).nonzero()[:missing]
        support[free[:, 0], free[:, 1]] = True


def member_spans(widths: Sequence[int]) -> list[slice]:
    """Where each member's rows are, from the numbers of them."""
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    return [slice(end - width, end) for width, end in zip(widths, ends, strict=True)]


def row_blocks(span: slice, rows: int) -> list[slice]:
    """A range of rows in pieces."""
    return [slice(start, min(start + rows, span.stop)) for start in range(span.start, span.stop, rows)]


def largest_of_each(scores: Tensor, n: int) -> Tensor:
    """The n entries of a (d1, d2) matrix that are the largest of their columns: bool (d1, d2).

    Every column has the same number, but for a remainder of n: it goes to the columns whose next score is largest. Of
    equal scores the first stay.

    Args:
        scores: float (d1, d2), not negative. n: at most d1 d2.
    """
    d1, d2 = scores.shape
    each, rest = divmod(n, d2)
    support = torch.zeros_like(scores, dtype=torch.bool)
    following = torch.full((d2,), d1 - 1, device=scores.device)
    for block in row_blocks(slice(0, d2), max(1, BLOCK_ENTRIES // d1)):
        order = scores[:, block].sort(dim=0, descending=True, stable=True).indices
        support[:, block].scatter_(0, order[:each], True)
        if rest:
            following[block] = order[each]
    if rest:
        columns = torch.arange(d2, device=scores.device)
        extra = scores[following, columns].sort(descending=True, stable=True).indices[:rest]
        support[following[extra], extra] = True
    return support


def largest_of_all(scores: Tensor, n: int) -> Tensor:
    """The n largest entries of a matrix: bool, of its shape. Of equal scores the first stay.

    Args:
        scores: float32 (rows, k), contiguous, not negative; overwritten. n: at most rows k.
    """
    rows, k = scores.shape
    keep_largest_entries(scores, n, row_blocks(slice(0, rows), max(1, BLOCK_ENTRIES // k)))
    support = scores > 0
    fill_support(support, n)
    return support
