"""`cospadi.json`, the manifest: where a checkpoint came from, and the sha256 of every file and tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Strict, StrictInt, ValidationError

from cospadi.errors import CheckpointError
from cospadi.files import file_digest, read_json
from cospadi.format.form import dense_bytes
from cospadi.format.safetensors import all_safetensors, hash_tensors, stored_tensors, weight_files
from cospadi.format.schema import StoredProjection, check_version, first_problem, read_config, spell

MANIFEST = "cospadi.json"

Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]

OF_WEIGHTS = ("relative_error", "loss")
"""What a projection's record says of its tensors as they were written, and not of others."""


class FileRecord(BaseModel):
    """What the manifest says of one safetensors file: its size and the sha256 of it and of each tensor's bytes."""

    bytes: int
    sha256: str
    tensors: dict[str, str]


class LossRecord(BaseModel):
    """What one projection costs the loss to second order, in nats a token: its error, and one as large as all of its
    output."""

    of_error: Number
    of_all: Number


class ProjectionRecord(BaseModel):
    """What the manifest says of one projection that is read again, where it is known: its error, and what it costs in
    the loss."""

    model_config = ConfigDict(extra="allow")

    relative_error: Number | None = None
    loss: LossRecord | None = None


class HealingText(BaseModel):
    """Sequences of so many tokens that healing has learned from, and those that it was judged by."""

    name: str
    sequences: StrictInt
    held_out: StrictInt
    length: StrictInt


class HealingRecord(BaseModel):
    """What the manifest says of a healing: the dense model, the text, and divergence from it before and after."""

    model_config = ConfigDict(extra="allow")

    teacher: dict[str, str]
    text: HealingText
    best_step: StrictInt
    divergence: tuple[Number, Number]


class Manifest(BaseModel):
    """The part of `cospadi.json` that reading relies on; other fields are for people."""

    model_config = ConfigDict(extra="allow")

    format_version: int
    projections: dict[str, ProjectionRecord] = {}
    dense: dict[str, StrictInt] = {}
    healed: list[HealingRecord] = []
    files: dict[str, FileRecord] = {}


def hash_files(folder: Path) -> dict[str, Any]:
    """sha256 of every safetensors file in a folder and of every tensor's bytes in it."""
    hashes: dict[str, Any] = {}
    for path in all_safetensors(folder):
        hashes[path.name] = {"bytes": path.stat().st_size, "sha256": file_digest(path), "tensors": hash_tensors(path)}
    return hashes


def weights_digest(folder: Path) -> str:
    """One sha256 for all tensors of a model, whatever files they are spread over: of their names and hashes."""
    hashes = {name: digest for path in weight_files(folder) for name, digest in hash_tensors(path).items()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path, projections: Mapping[str, StoredProjection]) -> dict[str, Any] | None:
    """The manifest, or None where there is none.

    Raises:
        CheckpointError: a manifest that does not belong to this checkpoint.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    raw = read_json(path)
    check_version(raw.get("format_version"), str(path))
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {first_problem(error)}") from None
    if set(manifest.projections) != set(projections):
        raise CheckpointError(f"{path} lists other projections than config.json: it belongs to another checkpoint")
    if manifest.dense:
        tensors = stored_tensors(folder)
        for name, nbytes in manifest.dense.items():
            weight = tensors.get(f"{name}.weight")
            if weight is None or len(weight.shape) != 2 or nbytes != dense_bytes(*weight.shape):
                raise CheckpointError(
                    f"{path} counts {nbytes} bytes for the dense projection {name}, which the checkpoint does not hold"
                )
    sizes = {file.name: file.stat().st_size for file in all_safetensors(folder)}
    for name, entry in manifest.files.items():
        if name not in sizes:
            raise CheckpointError(f"{path} lists {name}, which is not there")
        if sizes[name] != entry.bytes:
            raise CheckpointError(f"{folder / name} has {sizes[name]} bytes, {path.name} says {entry.bytes}")
    return raw


def new_manifest(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """`content` with the hashes of the folder's files as they are now.

    Where a projection's tensors, or the dictionary that it shares, are not those that `content` has hashes for, its
    recorded error is dropped, and what that costs.
    """
    files = hash_files(folder)
    before, now = tensor_hashes(content), tensor_hashes({"files": files})
    differing = {tensor for tensor, digest in before.items() if now.get(tensor) != digest}
    changed = {tensor.rpartition(".")[0] for tensor in differing}
    stored = read_config(folder)
    for name, entry in stored.items():
        if entry.dictionary_tensor in differing:
            changed.add(name)
    projections = {
        name: {key: value for key, value in entry.items() if key not in OF_WEIGHTS or name not in changed}
        for name, entry in content.get("projections", {}).items()
    }
    return content | {"format_version": spell(stored)[0], "projections": projections, "files": files}


def tensor_hashes(content: Mapping[str, Any]) -> dict[str, str]:
    """Tensor -> sha256 of its bytes, as a manifest says; nothing where it has no hashes."""
    return {
        tensor: digest for entry in content.get("files", {}).values() for tensor, digest in entry["tensors"].items()
    }


def write_manifest(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write `cospadi.json` for what is in the folder now; returns what was written."""
    manifest = new_manifest(folder, content)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return manifest
