"""What the rows of a comparison say together: a table, a figure, and the same for machines.

A row is a mapping, as its JSON file has it; see `cospadi.commands.compare`.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from cospadi import files
from cospadi.commands import tables

log = logging.getLogger("cospadi")

DENSE = "dense"
"""The method of the dense model's row."""

NAME = "compare"
"""Of the table, the figure and what is for machines, before their suffixes."""

BEHIND = ("relative_errors", "right", "of")
"""What of a row is for its file alone."""

COLUMNS = (
    *("method", "ratio_asked", "bits_asked", "bytes", "bits", "ratio_reached", "checkpoint_bytes", "perplexity"),
    *("log_ratio", "kl", "accuracy_average", "seconds", "why_not"),
)
"""Of the CSV file, before a column a task."""

NO_LOSS = 1e-5
"""What is less is luck: the figure draws it as no loss."""

WHAT_IS_WHAT = """\
`bytes` are those of the compressed projections, which a ratio or bits are asked of, as they lie on disk. ln(ppl /
dense) is the loss added, in nats a token; where it is small it is partly luck, which KL, the mean divergence of the
predictions from the dense model's, is not."""
OF_TASKS = """\
`average` is of the tasks' accuracies in per cent, each counting once, ± its standard error; `from dense` has the paired
one."""


def json_text(value: object) -> str:
    """A value as JSON for a file; it has no NaN."""
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"


def sorted_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Dense first, then by the size that was asked, the least perplexity first; what has none last."""
    return sorted(rows, key=lambda row: (row["ratio_asked"], row.get("perplexity") or math.inf, row["method"]))


def dense_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The dense model's."""
    return next(row for row in rows if row["method"] == DENSE)


def loss(row: Mapping[str, Any], dense: Mapping[str, Any]) -> float:
    """ln(ppl / dense); NaN where one is not a number."""
    if not row.get("perplexity") or not dense.get("perplexity"):
        return math.nan
    return math.log(row["perplexity"] / dense["perplexity"])


def average(row: Mapping[str, Any]) -> float:
    """Accuracy of all tasks, each counting once, in per cent."""
    return 100 * statistics.fmean(row["accuracy"].values())


def standard_error(row: Mapping[str, Any]) -> float:
    """Of the average over documents, in per cent: tasks are independent."""
    squares = [
        value * (1 - value) / (row["documents"][task] - 1) if row["documents"][task] > 1 else math.nan
        for task, value in row["accuracy"].items()
    ]
    return 100 * math.sqrt(sum(squares)) / len(squares)


def paired_error(row: Mapping[str, Any], dense: Mapping[str, Any]) -> float:
    """The standard error of the difference of the averages over the same documents, in per cent."""
    gains = [
        [int(one) - int(other) for one, other in zip(row["right"][task], dense["right"][task], strict=True)]
        for task in dense["right"]
    ]
    squares = [statistics.variance(each) / len(each) if len(each) > 1 else math.nan for each in gains]
    return 100 * math.sqrt(sum(squares)) / len(squares)


def size_asked(ratio: float, bits: float | None) -> str:
    """A size for reading."""
    return f"ratio {ratio:g}" if bits is None else f"{bits:g} bit{'s' * (bits != 1)}"


def _asked(row: Mapping[str, Any]) -> str:
    return "-" if row["method"] == DENSE else size_asked(row["ratio_asked"], row["bits_asked"])


def write_reports(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """The table, the figure and what is for machines, of all rows."""
    try:
        figures = draw(rows)
    except ImportError:
        figures = dict.fromkeys(("svg", "png"))
        log.warning(
            "the figure needs matplotlib, which is not installed: pip install 'cospadi[report]'. The same command then "
            "draws it, and computes nothing again"
        )
    texts = {
        "json": json_text(comparison_json(rows)),
        "csv": comparison_csv(rows),
        "md": page(rows, any(figures.values())),
    }
    for suffix, content in {**figures, **texts}.items():
        path = output / f"{NAME}.{suffix}"
        if content is None:  # an older one is of other rows
            path.unlink(missing_ok=True)
        else:
            files.write_whole(path, content)


def figures_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What rows say without what is for their files alone, with what follows from all of them."""
    dense = dense_row(rows)
    whole = next(row for row in rows if "dense_bytes" in row)
    found = []
    for row in rows:
        log_ratio = loss(row, dense)
        told = {name: value for name, value in row.items() if name not in BEHIND}
        told["log_ratio"] = log_ratio if math.isfinite(log_ratio) else None
        if row is dense:
            told |= {"bytes": whole["dense_bytes"], "bits": 16.0, "checkpoint_bytes": whole["checkpoint_bytes_before"]}
        if "accuracy" in row:
            told["accuracy_average"] = average(row) / 100
        found.append(told)
    return found


def comparison_json(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All rows for machines."""
    dense = dense_row(rows)
    return {"model": dense["model"], "text": dense["text"], "rows": figures_of(rows)}


def comparison_csv(rows: Sequence[dict[str, Any]]) -> str:
    """All rows, a line each."""
    tasks = list(dense_row(rows).get("accuracy", {}))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*COLUMNS, *tasks])
    for told in figures_of(rows):
        accuracy = told.get("accuracy", {})
        writer.writerow([*(told.get(name) for name in COLUMNS), *(accuracy.get(task) for task in tasks)])
    return stream.getvalue()


def table_cells(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table."""
    dense = dense_row(rows)
    scored = "accuracy" in dense
    head = ["method", "asked", "bytes", "bits a weight", "perplexity", "ln(ppl / dense)", "KL"]
    head += ["average", "from dense"] if scored else []
    lines = []
    for row, told in zip(rows, figures_of(rows), strict=True):
        line = [
            row["method"],
            _asked(row),
            _number(told.get("bytes"), "{:,}"),
            _number(told.get("bits"), "{:.2f}"),
            _number(told.get("perplexity"), "{:.4f}" if (told.get("perplexity") or 0) < 1000 else "{:.4g}"),
            "-" if row is dense else _number(told["log_ratio"], "{:.4f}"),
            _number(told.get("kl"), "{:.5f}"),
        ]
        if scored and "accuracy" in row:
            gain = f"{average(row) - average(dense):+.2f} ± {paired_error(row, dense):.2f}"
            line += [f"{average(row):.2f} ± {standard_error(row):.2f}", "-" if row is dense else gain]
        elif scored:
            line += ["-", "-"]
        lines.append(line)
    return head, lines


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def comparison_table(rows: Sequence[dict[str, Any]]) -> Table:
    """All rows, a line each."""
    head, lines = table_cells(rows)
    table = tables.new_table(*head)
    for line in lines:
        table.add_row(*line)
    return table


LEAST = 0.99
"""Of the bytes that were asked for; a row that takes less is told of."""


def notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What of the rows has no figure, and why."""
    dense = dense_row(rows)
    told = [f"{row['method']} at {_asked(row)}: {row['why_not']}" for row in rows if "why_not" in row]
    endless = [row for row in rows if "why_not" not in row and not math.isfinite(loss(row, dense))]
    told += [f"{row['method']} at {_asked(row)}: its perplexity is beyond a float." for row in endless]
    smaller = [
        row
        for row in rows
        if row is not dense and "bytes" in row and row["bytes"] < LEAST * (1 - row["ratio_asked"]) * row["dense_bytes"]
    ]
    names = ", ".join(f"{row['method']} at {_asked(row)}" for row in smaller)
    return told + [f"No method takes more bytes than asked; these take over 1 % less: {names}."] * bool(smaller)


def page(rows: Sequence[dict[str, Any]], drawn: bool) -> str:
    """All rows as Markdown."""
    dense = dense_row(rows)
    parts = [
        f"# {dense['model']}: every method at equal bytes, or at most as many",
        f"Dense perplexity {_number(dense['perplexity'], '{:.4f}')} on {dense['text']} "
        f"({dense['windows']} windows of {dense['length']} tokens).",
        f"![Loss added against bytes, by method]({NAME}.svg)" if drawn else "",
        markdown_table(*table_cells(rows)),
        WHAT_IS_WHAT,
        OF_TASKS if "accuracy" in dense else "",
        "\n".join(f"- {note}" for note in notes(rows)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    first, *others = [f"| {' | '.join(line)} |" for line in (head, *lines)]
    return "\n".join([first, "|" + "---|" * len(head), *others])


def draw(rows: Sequence[dict[str, Any]]) -> dict[str, bytes | None]:
    """The figure: suffix -> content, of an SVG and of a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    made: dict[str, bytes | None] = {}
    with matplotlib.rc_context({"svg.hashsalt": "cospadi"}):
        for suffix, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
            stream = io.BytesIO()
            figure(rows).savefig(stream, format=suffix, dpi=150, metadata=metadata)
            made[suffix] = stream.getvalue()
    return made


def figure(rows: Sequence[dict[str, Any]]) -> Any:
    """The loss added against bytes, a line a method, as matplotlib's Figure.

    The axis of losses is logarithmic and broken at its foot, where what is no loss lies, hollow, on a line at 0.
    """
    from matplotlib.figure import Figure

    dense = dense_row(rows)
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row is not dense and math.isfinite(loss(row, dense)):
            points.setdefault(row["method"], []).append((row["bytes"] / 1e6, loss(row, dense)))
    whole = next(row["dense_bytes"] for row in rows if "dense_bytes" in row) / 1e6
    foot = min((y for some in points.values() for _, y in some if y > NO_LOSS), default=1e-3) / 2
    drawing = Figure(figsize=(7.5, 4.5), layout="constrained")
    axis = drawing.add_subplot()
    for index, (method, some) in enumerate(sorted(points.items())):
        some, style = sorted(some), ("-", "--", ":")[index // 10 % 3]
        drawn: dict[str, Any] = {"color": f"C{index % 10}", "marker": "o", "markersize": 5}
        heights = [max(y, foot) for _, y in some]
        axis.plot([x for x, _ in some], heights, linestyle=style, label=method, zorder=2, **drawn)
        for x, y in some:
            if y <= NO_LOSS:
                axis.plot(x, foot, markerfacecolor="white", zorder=3, **drawn)
    axis.axhspan(foot / 2, foot, color="0.94", zorder=0.5)
    axis.plot(  # the axis is broken between 0 and the smallest loss
        [0], [foot * 2**0.5], marker=[(-1, -0.6), (1, 0.6)], markersize=9, color="0.2", clip_on=False,
        transform=axis.get_yaxis_transform(),
    )  # fmt: skip
    axis.axhline(foot, color="0.5", linewidth=0.8, linestyle=(0, (6, 4)), zorder=1)
    axis.annotate(
        f"no loss (less than {NO_LOSS:.5f})", (0.99, foot), xycoords=("axes fraction", "data"), xytext=(0, -3),
        textcoords="offset points", ha="right", va="top", fontsize=8, color="0.35",
    )  # fmt: skip
    axis.set(yscale="log", xlabel=f"MB of the compressed projections ({whole:,.2f} dense)", ylabel="ln(ppl / dense)")
    axis.set_ylim(bottom=foot / 2)
    top = axis.get_ylim()[1]
    decades = range(math.floor(math.log10(foot)), math.ceil(math.log10(top)))
    ticks = [part * 10.0**decade for decade in decades for part in (1, 2, 5)]
    ticks = [tick for tick in ticks if 1.5 * foot < tick < top]
    axis.set_yticks([foot, *ticks], ["0", *(f"{tick:g}" for tick in ticks)])
    axis.minorticks_off()
    axis.set_title(f"{dense['model']}, {dense['text']}", fontsize=10)
    axis.grid(alpha=0.3, linewidth=0.5)

    def to_bits(x: Any) -> Any:
        return 16 * x / whole

    def to_megabytes(bits: Any) -> Any:
        return bits * whole / 16

    bits = axis.secondary_xaxis("top", functions=(to_bits, to_megabytes))
    bits.set_xlabel("bits a weight")
    drawing.legend(loc="outside right upper", fontsize=8)
    return drawing
