"""Checks of a checkpoint on reading: tensors against config.json, every byte against the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cospadi.errors import CheckpointError
from cospadi.format.manifest import MANIFEST, hash_files, read_manifest
from cospadi.format.safetensors import open_file, weight_files
from cospadi.format.schema import BIAS, SENTINEL, StoredProjection, read_config


def check_files(files: Sequence[Path], projections: Mapping[str, StoredProjection]) -> set[str]:
    """Check the compressed projections' tensors: presence, biases too, and no others; dtype, shape, popcount of masks,
    padding bits.

    Returns:
        The names of all tensors in the files.
    Raises:
        CheckpointError: names the file and the tensor.
    """
    expected = {
        tensor: (name, what) for name, entry in projections.items() for tensor, what in entry.tensors(name).items()
    }
    present: set[str] = set()
    for path in files:
        # transformers calls this while it builds a model on the meta device; what is read here is real.
        with torch.device("cpu"), open_file(path) as file:
            names = list(file.keys())
            present.update(names)
            for tensor in names:
                if tensor not in expected:
                    module, _, part = tensor.rpartition(".")
                    if module in projections and part not in (BIAS, SENTINEL):
                        raise CheckpointError(f"{path}: tensor {tensor} is there, which config.json denies")
                    continue
                name, (dtype, shape) = expected[tensor]
                view = file.get_slice(tensor)
                if view.get_dtype() != dtype or list(view.get_shape()) != shape:
                    raise CheckpointError(
                        f"{path}: tensor {tensor} is {view.get_dtype()} {list(view.get_shape())}, "
                        f"config.json asks for {dtype} {shape}"
                    )
                _check_content(path, tensor, view, projections[name])
    missing = [tensor for tensor in expected if tensor not in present]
    if missing:
        raise CheckpointError(f"{files[0].parent}: tensor {missing[0]} is in none of the checkpoint's files")
    for name, entry in projections.items():
        if entry.bias != (f"{name}.{BIAS}" in present):
            what = "is in none of the checkpoint's files" if entry.bias else "is there, which config.json denies"
            raise CheckpointError(f"{files[0].parent}: tensor {name}.{BIAS} {what}")
    return present


def _check_content(path: Path, tensor: str, view: Any, entry: StoredProjection) -> None:
    """What the kinds check: a mask whole and a value stream's last byte; nothing else is read."""
    form, part = entry.form, tensor.rpartition(".")[2]
    problem = None
    if part == form.names.support:
        problem = form.support_kind.problem(view, entry.d2, entry.k, entry.nnz)
    elif part == form.names.values:
        problem = form.codec.problem(view, entry.values_shape)
    if problem is not None:
        raise CheckpointError(f"{path}: tensor {tensor} {problem}")


def read_checkpoint(folder: Path) -> tuple[dict[str, StoredProjection], dict[str, Any] | None]:
    """The compressed projections of a folder and its manifest, with everything checked but the hashes.

    Raises:
        UserError: not a CoSpaDi checkpoint. CheckpointError: a damaged one.
    """
    projections = read_config(folder)
    files = weight_files(folder)
    if not files:
        raise CheckpointError(f"{folder} has no safetensors files")
    check_files(files, projections)
    return projections, read_manifest(folder, projections)


def verify(folder: Path) -> int:
    """Check everything there is to check, every byte included.

    Returns:
        The number of tensors whose hashes were compared.
    Raises:
        CheckpointError: names the file and the first tensor that differs.
    """
    _, manifest = read_checkpoint(folder)
    if manifest is None:
        raise CheckpointError(f"{folder / MANIFEST} is not there: nothing to compare the tensors with")
    recorded, found = manifest.get("files", {}), hash_files(folder)
    for name in sorted(set(recorded) | set(found)):
        if name not in recorded:
            raise CheckpointError(f"{folder / name} is not listed in {MANIFEST}")
        if recorded[name]["sha256"] == found[name]["sha256"]:
            continue
        before, now = recorded[name]["tensors"], found[name]["tensors"]
        differing = [tensor for tensor in sorted(set(before) | set(now)) if before.get(tensor) != now.get(tensor)]
        what = f"tensor {differing[0]} is not" if differing else "its header is not"
        raise CheckpointError(f"{folder / name}: {what} what was written (sha256 differs)")
    return sum(len(entry["tensors"]) for entry in found.values())
