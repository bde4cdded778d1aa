"""What `eval --card` and `bench --card` write into a model's card: figures beside the command that measured them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cospadi import files
from cospadi.commands.tables import megabytes
from cospadi.errors import UserError
from cospadi.format import card
from cospadi.format.manifest import MANIFEST

USUAL = {
    ("eval", "batch-size"): 4,
    ("bench", "repeats"): 5,
    ("bench", "tokens"): 16,
    ("bench", "runtime"): "auto",
}
"""Flags that a command is not told where they have these values."""

PLACES = ("text", "against", "low-rank", "include-path")
"""Flags that name files and folders."""


def check_card(model: str | Path) -> Path:
    """The card of a model's folder, which is there and can be written.

    Raises:
        UserError: it is not so.
    """
    folder = files.local_path(model, "model")
    path = folder / card.CARD
    if not folder.is_dir():
        raise UserError(
            f"--card writes into a folder's {card.CARD}, and {model} is no folder. Download it, or leave it out"
        )
    if not (folder / MANIFEST).is_file() or not path.is_file():
        raise UserError(
            f"{folder} has no card that `cospadi compress` wrote ({card.CARD} beside {MANIFEST}) for --card"
        )
    if not os.access(folder, os.W_OK) or not os.access(path, os.W_OK):
        raise UserError(f"{path} cannot be written: no permission")
    card.read(path)
    return path


def write_measured(
    path: Path,
    command: str,
    asked: Mapping[str, Any],
    others: Sequence[str | Path | None],
    rows: Sequence[Sequence[str]],
) -> None:
    """Put what was measured into a card, in place of what the same command had measured before.

    Args:
        command: "eval" or "bench".
        asked: flag of the command -> its value, or several; None and False where it was not given.
        others: models beside this one, None where one was not given.
        rows: a line a figure: its name, this model's, those of the others.
    """
    head = ["", "this model", *(card.cell(_public(other)) for other in others if other is not None)]
    text = card.with_measured(card.read(path), command_of(command, asked), card.table(head, rows))
    files.write_whole(path, text)


def command_of(command: str, asked: Mapping[str, Any]) -> str:
    """The command as anybody could give it: files and folders of this machine by their names alone."""
    words = ["cospadi", command, card.PLACE]
    for flag, given in asked.items():
        for value in given if isinstance(given, (list, tuple)) else [given]:
            if value is True:
                words.append(f"--{flag}")
            elif value not in (None, False) and value != USUAL.get((command, flag)):
                words += [f"--{flag}", _public(value) if flag in PLACES else str(value)]
    return card.printable(shlex.join(words))


def _public(name: str | Path) -> str:
    """A path's last name; any other name as it is."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else str(name)


def quality_rows(data: Mapping[str, Any]) -> list[Sequence[str]]:
    """A line a figure of `cospadi eval --json`: perplexities, divergence, accuracies in per cent with their errors."""
    rows: list[Sequence[str]] = []
    if models := data.get("models"):
        windows = " and ".join(dict.fromkeys(f"{one['windows']:,} windows of {one['length']} tokens" for one in models))
        rows.append([f"perplexity, {windows}", *(_number(one["perplexity"], 4) for one in models)])
    if data.get("kl_divergence") is not None:
        rows.append(["KL divergence from it, nats a token", _number(data["kl_divergence"], 5), ""])
    if tasks := data.get("tasks"):
        by = f"lm-eval {tasks['lm_eval']}"
        first, *_ = models = tasks["models"]
        for name, found in first["tasks"].items():
            for metric in [metric for metric in found if metric != "documents"]:
                cells = [_per_cent(one["tasks"][name][metric]) for one in models]
                rows.append([f"{name}, {metric}, {found['documents']:,} documents ({by})", *cells])
        rows.append(["average, acc", *(_per_cent(one["average"]) for one in models)])
    return rows


def speed_rows(data: Mapping[str, Any], where: str) -> list[Sequence[str]]:
    """A line a figure of `cospadi bench --json`, this model the last of its models there: tokens a second, memory.

    Args:
        where: what computed.
    """
    models = [data["models"][-1], *data["models"][:-1]]
    rows: list[Sequence[str]] = []
    for index, one in enumerate(models[0]["speeds"]):
        what = f"a prompt of {one['size']} tokens" if one["kind"] == "prefill" else f"batch {one['size']}"
        rows.append([f"{what}, tokens/s", *(f"{each['speeds'][index]['tokens_per_second']:,.1f}" for each in models)])
    rows.append(["weights in memory", *(megabytes(each["tensor_bytes"]) for each in models)])
    rows.append(["loading and one token", *(f"{each['load_seconds']:.1f} s" for each in models)])
    rows.append(["measured on", where, *("" for _ in models[1:])])
    return rows


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _per_cent(figure: Mapping[str, float | None]) -> str:
    value, error = figure["value"], figure["stderr"]
    assert value is not None
    return f"{100 * value:.2f} %" if error is None else f"{100 * value:.2f} ± {100 * error:.2f} %"
