"""Files and folders: names that can be, JSON, outputs that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cospadi.errors import CheckpointError, UserError, first_line

log = logging.getLogger("cospadi")


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


def beside(folder: Path, name: str) -> Path:
    """A file of a model's folder, there or not. Into a folder of the hub's cache it is fetched from
    the commit that the folder is of, or a warning tells that it could not be.
    """
    path, repository = folder / name, folder.parent.parent
    if path.exists() or folder.parent.name != "snapshots" or not repository.name.startswith("models--"):
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repo = repository.name.removeprefix("models--").replace("--", "/")
    try:
        hf_hub_download(repo, name, revision=folder.name, cache_dir=repository.parent)
    except Exception as error:  # many kinds: no network, no access; or there is no such file, as is well
        if not isinstance(error, EntryNotFoundError) or isinstance(error, LocalEntryNotFoundError):
            log.warning("%s of %s cannot be fetched, and is done without (%s)", name, repo, first_line(error))
    return path


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
    """Refuse an output folder that holds something, or that cannot be written, before anything is computed."""
    check_name(output, "output")
    try:
        os.path.realpath(output).encode()
    except UnicodeEncodeError:
        raise UserError(f"output {output} cannot be written: safetensors takes only paths that are UTF-8") from None
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file. Name a folder")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise UserError(f"output folder {output} is not empty. Name another, or pass --overwrite to replace it")
    check_replaceable(output)
    parent = nearest_folder(output)
    if not parent.is_dir():
        raise UserError(f"output {output} cannot be written: {parent} is a file")
    if not os.access(parent, os.W_OK):
        raise UserError(f"output {output} cannot be written: no permission in {parent}")


def check_replaceable(output: Path) -> None:
    """Refuse an output folder that cannot be replaced whole without taking what nobody means to give."""
    kept = dict.fromkeys(_homes(), "a home folder") | {Path.cwd(): "the current folder"}
    around = next((place for place in kept if lies_in(place, output)), None)
    if around is None:
        kept = dict.fromkeys(_mount_points(), "a mount point")
        real = Path(os.path.realpath(output))  # as mount points are; one whose server is gone is better not looked at
        around = next((place for place in kept if place.is_relative_to(real)), None)
        if around is None and output.is_mount():
            kept, around = {real: "a mount point"}, real
    if around is not None:
        place = kept[around] if lies_in(output, around) else f"around {around}, {kept[around]}"
        raise UserError(f"output {output} is {place}, which cannot be replaced whole. Name a folder inside it")


def check_apart(output: Path, inputs: Mapping[Path, str], what: str = "output") -> None:
    """Refuse to write where a job reads: an output that is, holds or lies in one of its inputs, through links too.

    Args:
        inputs: folder or file -> what it is, for messages.
        what: the output is, for messages.
    """
    for path, name in inputs.items():
        reached = [path, *_on_the_way(path)]
        if path.is_dir():  # its files may be links to where the bytes are
            links = [entry for entry in path.iterdir() if entry.is_symlink()]
            reached += [*links, *(place for link in links for place in _on_the_way(link))]
        for one in reached:
            if lies_in(one, output):
                same = one == path and lies_in(output, path)
                raise UserError(
                    f"{what} {output} {'is' if same else 'holds'} {name}, {one if same else path}, which the job reads "
                    "and would replace. Name another place"
                )
        if not path.is_file() and lies_in(output, path):  # a folder, be it there yet or not
            raise UserError(f"{what} {output} lies in {name}, {path}, which the job reads. Name another place")


def _on_the_way(path: Path) -> list[Path]:
    """The folders in which a link's links lie, one after the other, if it is one that leads to others."""
    found: list[Path] = []
    while path.is_symlink() and len(found) < 40:  # as many as a system follows
        path = path.parent / path.readlink()
        found.append(path.parent)
    return found


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a path is a folder, or is anywhere inside it, once all links are followed; neither need exist."""
    path, folder = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if path.is_relative_to(folder):
        return True
    try:
        there = folder.stat()
    except OSError:
        return False
    for one in (path, *path.parents):  # one folder may have several names: where letter case means nothing, say
        with suppress(OSError):
            if os.path.samestat(one.stat(), there):
                return True
    return False


def _homes() -> set[Path]:
    """The user's home folder, by the environment and by the system's list of users."""
    homes = set()
    with suppress(RuntimeError):
        homes.add(Path.home())
    with suppress(ImportError, KeyError):  # no such list, or nobody's process
        import pwd

        homes.add(Path(pwd.getpwuid(os.getuid()).pw_dir))
    return homes


def _mount_points() -> list[Path]:
    """Folders that other file systems are mounted on, where the system lists them."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    return [Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[1])) for line in lines]


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


def file_digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside its name, then rename it: it is there whole or not at all."""
    staging = path.with_name(f".{os.fsdecode(os.fsencode(path.name)[:200])}.new")
    try:
        with staging.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
