"""The job directory: every finished piece of a long job, once and whole, so that a job that died goes on.

A job is a sequence of pieces, each computed from the ones before it and from what identifies the job. A piece is a
record (JSON) and, mostly, tensors in a file of its own. The ledger is a file of lines: the first says which job this
is, each other one that a piece is finished, with the sha256 of its file. A piece is written beside its name, synced and
renamed before its line is, so a line never promises what is not there; a line or a piece that was damaged later is
noticed, said, and computed again. No times are stored or compared.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cospadi.errors import UserError
from cospadi.files import sync_folder

log = logging.getLogger("cospadi")

VERSION = 1
NAME, LOCK, PIECES, SCRATCH, OUTPUT, REPLACED = "ledger.jsonl", "lock", "pieces", "scratch", "output", "replaced"
KNOWN = {NAME, f"{NAME}.tmp", LOCK, PIECES, SCRATCH, OUTPUT, REPLACED}
"""What a job directory may hold: a folder with anything else in it is somebody's own."""


@dataclass(frozen=True)
class Piece:
    """A finished piece.

    Attributes:
        record: what is to be known of it, as JSON has it.
        held: its tensors, in memory.
        path: the file of its tensors.
    """

    record: dict[str, Any]
    held: Mapping[str, Tensor] | None = None
    path: Path | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, on the CPU."""
        if self.path is None:
            return dict(self.held or {})
        with safe_open(self.path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


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
        """Forget pieces that have done their work."""
        for key in [key for key in self._pieces if key.startswith(prefix)]:
            del self._pieces[key]

    @property
    def scratch(self) -> Path | None:
        """A folder for what no later run needs."""
        return None if self.folder is None else self.folder / SCRATCH

    def close(self) -> None:
        """Let another process have it."""


class JobDirectory(Ledger):
    """Pieces by their keys, in a folder that one process at a time works in.

    Args:
        folder: made if it is not there; its parent too.
        resume: None goes on with a job of the same identity and refuses another; True says, too, where there is none;
            False begins anew.
    """

    def __init__(self, folder: Path, resume: bool | None = None) -> None:
        super().__init__()
        self.folder, self._resume = folder, resume
        strange = sorted({path.name for path in folder.iterdir()} - KNOWN) if folder.is_dir() else []
        if strange:
            raise UserError(
                f"{folder} is where unfinished work would be kept, but holds {strange[0]}, which is not of this "
                "program. Move it, or write to another --output"
            )
        self._made = [parent for parent in folder.parents if not parent.exists()]
        self._lock = _lock(folder)
        self._used: set[str] = set()
        self._identity: dict[str, Any] | None = None
        self._notes: dict[str, Any] = {}
        try:
            if resume is False:
                self._clear()
            self._read()
            shutil.rmtree(folder / SCRATCH, ignore_errors=True)
        except BaseException:
            os.close(self._lock)
            raise

    def note(self, key: str) -> Any:
        """What an earlier run noted beside the job's identity, or None."""
        return self._notes.get(key)

    def begin(self, identity: dict[str, Any], notes: dict[str, Any], but: Sequence[str] = ()) -> bool:
        """Say which job this is; True where an unfinished one goes on.

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
                        f"{self.folder} holds an unfinished job with {_difference(name, there, here)}. Ask for the "
                        "same again to go on with it, or pass --no-resume to begin anew"
                    )
            return True
        assert self.folder is not None
        if self._resume:
            log.info("there is no unfinished job in %s: a new one begins", self.folder)
        (self.folder / PIECES).mkdir(exist_ok=True)
        _write_whole(self.folder / NAME, _line({"cospadi_job": VERSION, "identity": identity, "notes": notes}))
        self._identity, self._notes = identity, notes
        return False

    def get(self, key: str) -> Piece | None:
        """A finished piece whose file is as it was written; one that is not is forgotten, with a warning."""
        piece = self._pieces.get(key)
        if piece is None or piece.path is None or key in self._used:
            return piece
        try:
            with piece.path.open("rb") as stream:
                right = hashlib.file_digest(stream, "sha256").hexdigest() == piece.record["sha256"]
        except OSError:
            right = False
        if not right:
            log.warning("%s is not as it was written: computed again", piece.path)
            del self._pieces[key]
            return None
        self._used.add(key)
        return piece

    def put(self, key: str, record: dict[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Piece:
        """Write a finished piece and the line that says so."""
        assert self.folder is not None
        record = json.loads(json.dumps(record))
        path = None
        if tensors is not None:
            path = self.folder / PIECES / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
            path.parent.mkdir(exist_ok=True)
            staging = path.with_suffix(".tmp")
            try:
                save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, staging)
                with staging.open("rb") as stream:
                    record = record | {"sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
                    os.fsync(stream.fileno())
                staging.replace(path)
            finally:
                staging.unlink(missing_ok=True)
            sync_folder(path.parent)
        self._append({"piece": key, "file": path.name if path else None, "record": record})
        self._pieces[key] = Piece(record, None, path)
        self._used.add(key)
        return self._pieces[key]

    def drop(self, prefix: str) -> None:
        """Forget pieces that have done their work, and remove their files."""
        gone = {key: piece for key, piece in self._pieces.items() if key.startswith(prefix)}
        if gone:
            self._append({"dropped": prefix})
        for key, piece in gone.items():
            del self._pieces[key]
            if piece.path is not None:
                piece.path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the folder: the job is done."""
        assert self.folder is not None
        self._clear()
        with suppress(OSError):  # somebody put something there meanwhile
            (self.folder / LOCK).unlink()
            self.folder.rmdir()

    def close(self) -> None:
        """Let another process have it; where nothing was finished that takes time, nothing is left."""
        assert self.folder is not None
        if self.folder.exists() and set(self._pieces) <= {"text"}:
            self.remove()
            for parent in self._made:
                with suppress(OSError):
                    parent.rmdir()
        with suppress(OSError):
            os.close(self._lock)

    def _append(self, entry: dict[str, Any]) -> None:
        assert self.folder is not None
        with (self.folder / NAME).open("ab") as stream:
            before = stream.tell()
            try:
                stream.write(_line(entry))
                stream.flush()
                os.fsync(stream.fileno())
            except OSError:
                with suppress(OSError):
                    stream.truncate(before)
                raise

    def _read(self) -> None:
        assert self.folder is not None
        path = self.folder / NAME
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            self._clear()
            return
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}. Pass --no-resume to begin anew") from None
        lines = content.split(b"\n")
        torn = lines.pop()  # what a write that was cut short has left; whole lines end in a line feed
        head = _parse(lines[0]) if lines else None
        if head is None or head.get("cospadi_job") != VERSION or not isinstance(head.get("identity"), dict):
            raise UserError(
                f"{path} is not a ledger that this version of cospadi wrote, or it is damaged. "
                "Pass --no-resume to begin anew"
            )
        self._identity = head["identity"]
        self._notes = head["notes"] if isinstance(head.get("notes"), dict) else {}
        damaged = 0
        for line in lines[1:]:
            entry = _parse(line)
            if entry is None:
                damaged += 1
            elif isinstance(entry.get("dropped"), str):
                for key in [key for key in self._pieces if key.startswith(entry["dropped"])]:
                    del self._pieces[key]
            elif isinstance(entry.get("piece"), str) and isinstance(entry.get("record"), dict):
                name = entry.get("file")
                inside = isinstance(name, str) and Path(name).name == name
                self._pieces[entry["piece"]] = Piece(
                    entry["record"], None, self.folder / PIECES / name if isinstance(name, str) and inside else None
                )
        if damaged:
            log.warning("%s has %d damaged lines: what they stood for is computed again", path, damaged)
        if torn:
            with path.open("r+b") as stream:
                stream.truncate(len(content) - len(torn))

    def _clear(self) -> None:
        """Remove everything but the lock."""
        assert self.folder is not None
        for path in self.folder.iterdir():
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def read_tensors(piece: Piece, names: set[str]) -> dict[str, Tensor]:
    """A piece's tensors, refused where they are others than `names`.

    Raises:
        UserError: it is no file of those tensors.
    """
    try:
        tensors = piece.tensors()
    except (SafetensorError, OSError) as error:
        raise UserError(f"{piece.path} cannot be read: {error}. Pass --no-resume to begin anew") from None
    if set(tensors) != names:
        raise UserError(f"{piece.path} does not hold what its ledger says. Pass --no-resume to begin anew")
    return tensors


def _lock(folder: Path) -> int:
    """An open file that only one process at a time has; the system lets go of it when that process ends."""
    import fcntl

    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # removed in between by the process that has just finished
            continue
        except OSError as error:
            raise UserError(f"{folder}, where unfinished work is kept, cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), (folder / LOCK).stat()):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise UserError(
                f"another cospadi is at work in {folder}. Wait for it, or write to another --output"
            ) from None
        except FileNotFoundError:
            pass
        os.close(handle)


def _line(entry: dict[str, Any]) -> bytes:
    text = json.dumps(entry, sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:16]} {text}\n".encode()


def _parse(line: bytes) -> dict[str, Any] | None:
    check, _, text = line.partition(b" ")
    if hashlib.sha256(text).hexdigest()[:16].encode() != check:
        return None
    try:
        entry = json.loads(text)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _write_whole(path: Path, content: bytes) -> None:
    staging = path.with_name(path.name + ".tmp")
    try:
        with staging.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)
    sync_folder(path.parent)


def _difference(name: str, there: object, here: object) -> str:
    """What is different between two jobs, for reading."""
    if isinstance(there, dict) and isinstance(here, dict):
        first = next(key for key in sorted(set(there) | set(here)) if there.get(key) != here.get(key))
        return _difference(first if name == "recipe" else f"{name} {first}", there.get(first), here.get(first))
    short = [f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else value for value in (there, here)]
    return f"{name.replace('_', ' ')} {short[0]}, not {short[1]}"
