"""Files and folders: names that can be, JSON, outputs that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cospadi.errors import CheckpointError, UserError, first_line


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
