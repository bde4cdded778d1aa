"""Safetensors files: a reader that trusts nothing in them, and a writer that holds one part of one tensor in memory."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from cospadi.errors import CheckpointError, UserError
from cospadi.files import read_json


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
    except RuntimeError as error:
        if "unable to mmap" not in str(error):
            raise
        size = path.stat().st_size
        raise UserError(
            f"{path} has {size / 1e9:.1f} GB, more than this system lets a process map. Use a machine with more memory,"
            " or a checkpoint in smaller files"
        ) from None


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


ADAPTER = "adapter_model"
"""How the file of a PEFT adapter is called, which is no part of a model."""


class StoredTensor(NamedTuple):
    """What a safetensors header says of one tensor, and which file it is."""

    shape: list[int]
    nbytes: int
    dtype: str
    path: Path


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Tensor name -> what its header says, of all safetensors files in a folder.

    Raises:
        CheckpointError: a malformed file, or a tensor in two of them.
    """
    found: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        for name, entry in tensor_index(path).items():
            if name in found:
                raise CheckpointError(f"{folder}: tensor {name} is in {found[name].path.name} and in {path.name}")
            begin, end = entry["data_offsets"]
            found[name] = StoredTensor(entry["shape"], end - begin, entry["dtype"], path)
    return found


def tensor_sizes(folder: Path) -> dict[str, int]:
    """Tensor name -> bytes, of all safetensors files in a folder, by their headers."""
    return {name: tensor.nbytes for name, tensor in stored_tensors(folder).items()}


def tensor_bytes(folder: Path) -> int:
    """Bytes of all tensors in a folder's safetensors files."""
    return sum(tensor_sizes(folder).values())


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads in a model folder: model.safetensors, or those of the index, or
    every one there is but an adapter's. (Some public models carry a second copy of their weights under other names.)

    Raises:
        CheckpointError: an index that is malformed or names a file outside the folder, or what is no file.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_symlink() and not single.exists():
        raise CheckpointError(f"{single} is a link to {single.readlink()}, which is not there")
    if single.exists():
        if not single.is_file():
            raise CheckpointError(f"{single} is no file")
        return [single]
    if index.exists():
        content = read_json(index)
        named = content.get("weight_map")
        if not isinstance(content.get("metadata"), dict):  # transformers stops without one
            raise CheckpointError(f'{index} has no "metadata", an object which may be empty')
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
            raise CheckpointError(f"{index} has no weight_map of tensor names to file names")
        for name in named.values():
            if Path(name).name != name or name in ("", ".."):
                raise CheckpointError(f"{index} names '{name}', a path that leaves its folder")
        return [folder / name for name in sorted(set(named.values()))]
    return [path for path in all_safetensors(folder) if not path.name.startswith(ADAPTER)]


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


def dtype_name(dtype: torch.dtype) -> str:
    """What safetensors calls a dtype."""
    return next(name for name, known in SAFETENSORS_TYPES.items() if known == dtype)


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
    return WrittenTensor(entry["dtype"], entry["shape"], lambda: file_parts(path, *entry["data_offsets"]))


def tensor_in_memory(shape: Sequence[int], dtype: torch.dtype, read: Callable[[], torch.Tensor]) -> WrittenTensor:
    """A tensor that is in memory once it is asked for."""

    def parts() -> Iterator[bytes]:
        yield read().detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()

    return WrittenTensor(dtype_name(dtype), list(shape), parts)


def file_parts(path: Path, start: int, end: int) -> Iterator[bytes]:
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


def hash_tensors(path: Path) -> dict[str, str]:
    hashes = {}
    for name, entry in tensor_index(path).items():
        digest = hashlib.sha256()
        for part in file_parts(path, *entry["data_offsets"]):
            digest.update(part)
        hashes[name] = digest.hexdigest()
    return hashes
