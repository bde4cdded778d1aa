"""Heat maps: a figure for each layer and each kind of projection, as rows of cells with a shade each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from cospadi.format.form import DENSE_BITS
from cospadi.model.projections import kinds_of

SHADES = 9
"""Of cells, beside none."""

Item = Mapping[str, Any]
"""What is known of one projection, as `cospadi inspect --json` tells it."""


class Cell(NamedTuple):
    """What a cell shows; no shade where it has no figure."""

    text: str
    shade: int | None


class Map(NamedTuple):
    """A heat map.

    Attributes:
        says: what its figures are.
        warm: whether more is worse.
        columns: kinds of projections, short and whole.
        rows: of each block its number and its cells. foot: of all blocks.
        lightest, darkest: the figures of the first and of the last shade.
    """

    title: str
    says: str
    warm: bool
    columns: Sequence[tuple[str, str]]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    foot: tuple[str, Sequence[str]]
    lightest: str
    darkest: str


class _Figure(NamedTuple):
    """How one figure is taken from projections: of several at once, experts or all blocks, where `of` gets them."""

    title: str
    says: str
    warm: bool
    of: Callable[[Sequence[Item]], float | None]
    foot: str
    exponent: bool = False


def heat_maps(projections: Mapping[str, Item], of_weights: bool = False, left: Collection[str] = ()) -> list[Map]:
    """The maps of all figures that are known.

    Args:
        left: modules whose weights are as they were, shown where others of their kind have figures.
        of_weights: errors are those of weights, since no text was read.
    """
    figures = [_ERROR._replace(says=OF_WEIGHTS) if of_weights else _ERROR, *_FIGURES]
    return [found for figure in figures if (found := _heat_map(figure, projections, left)) is not None]


def _heat_map(figure: _Figure, projections: Mapping[str, Item], left: Collection[str]) -> Map | None:
    grid: dict[tuple[int, str], list[Item]] = {}
    for name, item in projections.items():
        block, kind = _place(name)
        grid.setdefault((block, kind), []).append(item)
    kinds = list(dict.fromkeys(kind for _, kind in grid))
    dense = {(block, kind) for block, kind in map(_place, left) if kind in kinds}
    values = {place: figure.of(items) for place, items in grid.items()}
    known = [value for value in values.values() if value is not None]
    if not known:
        return None
    unit, form = _unit(known, figure.exponent)
    low, high = min(known), max(known)

    def cell(block: int, kind: str) -> Cell:
        value, items = values.get((block, kind)), grid.get((block, kind), [])
        if value is None:
            is_dense = (block, kind) in dense or any(item["layout"] == "dense" for item in items)
            return Cell("dense" if is_dense else "-", None)
        part = (value - low) / (high - low) if high > low else 0.5
        return Cell(form(value), round(part * SHADES))

    foot = [figure.of([item for (_, one), items in grid.items() if one == kind for item in items]) for kind in kinds]
    return Map(
        figure.title,
        f"{figure.says}{unit}",
        figure.warm,
        [(_short(kind, kinds), kind) for kind in kinds],
        [
            (str(block), [cell(block, kind) for kind in kinds])
            for block in sorted({block for block, _ in [*grid, *dense]})
        ],
        (figure.foot, ["-" if value is None else form(value) for value in foot]),
        form(low),
        form(high),
    )


def _place(name: str) -> tuple[int, str]:
    """The number of a projection's block, and its kind, experts taken together."""
    parts = name.split(".")
    at = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return (0, name) if at is None else (int(parts[at]), kinds_of([".".join(parts[at + 1 :])]) or name)


def _short(kind: str, kinds: Sequence[str]) -> str:
    """The last word of a kind, or all of it where another one has the same."""

    def last(name: str) -> str:
        return next((part for part in reversed(name.split(".")) if part != "*"), name)

    return last(kind) if sum(last(one) == last(kind) for one in kinds) == 1 else kind


def _unit(values: Sequence[float], exponent: bool) -> tuple[str, Callable[[float], str]]:
    """What is said behind the figure's name, and how its values are written: three digits, by one power of ten."""
    largest = max(map(abs, values))
    power = 0
    if exponent and largest > 0:
        while largest * 10**power < 1 and power < 15:
            power += 3
    digits = max(0, 3 - len(str(int(largest * 10**power)).lstrip("0")))
    unit = f", in units of 10⁻{str(power).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}" if power else ""
    return unit, lambda value: f"{value * 10**power:,.{digits}f}"


def _total(name: str) -> Callable[[Sequence[Item]], float | None]:
    return lambda items: float(sum(item[name] for item in items)) / 1000


def _mean(of: Callable[[Item], float | None]) -> Callable[[Sequence[Item]], float | None]:
    def mean(items: Sequence[Item]) -> float | None:
        known = [value for item in items if (value := of(item)) is not None]
        return sum(known) / len(known) if known else None

    return mean


def _sum(of: Callable[[Item], float | None]) -> Callable[[Sequence[Item]], float | None]:
    def total(items: Sequence[Item]) -> float | None:
        known = [value for item in items if (value := of(item)) is not None]
        return sum(known) if known else None

    return total


def _bits(items: Sequence[Item]) -> float | None:
    stored, dense = (float(sum(item[name] for item in items)) for name in ("bytes", "dense_bytes"))
    return DENSE_BITS * stored / dense


def _density(items: Sequence[Item]) -> float | None:
    masked = [item for item in items if item["nnz"]]
    entries = float(sum(item["k"] * item["d2"] for item in masked))
    return sum(item["nnz"] for item in masked) / entries if masked else None


def _loss(part: str, scale: float) -> Callable[[Item], float | None]:
    return lambda item: None if item["loss"] is None else scale * float(item["loss"][part])


LOUD = 0.1
"""The error, relative to a projection's output, whose price a map shows."""

OF_WEIGHTS = "The error of the weights, relative to the weights: no text was read"

_ERROR = _Figure(
    "Error",
    "The error of a projection's output on the calibration text, relative to the output",
    True,
    _mean(lambda item: item["relative_error"]),
    "mean",
)

_FIGURES = (
    _Figure(
        "What the error costs in the loss",
        "To second order, by the gradients of the calibration text: nats a token that this error adds by itself",
        True,
        _sum(_loss("of_error", 1.0)),
        "sum",
        exponent=True,
    ),
    _Figure(
        "What an error costs there",
        "What an error of a tenth of the projection's output would add to the loss, nats a token to second order",
        True,
        _mean(_loss("of_all", LOUD**2)),
        "mean",
        exponent=True,
    ),
    _Figure("Bits a weight", "All that is stored for a projection, in bits a weight of W", False, _bits, "all"),
    _Figure("Size", "Stored, in kB of 1,000 bytes", False, _total("bytes"), "sum"),
    _Figure("Density", "Nonzeros of S, as a part of its entries", False, _density, "all"),
)
