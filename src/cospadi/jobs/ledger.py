"""The job directory: every finished piece of a long job, once and whole, so that a job that died resumes.

A job is a sequence of pieces, each computed from the ones before it and from what identifies the job. A piece is a
record (JSON) and, mostly, tensors: one safetensors file, with the record, the piece's key and a digest of all that and
of the job in its metadata. It is written beside its name, synced and renamed, so it is whole or not there; one that was
damaged later is noticed, said, and computed again. The job itself is such a file too, written before any other. Times
are neither stored nor compared, but for what a job has spent that may take only so long.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cospadi.errors import UserError
from cospadi.files import sync_folder

log = logging.getLogger("cospadi")

JOB, LOCK, PIECES, SCRATCH, OUTPUT, REPLACED = "job.safetensors", "lock", "pieces", "scratch", "output", "replaced"
KNOWN = {JOB, f"{JOB}.tmp", LOCK, PIECES, SCRATCH, OUTPUT, REPLACED}
"""What a job directory may hold: a folder with anything else in it is somebody's own."""


@dataclass(frozen=True)
class Piece:
    """A finished piece.

    Attributes:
        record: what is to be known of it, as JSON has it.
        held: its tensors, in memory.
        path: its file.
    """

    record: dict[str, Any]
    held: Mapping[str, Tensor] | None = None
    path: Path | None = None

    def tensors(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Its tensors, on the CPU: all of them, or those of these names that it has, and no other is read."""
        if self.path is None:
            return {name: held for name, held in (self.held or {}).items() if names is None or name in names}
        return {name: tensor.clone() for name, tensor in _stored(self.path, names)}

    def row(self, name: str, index: int) -> Tensor:
        """One row of one of its tensors, on the CPU; no more is read."""
        if self.path is None:
            return (self.held or {})[name][index]
        with safe_open(self.path, framework="pt") as file:
            row: Tensor = file.get_slice(name)[index].clone()
        return row


class Ledger:
    """Pieces by their keys, in memory: nothing is left when the process ends."""

    folder: Path | None = None

    def __init__(self) -> None:
        self._pieces: dict[str, Piece] = {}

    def get(self, key: str) -> Piece | None:
        """A finished piece."""
        return self._pieces.get(key)

    def put(self, key: str, record: dict[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Piece:
        """Keep a finished piece."""
        self._pieces[key] = Piece(record, tensors)
        return self._pieces[key]

    def drop(self, prefix: str) -> None:
        """Forget pieces that are not needed any more."""
        for key in [key for key in self._pieces if key.startswith(prefix)]:
            del self._pieces[key]

    @property
    def scratch(self) -> Path | None:
        """A folder for what no later run needs."""
        return None if self.folder is None else self.folder / SCRATCH

    def close(self) -> None:
        """Let another process have it."""


class JobDirectory(Ledger):
    """Pieces by their keys, in a folder that one process at a time has.

    Args:
        folder: made if it is not there; its parent too.
        resume: None resumes a job of the same identity and refuses another; True says, too, where there is none;
            False starts anew.

    Raises:
        UserError: the folder is somebody's own, cannot be written, is in use, or its job cannot be read.
    """

    folder: Path

    def __init__(self, folder: Path, resume: bool | None = None) -> None:
        super().__init__()
        self.folder, self._resume = folder, resume
        strange = sorted({path.name for path in folder.iterdir()} - KNOWN) if folder.is_dir() else []
        if strange:
            raise UserError(
                f"{folder} would be the job directory, but holds {strange[0]}, which is not of this "
                "program. Move it, or write to another --output"
            )
        self._made = [parent for parent in folder.parents if not parent.exists()]
        self._lock = _lock(folder)
        self._identity: dict[str, Any] | None = None
        self._notes: dict[str, Any] = {}
        self._removed = False
        try:
            if resume is False:
                os.ftruncate(self._lock, 0)
                self._clear()
            elif self._has_ended() or not (folder / JOB).exists():
                self._clear()
            else:
                self._identity, self._notes = _read_job(folder / JOB)
            shutil.rmtree(folder / SCRATCH, ignore_errors=True)
        except BaseException:
            os.close(self._lock)
            raise

    def note(self, key: str) -> Any:
        """What an earlier run noted beside the job's identity, or None."""
        return self._notes.get(key)

    def begin(self, identity: dict[str, Any], notes: dict[str, Any], but: Sequence[str] = ()) -> bool:
        """Say which job this is; True where an unfinished one is resumed.

        Args:
            identity: everything that the job's bytes follow from: name -> JSON value.
            notes: kept beside it for a later run, not compared.
            but: names in the identity that may differ.

        Raises:
            UserError: the folder holds another job.
        """
        identity = json.loads(json.dumps(identity))
        if self._identity is not None:
            for name in sorted((set(identity) | set(self._identity)) - set(but)):
                there, here = self._identity.get(name), identity.get(name)
                if there != here:
                    raise UserError(
                        f"{self.folder} holds an unfinished job with {difference(name, there, here)}. Ask for the "
                        "same again to resume it, or pass --no-resume to restart"
                    )
            return True
        if self._resume:
            log.info("there is no unfinished job in %s: a new one begins", self.folder)
        _write(self.folder / JOB, JOB, {"identity": identity, "notes": notes}, {}, None)
        self._identity, self._notes = identity, notes
        return False

    def get(self, key: str) -> Piece | None:
        """A finished piece whose file is as it was written; one that is not is removed, with a warning."""
        path = self._path(key)
        if key not in self._pieces and path.exists():
            record = _read(path, key, self._identity)
            if record is None:
                log.warning("%s is not as it was written: computed again", path)
                path.unlink(missing_ok=True)
            else:
                self._pieces[key] = Piece(record, None, path)
        return self._pieces.get(key)

    def put(self, key: str, record: dict[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Piece:
        """Write a finished piece."""
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        record = _write(path, key, record, tensors or {}, self._identity)
        self._pieces[key] = Piece(record, None, path)
        return self._pieces[key]

    def drop(self, prefix: str) -> None:
        """Forget pieces that are not needed any more, and remove their files."""
        super().drop(prefix)
        for path in self._files():
            if path.name.startswith(quote(prefix, safe="")):
                path.unlink(missing_ok=True)

    def kept_bytes(self) -> int:
        """Bytes of what is finished."""
        kept = (path for path in self.folder.rglob("*") if path.is_file() and self.folder / SCRATCH not in path.parents)
        return sum(path.stat().st_size for path in kept)

    def remove(self) -> None:
        """Delete the folder: the job is done, and until the folder is gone, its lock says so."""
        written = self.get("written")
        if written is not None:
            end = {"identity": self._identity, "notes": self._notes, "written": written.record}
            os.pwrite(self._lock, json.dumps(end).encode(), 0)
        self._removed = True
        self._clear()
        with suppress(OSError):  # somebody put something there meanwhile
            (self.folder / LOCK).unlink()
            self.folder.rmdir()

    def close(self) -> None:
        """Let another process have it; where nothing was finished that takes time, nothing is left."""
        if not self._removed and set(self._files()) <= {self._path("text")}:
            self.remove()
            for parent in self._made:
                with suppress(OSError):
                    parent.rmdir()
        with suppress(OSError):
            os.close(self._lock)

    def _has_ended(self) -> bool:
        """Whether the lock tells of a job that was stopped while its folder was being deleted, which is then known."""
        try:
            end = json.loads(os.pread(self._lock, os.fstat(self._lock).st_size, 0))
            self._identity, self._notes = end["identity"], end["notes"]
            self._pieces["written"] = Piece(end["written"])
        except (ValueError, KeyError, TypeError):
            return False
        return True

    def _path(self, key: str) -> Path:
        return self.folder / PIECES / f"{quote(key, safe='')}.safetensors"

    def _files(self) -> list[Path]:
        return list((self.folder / PIECES).glob("*.safetensors"))

    def _clear(self) -> None:
        """Remove everything but the lock."""
        for path in self.folder.iterdir():
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _stored(path: Path, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file, all or some, by name, one at a time; they are gone when the file is."""
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            if names is None or name in names:
                yield name, file.get_tensor(name)


def _digest(key: str, record: str, tensors: Iterator[tuple[str, Tensor]], job: dict[str, Any] | None) -> str:
    """Of all that a piece is, and of the job that it belongs to. Tensors in the order of their names."""
    digest = hashlib.sha256(json.dumps([key, record, job], sort_keys=True).encode())
    for name, tensor in tensors:
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(
    path: Path, key: str, record: dict[str, Any], tensors: Mapping[str, Tensor], job: dict[str, Any] | None
) -> dict[str, Any]:
    """Write a piece, wholly or not at all; its record as JSON has it."""
    tensors = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    text = json.dumps(record, sort_keys=True)
    metadata = {"key": key, "record": text, "sha256": _digest(key, text, iter(tensors.items()), job)}
    staging = path.with_name(f"{path.name}.tmp")
    try:
        save_file(tensors, staging, metadata)
        with staging.open("rb") as stream:
            os.fsync(stream.fileno())
        staging.replace(path)
        try:
            sync_folder(path.parent)
        except OSError:
            path.unlink(missing_ok=True)
            raise
    finally:
        staging.unlink(missing_ok=True)
    return dict(json.loads(text))


def _read(path: Path, key: str, job: dict[str, Any] | None) -> dict[str, Any] | None:
    """A piece's record, if its file is as it was written, for this key and this job."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        right = _digest(key, metadata["record"], _stored(path), job) == metadata["sha256"]
        return dict(json.loads(metadata["record"])) if right else None
    except Exception:  # there are many ways to be damaged
        return None


def _read_job(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """An unfinished job's identity and notes."""
    job = _read(path, JOB, None)
    if job is None:
        raise UserError(
            f"{path} cannot be read, or is not as this version of cospadi wrote it. Pass --no-resume to restart"
        )
    return job["identity"], job["notes"]


def _lock(folder: Path) -> int:
    """An open file that only one process at a time has; the system lets go of it when that process ends."""
    import fcntl

    tries = itertools.count(1)
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and next(tries) < 100:
                continue  # removed in between by the process that has just finished
            raise UserError(f"the job directory {folder} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), (folder / LOCK).stat()):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise UserError(
                f"another cospadi is running in {folder}. Wait for it, or write to another --output"
            ) from None
        except FileNotFoundError:
            pass
        os.close(handle)


def difference(name: str, there: object, here: object) -> str:
    """What is different between two jobs, for reading."""
    if isinstance(there, dict) and isinstance(here, dict):
        first = next(key for key in sorted(set(there) | set(here)) if there.get(key) != here.get(key))
        return difference(first if name == "recipe" else f"{name} {first}", there.get(first), here.get(first))
    short = [f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else value for value in (there, here)]
    return f"{name.replace('_', ' ')} {short[0]}, not {short[1]}"
