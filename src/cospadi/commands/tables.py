"""What the commands' tables have in common: their style, and sizes and times for reading."""

from __future__ import annotations

from rich import box
from rich.table import Table


def megabytes(nbytes: int | None) -> str:
    """Bytes in MB of 10^6 bytes, for reading."""
    return "unknown" if nbytes is None else f"{nbytes / 1e6:,.2f} MB"


LEFT = ("projection", "", "model", "layout", "values", "task", "metric", "method", "what it is", "what it sets")
"""Columns of words."""


def new_table(*columns: str) -> Table:
    """An empty table; columns of names are set left, those of figures right."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in LEFT else "right")
    return table


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days, for reading."""
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def gigabytes(nbytes: int) -> str:
    """Bytes in MB of 10^6 or GB of 10^9 bytes, for reading."""
    return megabytes(nbytes) if nbytes < 10**9 else f"{nbytes / 1e9:,.2f} GB"
