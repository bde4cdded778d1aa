"""Gathers what a report says, and puts it where it was asked for."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cospadi import files
from cospadi.commands import evaluate
from cospadi.commands.inspect import inspect_json
from cospadi.errors import UserError
from cospadi.format import card, safetensors, schema, verify
from cospadi.format.manifest import weights_digest
from cospadi.format.schema import StoredProjection
from cospadi.jobs.progress import Stages
from cospadi.model import hub, load
from cospadi.report import page, tokens
from cospadi.report.content import Content, Measured, Score
from cospadi.report.figures import check_library
from cospadi.runtime.layer import Runtime

log = logging.getLogger("cospadi")

REPORT = "report.html"


def check_place(model: str | Path, output: Path | None) -> Path:
    """The file to write, before anything is read or measured.

    Args:
        output: None is REPORT in the model's folder.

    Raises:
        UserError: it cannot be written, or holds what is no report.
    """
    check_library()
    if output is None:
        folder = files.local_path(model, "model")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; a compressed model is a folder")
        if not folder.is_dir():
            hint = "" if hub.is_path(model) else f". Of a model on the hub name the file to write: --output {REPORT}"
            raise UserError(f"{folder} does not exist{hint}")
        output = folder / REPORT
    files.check_name(output, "report")
    if output.is_dir():
        raise UserError(f"report {output} is a folder. Name a file in it: --output {output / REPORT}")
    if not output.parent.is_dir():
        raise UserError(f"report {output} cannot be written: {output.parent} is not a folder")
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"report {output} cannot be written: no permission in {output.parent}")
    if output.exists() and not card.is_page(output):
        raise UserError(f"{output} is there, and is no report. Name another file, or remove it yourself")
    return output


def gather(
    model: str | Path,
    against: str | Path | None = None,
    text: Path | None = None,
    length: int | None = None,
    batch_size: int = 4,
    device: str = "auto",
    stages: Stages | None = None,
    runtime: Runtime = "auto",
    text_field: str | None = None,
    before: Mapping[str, int] | None = None,
) -> Content:
    """All that a report says of a compressed model.

    Args:
        against: the dense model, for sizes as they were. text: with it, what both are compared on; the rest is as of
            `evaluate.compare_models`.
        before: tensor -> bytes of the dense model, where that is known already.

    Raises:
        UserError: no compressed model, or as there.
    """
    folder = hub.folder_of(model)
    entries, manifest = verify.read_checkpoint(folder)
    stored = safetensors.stored_tensors(folder)
    name = folder.resolve().name if Path(model).expanduser().exists() else str(model)
    measured = None
    if against is not None:
        dense = load.resolve(against)
        before = _sizes_before(dense, entries)
        if text is not None:
            told = (manifest or {}).get("source") or {}
            if told.get("weights_sha256") not in (None, weights_digest(dense)):
                log.warning(
                    "%s is not, by its hash, what %s was made of: where the page says dense it speaks of that one",
                    against, folder,
                )  # fmt: skip
            how = (length, batch_size, device, stages, runtime, text_field)
            measured = _measure(folder, against, text, *how)
    return Content(
        name,
        inspect_json(entries, manifest, stored),
        manifest,
        files.read_json(folder / "config.json"),
        stored,
        before,
        measured,
        scores(folder),
    )


def _sizes_before(dense: Path, entries: Mapping[str, StoredProjection]) -> dict[str, int]:
    """Tensor -> bytes of the dense model.

    Raises:
        UserError: it cannot be what was compressed.
    """
    if schema.is_compressed(dense):
        raise UserError(f"{dense} is compressed itself. Give --against the dense model that the folder was made of")
    stored = safetensors.stored_tensors(dense)
    for name, entry in entries.items():
        weight = stored.get(f"{name}.weight")
        if weight is not None and sorted(weight.shape) != sorted((entry.d1, entry.d2)):
            shape = " x ".join(map(str, weight.shape))
            raise UserError(
                f"{name} is {entry.d2} x {entry.d1} in the folder, and {shape} in {dense}, which it was not made of. "
                "Name the right one with --against"
            )
    return safetensors.tensor_sizes(dense)


def _measure(folder: Path, against: str | Path, text: Path, *how: Any) -> Measured:
    found = evaluate.compare_models(folder, against, text, *how)
    (_, ours), (_, dense) = found.results
    dense_name = Path(against).expanduser()
    return Measured(
        text.name,
        dense_name.resolve().name if dense_name.exists() else str(against),
        (ours.value, dense.value),
        found.divergence,
        found.tokens,
        *tokens.pieces(found.tokens, found.tokenizer),
    )


def scores(folder: Path) -> list[Score]:
    """What `eval --card` and `bench --card` have left in a folder's card."""
    path = files.beside(folder, card.CARD)
    if not path.is_file():
        return []
    found = []
    for command, told in card.measured(card.read(path)).items():
        head, *rows = card.rows(told) or [[]]
        if rows:
            found.append(Score(command, head, rows))
    return found


def write(content: Content, output: Path) -> None:
    """Write the page, whole or not at all."""
    files.write_whole(output, page.render(content))


def report_json(content: Content, output: Path | None) -> dict[str, Any]:
    """The same for machines."""
    data: dict[str, Any] = {"report": None if output is None else str(output), **content.inspected}
    if (measured := content.measured) is not None:
        ours, dense = measured.perplexities
        data["measured"] = {
            "text": measured.text,
            "against": measured.against,
            "perplexity": ours,
            "dense_perplexity": dense,
            "kl_divergence": measured.divergence,
            "windows": measured.tokens.windows.shape[0],
            "length": measured.tokens.windows.shape[1],
        }
    return data


def report_lines(content: Content, output: Path) -> list[str]:
    """What the command says when it is done."""
    return [page.says(content), f"Written to {output}."]
