"""A compressed folder written once again with other numbers in the same places, or as it is."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from cospadi import files
from cospadi.errors import OutputError
from cospadi.format import card, safetensors
from cospadi.format.manifest import MANIFEST, write_manifest
from cospadi.format.verify import verify
from cospadi.jobs.ledger import OUTPUT, REPLACED, Ledger
from cospadi.stages.distil import Quality


def rewrite(
    source: Path,
    output: Path,
    ledger: Ledger,
    manifest: dict[str, Any],
    tensors: Mapping[str, Tensor],
    record: dict[str, Any],
    result: dict[str, Any],
    judged: Callable[[Path], Quality],
) -> None:
    """Write a folder beside `output`, open and judge it, then rename; where it is not better, it is a copy of the
    source.

    Args:
        tensors: of the checkpoint that have changed; none for a copy.
        record: what the manifest says of it, but for what it is worth.
        result: kept with the ledger's "written"; "before" is what the source is worth, and "after" is added.
        judged: what a folder is worth.
    """
    before = Quality(*result["before"])
    staging = ledger.folder and ledger.folder / OUTPUT
    retired = ledger.folder and ledger.folder / REPLACED
    with files.staged(output, staging, retired) as staging:
        after = before
        if tensors:
            _write_changed(source, staging, tensors)
            after = judged(staging)
            if after.divergence < before.divergence:
                worth = {"divergence": [before.divergence, after.divergence], "loss": [before.loss, after.loss]}
                write_manifest(staging, manifest | {"healed": [*manifest.get("healed", []), record | worth]})
                verify(staging)
            else:
                after = before
                shutil.rmtree(staging)
                staging.mkdir()
        if after is before:
            shutil.copytree(source, staging, dirs_exist_ok=True, ignore=_hidden)
        digest = hashlib.sha256((staging / MANIFEST).read_bytes()).hexdigest()
        ledger.put("written", {"manifest": digest, "result": result | {"after": list(after)}})


def _hidden(_folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name.startswith(".")]


def _of_weights(folder: str, names: list[str]) -> list[str]:
    """What other weights make untrue, a report of them too."""
    found = [name for name in names if name.endswith((".safetensors", ".index.json")) or name == MANIFEST]
    pages = [name for name in names if name.endswith(".html") and card.is_page(Path(folder) / name)]
    return [*_hidden(folder, names), *found, *pages]


def _write_changed(source: Path, folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """The source's files with some tensors changed, without reports of it.

    Raises:
        OutputError: one of them is not what config.json says.
    """
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=_of_weights)
    if (path := folder / card.CARD).is_file():
        path.write_text(card.healed(card.read(path)), encoding="utf-8", newline="")
    written: dict[str, safetensors.WrittenTensor] = {}
    for path in safetensors.weight_files(source):
        for name, entry in safetensors.tensor_index(path).items():
            written[name] = safetensors.tensor_in_file(path, entry)
    for name, tensor in tensors.items():
        there = written[name]
        written[name] = safetensors.tensor_in_memory(tensor.shape, tensor.dtype, partial(tensor.clone))
        if (written[name].dtype, written[name].shape) != (there.dtype, there.shape):
            raise OutputError(
                f"tensor {name} became {written[name].dtype} {written[name].shape}, and was {there.dtype} {there.shape}"
            )
    safetensors.write_weights(folder, written)
