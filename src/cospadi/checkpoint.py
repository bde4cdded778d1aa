"""The on-disk format, version 1 (docs/format.md): names of tensors, checks on reading, the manifest, and writing.

A checkpoint is a Hugging Face model folder. `config.json` describes the compressed projections, the safetensors files
hold their factors beside every other tensor, and `cospadi.json`, the manifest, says where they came from and hashes
the tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from pydantic import BaseModel, ConfigDict, Field, Strict, StrictInt, ValidationError, model_validator
from safetensors import SafetensorError, safe_open

from cospadi import budget, packing
from cospadi.errors import CheckpointError, UserError, first_line

FORMAT_VERSION = 1
QUANT_METHOD = "cospadi"
MANIFEST = "cospadi.json"

CONFIG_FIELDS = ("quant_method", "format_version", "projections")
"""What our `quantization_config` holds."""

DICTIONARY, SUPPORT, VALUES, LEFT, RIGHT, SENTINEL = "dictionary", "support", "values", "left", "right", "weight"
BIAS = "bias"

LARGEST = 2**28
"""Most features or atoms that are believed: products of two such sizes, in bytes, still are numbers to torch."""


class StoredProjection(BaseModel):
    """What `config.json` says of one compressed projection; enough to build its layer.

    Attributes:
        layout: which tensors it has.
        d1, d2: in and out features. k: atoms, or the rank.
        nnz: nonzeros of S, and value_bits: bits each takes (both only in the sparse layout).
        dictionary: the projection under whose name the dictionary (or left factor) is stored.
        bias: whether the layer has one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layout: Literal["sparse-dictionary", "low-rank"]
    d1: int = Field(gt=0, le=LARGEST)
    d2: int = Field(gt=0, le=LARGEST)
    k: int = Field(gt=0, le=LARGEST)
    nnz: int = Field(0, ge=0)
    value_bits: Literal[14, 16] = 16
    dictionary: str
    bias: bool = False

    @model_validator(mode="after")
    def _possible(self) -> StoredProjection:
        if self.nnz > self.k * self.d2:
            raise ValueError(f"nnz {self.nnz} is more than k * d2 = {self.k * self.d2}")
        return self

    def tensors(self, name: str) -> dict[str, tuple[str, list[int]]]:
        """Tensors stored under this projection's name: full name -> (safetensors dtype, shape); bias and sentinel
        are not among them."""
        shared = [self.k, self.d1]
        if self.layout == "low-rank":
            own = {RIGHT: ("BF16", [self.d2, self.k])}
            first = {LEFT: ("BF16", shared)}
        else:
            nbytes = budget.value_stream_bytes(self.nnz, self.value_bits)
            own = {
                SUPPORT: ("U8", [self.d2, budget.support_row_bytes(self.k)]),
                VALUES: ("BF16", [self.nnz]) if self.value_bits == 16 else ("U8", [nbytes]),
            }
            first = {DICTIONARY: ("BF16", shared)}
        return {f"{name}.{part}": what for part, what in ((first | own) if self.dictionary == name else own).items()}


class FileRecord(BaseModel):
    """What the manifest says of one safetensors file: its size and the sha256 of it and of each tensor's bytes."""

    bytes: int
    sha256: str
    tensors: dict[str, str]


class ProjectionRecord(BaseModel):
    """What the manifest says of one projection that is read again: its error, if it is known."""

    model_config = ConfigDict(extra="allow")

    relative_error: Annotated[float, Strict()] | None = Field(None, allow_inf_nan=False)


class Manifest(BaseModel):
    """The part of `cospadi.json` that reading relies on; other fields are for people."""

    model_config = ConfigDict(extra="allow")

    format_version: int
    projections: dict[str, ProjectionRecord] = {}
    dense: dict[str, StrictInt] = {}
    files: dict[str, FileRecord] = {}


def parse_projections(raw: object) -> dict[str, StoredProjection]:
    """The `projections` of `config.json`, checked on their own and against each other.

    Raises:
        CheckpointError: a malformed entry, or an owner of a dictionary that does not fit.
    """
    if not isinstance(raw, Mapping):
        raise CheckpointError("config.json: projections is not a mapping of names to entries")
    projections: dict[str, StoredProjection] = {}
    for name, fields in raw.items():
        try:
            projections[name] = StoredProjection.model_validate(fields)
        except ValidationError as error:
            raise CheckpointError(f"config.json: projection {name}: {_first_problem(error)}") from None
    for name, entry in projections.items():
        owner = projections.get(entry.dictionary)
        same = owner is not None and (owner.layout, owner.d1, owner.k) == (entry.layout, entry.d1, entry.k)
        if owner is None or not same or owner.dictionary != entry.dictionary:
            raise CheckpointError(
                f"config.json: projection {name} names {entry.dictionary} as the owner of its dictionary, "
                "which has none that fits"
            )
    return projections


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    field = ".".join(map(str, problem["loc"]))
    message = problem["msg"].removeprefix("Value error, ")
    return f"{field}: {message}" if field else message


@contextmanager
def open_file(path: Path) -> Iterator[Any]:
    """A safetensors file open for reading.

    Raises:
        CheckpointError: missing, truncated or malformed.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}. Copy or download it again") from None


def check_files(files: Sequence[Path], projections: Mapping[str, StoredProjection]) -> set[str]:
    """Check the compressed projections' tensors: presence, biases too, dtype, shape, popcount of masks, padding bits.

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
    """Check a mask whole and a value stream's last byte; nothing else is read."""
    part = tensor.rpartition(".")[2]
    if part == SUPPORT:
        rows = max(1, packing.COUNTED_BYTES // budget.support_row_bytes(entry.k))
        count, spilled = 0, False
        for first in range(0, entry.d2, rows):
            read = view[first : first + rows]
            count += packing.popcount(read)
            spilled |= packing.has_padding_bits(read, entry.k)
        if count != entry.nnz:
            raise CheckpointError(f"{path}: mask {tensor} has {count} bits set, config.json says {entry.nnz} nonzeros")
        if spilled:
            raise CheckpointError(f"{path}: mask {tensor} has bits set past atom {entry.k - 1}")
    if part == VALUES and packing.unused_value_bits_set(view[-1:], entry.nnz, entry.value_bits):
        raise CheckpointError(f"{path}: tensor {tensor} has bits set past its last value")


def tensor_index(path: Path) -> dict[str, dict[str, Any]]:
    """Header of a safetensors file: tensor name -> {dtype, shape, data_offsets}, offsets counted from the file's start.

    Raises:
        CheckpointError: malformed.
    """
    with open_file(path):  # validates the header against the file's size
        pass
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    for entry in header.values():
        entry["data_offsets"] = [8 + size + offset for offset in entry["data_offsets"]]
    return dict(sorted(header.items()))


class StoredTensor(NamedTuple):
    """What a safetensors header says of one tensor."""

    shape: list[int]
    nbytes: int


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Tensor name -> shape and bytes, of all safetensors files in a folder, by their headers."""
    indices = (tensor_index(path) for path in weight_files(folder))
    return {
        name: StoredTensor(entry["shape"], entry["data_offsets"][1] - entry["data_offsets"][0])
        for index in indices
        for name, entry in index.items()
    }


def tensor_sizes(folder: Path) -> dict[str, int]:
    """Tensor name -> bytes, of all safetensors files in a folder, by their headers."""
    return {name: tensor.nbytes for name, tensor in stored_tensors(folder).items()}


def tensor_bytes(folder: Path) -> int:
    """Bytes of all tensors in a folder's safetensors files."""
    return sum(tensor_sizes(folder).values())


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads in a model folder: model.safetensors, or those of the index, or
    every one there is. (Some public models carry a second copy of their weights under other names.)

    Raises:
        CheckpointError: an index that is malformed or names a file outside the folder.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
            raise CheckpointError(f"{index} has no weight_map of tensor names to file names")
        for name in named.values():
            if Path(name).name != name or name in ("", ".."):
                raise CheckpointError(f"{index} names '{name}', a path that leaves its folder")
        return [folder / name for name in sorted(set(named.values()))]
    return all_safetensors(folder)


def all_safetensors(folder: Path) -> list[Path]:
    """Every safetensors file in a folder."""
    return sorted(path for path in folder.glob("*.safetensors") if path.is_file())


SAFETENSORS_TYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""Names of dtypes in safetensors headers, in the order in which its own writer sorts them (backwards)."""

COPIED_BYTES = 2**22
"""Bytes read at a time where files are copied or hashed."""

SHARD_SIZE = "5GB"
"""Most that goes into one safetensors file."""


def tensor_nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor, its dtype as safetensors names it."""
    return math.prod(shape) * SAFETENSORS_TYPES[dtype].itemsize


@dataclass(frozen=True)
class WrittenTensor:
    """A tensor to be written: what its header says, and its bytes, in parts.

    Attributes:
        dtype: as safetensors names it.
    """

    dtype: str
    shape: list[int]
    parts: Callable[[], Iterator[bytes]]

    @property
    def nbytes(self) -> int:
        return tensor_nbytes(self.dtype, self.shape)


def tensor_in_file(path: Path, entry: dict[str, Any]) -> WrittenTensor:
    """A tensor that lies in a safetensors file, by its entry in `tensor_index`."""
    return WrittenTensor(entry["dtype"], entry["shape"], lambda: _file_parts(path, *entry["data_offsets"]))


def tensor_in_memory(shape: Sequence[int], dtype: torch.dtype, read: Callable[[], torch.Tensor]) -> WrittenTensor:
    """A tensor that is in memory once it is asked for."""
    name = next(name for name, known in SAFETENSORS_TYPES.items() if known == dtype)

    def parts() -> Iterator[bytes]:
        yield read().detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()

    return WrittenTensor(name, list(shape), parts)


def _file_parts(path: Path, start: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as stream:
        stream.seek(start)
        while start < end:
            part = stream.read(min(COPIED_BYTES, end - start))
            if not part:
                raise CheckpointError(f"{path} ends too early. Copy or download it again")
            start += len(part)
            yield part


def write_weights(
    folder: Path, tensors: Mapping[str, WrittenTensor], on_bytes: Callable[[int], None] | None = None
) -> None:
    """Write tensors as transformers does, to model.safetensors or to shards of SHARD_SIZE with an index, holding only
    one part of one tensor in memory (safetensors' own writer wants all of a file's).

    Args:
        on_bytes: called with the number of bytes just written.
    """
    split = split_state_dict_into_shards_factory(
        dict(sorted(tensors.items())),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_SIZE,
    )
    types = list(SAFETENSORS_TYPES)
    for filename, names in split.filename_to_tensors.items():
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        ordered = sorted(names, key=lambda name: (-types.index(tensors[name].dtype), name))
        for name in ordered:
            end = offset + tensors[name].nbytes
            header[name] = {"dtype": tensors[name].dtype, "shape": tensors[name].shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with (folder / filename).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name in ordered:
                for part in tensors[name].parts():
                    stream.write(part)
                    if on_bytes:
                        on_bytes(len(part))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def hash_files(folder: Path) -> dict[str, Any]:
    """sha256 of every safetensors file in a folder and of every tensor's bytes in it."""
    hashes: dict[str, Any] = {}
    for path in all_safetensors(folder):
        with path.open("rb") as stream:
            whole = hashlib.file_digest(stream, "sha256").hexdigest()
        hashes[path.name] = {"bytes": path.stat().st_size, "sha256": whole, "tensors": _hash_tensors(path)}
    return hashes


def weights_digest(folder: Path) -> str:
    """One sha256 for all tensors of a model, whatever files they are spread over: of their names and hashes."""
    hashes = {name: digest for path in weight_files(folder) for name, digest in _hash_tensors(path).items()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def _hash_tensors(path: Path) -> dict[str, str]:
    hashes = {}
    for name, entry in tensor_index(path).items():
        digest = hashlib.sha256()
        for part in _file_parts(path, *entry["data_offsets"]):
            digest.update(part)
        hashes[name] = digest.hexdigest()
    return hashes


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: missing or malformed.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:  # numbers and nesting have limits, too
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


def read_config(folder: Path) -> dict[str, StoredProjection]:
    """The compressed projections of a checkpoint folder, from its config.json.

    Raises:
        UserError: not a CoSpaDi checkpoint. CheckpointError: another version, or malformed.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    config = read_json(folder / "config.json").get("quantization_config")
    if not isinstance(config, dict) or config.get("quant_method") != QUANT_METHOD:
        raise UserError(f"{folder} is not a CoSpaDi checkpoint: its config.json has no quantization_config of ours")
    check_version(config.get("format_version"), "config.json")
    check_fields(config)
    return parse_projections(config.get("projections", {}))


def check_fields(names: Iterable[str]) -> None:
    """Refuse fields of a quantization_config that are not ours."""
    unknown = [name for name in names if name not in CONFIG_FIELDS]
    if unknown:
        raise CheckpointError(f"config.json: quantization_config has unknown fields: {', '.join(unknown)}")


def check_version(version: object, file: str) -> None:
    """Refuse a format version that is not ours."""
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} says format version {version!s:.40}; this cospadi reads version {FORMAT_VERSION}. "
            "Install a matching release"
        )


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
        raise CheckpointError(f"{path}: {_first_problem(error)}") from None
    if set(manifest.projections) != set(projections):
        raise CheckpointError(f"{path} lists other projections than config.json: it belongs to another checkpoint")
    if manifest.dense:
        tensors = stored_tensors(folder)
        for name, nbytes in manifest.dense.items():
            weight = tensors.get(f"{name}.weight")
            if weight is None or len(weight.shape) != 2 or nbytes != budget.dense_bytes(*weight.shape):
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


def new_manifest(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """`content` with the hashes of the folder's files as they are now.

    Where a projection's tensors, or the dictionary that it shares, are not those that `content` has hashes for, its
    recorded error is dropped.
    """
    files = hash_files(folder)
    before = {
        tensor: digest for entry in content.get("files", {}).values() for tensor, digest in entry["tensors"].items()
    }
    now = {tensor: digest for entry in files.values() for tensor, digest in entry["tensors"].items()}
    differing = {tensor for tensor, digest in before.items() if now.get(tensor) != digest}
    changed = {tensor.rpartition(".")[0] for tensor in differing}
    for name, entry in read_config(folder).items():
        if f"{entry.dictionary}.{LEFT if entry.layout == 'low-rank' else DICTIONARY}" in differing:
            changed.add(name)
    projections = {
        name: {key: value for key, value in entry.items() if key != "relative_error" or name not in changed}
        for name, entry in content.get("projections", {}).items()
    }
    return content | {"format_version": FORMAT_VERSION, "projections": projections, "files": files}


def write_manifest(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write `cospadi.json` for what is in the folder now; returns what was written."""
    manifest = new_manifest(folder, content)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return manifest


def local_path(name: str | Path, what: str) -> Path:
    """A path with its ~ resolved, whether there is such a file or not; `what` names it in messages.

    Raises:
        UserError: there can be none.
    """
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # a ~ of nobody
        raise UserError(f"{what} {name} cannot be used: {first_line(error)}") from None
    check_name(path, what)
    return path


def check_name(path: Path, what: str) -> None:
    """Refuse a path that no file can have: with a name that is too long, or with characters that are in none."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise UserError(f"{what} {path} cannot be used: {reason}") from None


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output folder that holds something, or that cannot be written, before any work is done."""
    check_name(output, "output")
    try:
        os.path.realpath(output).encode()
    except UnicodeEncodeError:
        raise UserError(f"output {output} cannot be written: safetensors takes only paths that are UTF-8") from None
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file. Name a folder")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise UserError(f"output folder {output} is not empty. Name another, or pass --overwrite to replace it")
    if output.is_mount() or Path.cwd().is_relative_to(output.resolve()):
        raise UserError(
            f"output {output} is a mount point, or the current folder or one around it, which cannot be replaced "
            "whole. Name a folder inside it"
        )
    parent = nearest_folder(output)
    if not parent.is_dir():
        raise UserError(f"output {output} cannot be written: {parent} is a file")
    if not os.access(parent, os.W_OK):
        raise UserError(f"output {output} cannot be written: no permission in {parent}")


def nearest_folder(path: Path) -> Path:
    """The closest ancestor that exists."""
    path = Path(os.path.realpath(path)).parent
    while not path.exists():
        path = path.parent
    return path


@contextmanager
def staged(output: Path, staging: Path | None = None, retired: Path | None = None) -> Iterator[Path]:
    """A folder beside `output` to write into, renamed to `output` at the end, or removed if anything goes wrong.

    Args:
        staging: its name; what an earlier run has left there is removed.
        retired: where an `output` that is replaced goes until the new one is in its place.
    """
    output = Path(os.path.realpath(output))  # behind a link, so that staging is on the same disk
    made = [parent for parent in output.parents if not parent.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    if staging is None:  # a name may be as long as the system allows, and the one to write under is longer
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name[:40]}.", suffix=".partial", dir=output.parent))
    else:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
    retired = retired or staging.with_suffix(".old")
    try:
        staging.chmod(0o755)
        yield staging
        for path in staging.rglob("*"):
            if path.is_file():
                path.chmod(0o644)
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
        sync_folder(staging)
        if output.exists():
            shutil.rmtree(retired, ignore_errors=True)
            output.rename(retired)
            try:
                staging.rename(output)
            except BaseException:
                retired.rename(output)
                raise
            sync_folder(output.parent)
            shutil.rmtree(retired)
        else:
            staging.rename(output)
            sync_folder(output.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # another program may have put something there
                parent.rmdir()
        raise


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


COMPANIONS = (
    *("*.json", "*.txt", "*.model", "*.spm", "*.jinja", "*.tiktoken"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*", "additional_chat_templates/*"),
)
"""What belongs to a model beside its weights: configuration, tokenizer, chat templates, generation config, licence."""

NOT_COPIED = {"config.json", MANIFEST}


def copy_companions(source: Path, destination: Path) -> None:
    """Copy a model's companions, but for its config and the index of its shards."""
    for path in sorted(path for pattern in COMPANIONS for path in source.glob(pattern)):
        if path.is_file() and path.name not in NOT_COPIED and not path.name.endswith(".index.json"):
            copy = destination / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
