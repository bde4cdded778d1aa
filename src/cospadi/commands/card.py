"""What `cospadi eval --card` writes into a model's card: figures beside the command that measured them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cospadi import files
from cospadi.errors import UserError
from cospadi.format import card
from cospadi.format.manifest import MANIFEST

USUAL_BATCH = 4


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


def write_measured(path: Path, data: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Put what was measured into a card, in place of what the same command had measured before.

    Args:
        data: what `cospadi eval --json` prints.
        asked: flag of `cospadi eval` -> its value; None and False where it was not given.
    """
    against = _public(asked["against"]) if asked["against"] else None
    head = ["", "this model", *([card.cell(against)] if against else [])]
    text = card.with_measured(card.read(path), command_of(asked), card.table(head, measured_rows(data)))
    files.write_whole(path, text)


def command_of(asked: Mapping[str, Any]) -> str:
    """The command as anybody could give it: files and folders of this machine by their names alone."""
    words = ["cospadi", "eval", card.PLACE]
    for flag, value in asked.items():
        if value is True:
            words.append(f"--{flag}")
        elif value not in (None, False) and (flag, value) != ("batch-size", USUAL_BATCH):
            words += [f"--{flag}", _public(value) if flag in ("text", "against", "include-path") else str(value)]
    return card.printable(shlex.join(words))


def _public(name: str | Path) -> str:
    """A path's last name; any other name as it is."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else str(name)


def measured_rows(data: Mapping[str, Any]) -> list[Sequence[str]]:
    """A line a figure: perplexities, the divergence, accuracies in per cent with their standard errors."""
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


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _per_cent(figure: Mapping[str, float | None]) -> str:
    value, error = figure["value"], figure["stderr"]
    assert value is not None
    return f"{100 * value:.2f} %" if error is None else f"{100 * value:.2f} ± {100 * error:.2f} %"
