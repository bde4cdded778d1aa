"""How large the parts of a checkpoint are, before and after: selected projections by kind, and what was kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

SMALL = 0.01
"""What is kept as it was and is less than this of the checkpoint has no line of its own."""

REST = "everything else"

UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))
"""Of 1,000 each, the largest first."""


class Part(NamedTuple):
    """Some of a checkpoint.

    Attributes:
        kind: what it is, whatever block or expert it is of.
        number: of projections, or of tensors.
        before, after: bytes; `before` is None where it is not known.
    """

    kind: str
    number: int
    before: int | None
    after: int


def selected_parts(sizes: Mapping[str, tuple[int, int]]) -> list[Part]:
    """The kinds of selected projections.

    Args:
        sizes: projection -> bytes before, at 16 bits a weight, and after.
    """
    kinds: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for name, both in sizes.items():
        kinds[kind_of(name)].append(both)
    return [Part(kind, len(some), *(sum(one) for one in zip(*some, strict=True))) for kind, some in kinds.items()]


def kept_parts(selected: Collection[str], before: Mapping[str, int], after: Mapping[str, int]) -> list[Part]:
    """What is no selected projection, by kind, small kinds together; a kind of which others are selected says so.

    Args:
        before, after: tensor name -> bytes.
    """
    whole = sum(after.values())
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in after:
        module = name.rpartition(".")[0]
        if module not in selected:
            kinds[kind_of(module)].append(name)
    chosen = {kind_of(name) for name in selected}
    small = [kind for kind, names in kinds.items() if sum(after[name] for name in names) < SMALL * whole]
    if rest := [name for kind in small for name in kinds.pop(kind)]:
        kinds[REST] = rest
    return [
        Part(
            f"{kind}, left dense" if kind in chosen else kind,
            len(names),
            sum(before[name] for name in names) if all(name in before for name in names) else None,
            sum(after[name] for name in names),
        )
        for kind, names in kinds.items()
    ]


def together(parts: Sequence[Part]) -> Part:
    """All of some parts whose bytes before are known."""
    before = sum(part.before for part in parts if part.before is not None)
    return Part("all", sum(part.number for part in parts), before, sum(part.after for part in parts))


def size(nbytes: int) -> str:
    """Bytes in the unit that leaves three digits or four, for reading."""
    unit, name = next((unit, name) for unit, name in UNITS if nbytes >= unit or unit == 1)
    return f"{nbytes:,} {name}" if unit == 1 else f"{nbytes / unit:.{2 if nbytes < 10 * unit else 1}f} {name}"


def kind_of(name: str) -> str:
    """What a module is, whatever block or expert it is of: the last part of its name that is no number."""
    return next((part for part in reversed(name.split(".")) if not part.isdigit()), name)
