"""What the commands' tables have in common: their style, and sizes and times for reading."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text


def megabytes(nbytes: int | None) -> str:
    """Bytes in MB of 10^6 bytes, for reading."""
    return "unknown" if nbytes is None else f"{nbytes / 1e6:,.2f} MB"


LEFT = (
    "projection",
    "",
    "model",
    "layout",
    "values",
    "task",
    "metric",
    "method",
    "what it is",
    "what it sets",
    "asked",
)
"""Columns of words."""


def new_table(*columns: str) -> Table:
    """An empty table; columns of words are set left, those of figures right."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in LEFT else "right")
    return table


def fitted(table: Table, console: Console) -> list[Table | Text | Padding]:
    """A table as it is, lines broken at spaces, where no word and no figure has to be cut; else its rows one after the
    other, each under its name. What is no terminal gets the table, as wide as it is.
    """
    needed = Measurement.get(console, console.options.update(max_width=10**6), table).minimum
    if needed <= console.width:
        return [table]
    if not console.is_terminal:
        table.width = needed
        return [table]
    heads = [str(column.header) for column in table.columns]
    parts: list[Table | Text | Padding] = []
    for name, *cells in zip(*(map(str, column.cells) for column in table.columns), strict=True):
        told = [
            cell if column in LEFT else f"{column} {cell}"
            for column, cell in zip(heads[1:], cells, strict=True)
            if cell not in ("", "-")
        ]
        parts += [Text(name, overflow="fold"), Padding(Text(", ".join(told), overflow="fold"), (0, 0, 0, 2))]
    return parts


def duration(seconds: float) -> str:
    """Seconds, minutes, hours, days or years, for reading."""
    for size, unit in ((365 * 86400.0, "years"), (86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def gigabytes(nbytes: int) -> str:
    """Bytes in MB of 10^6 or GB of 10^9 bytes, for reading."""
    return megabytes(nbytes) if nbytes < 10**9 else f"{nbytes / 1e9:,.2f} GB"
