"""A small trained Llama-architecture model and a text source that need no network.

The model lives in ``model/`` beside this file (see its ``README.md``).  It was trained on the sources of the Python
standard library, which every ordinary Python installation carries, so the same text can be read again for
calibration (``stdlib_documents("train")``) and for evaluation (``stdlib_documents("heldout")``).
"""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path
from typing import Literal

__all__ = ["HELD_OUT", "model_path", "stdlib_documents"]

#: Standard-library modules the demo model never saw, nor their tests.
HELD_OUT: tuple[str, ...] = (
    "argparse",
    "configparser",
    "csv",
    "difflib",
    "fractions",
    "heapq",
    "ipaddress",
    "mailbox",
    "optparse",
    "shlex",
    "smtplib",
    "statistics",
    "tarfile",
    "textwrap",
)

_HELD_OUT_FILES = frozenset(f"{name}.py" for name in HELD_OUT)
_HELD_OUT_TESTS = tuple(f"test_{name}" for name in HELD_OUT)
# Installed packages, build output, and generated tables (code pages, help topics): not standard-library prose or code.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "lib2to3/tests/data"}
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")


def model_path() -> Path:
    """Return the folder that holds the demo model and its tokenizer."""
    return Path(__file__).resolve().parent / "model"


def stdlib_documents(split: Literal["train", "heldout"]) -> list[str]:
    """Return the standard library's Python sources, one document a file, sorted by path.

    ``"heldout"`` gives the modules in :data:`HELD_OUT`; ``"train"`` gives everything else, without their tests.
    The text is that of the running Python, so figures measured on it differ a little between Python versions.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', not {split!r}")
    root = Path(sysconfig.get_path("stdlib"))
    paths = [name for name in _source_files(root) if (name in _HELD_OUT_FILES) == (split == "heldout")]
    documents = [text for name in paths if (text := _read(root / name))]
    if not documents:
        raise FileNotFoundError(
            f"no Python sources of the standard library found in {root}: a frozen or zipped Python carries none; "
            "use a regular Python installation, or supply your own text"
        )
    return documents


def _source_files(root: Path) -> list[str]:
    """Relative POSIX paths of the usable ``.py`` files below ``root``, sorted, without the held-out modules' tests."""
    found = []
    for folder, subfolders, files in os.walk(root):
        base = Path(folder).relative_to(root)
        subfolders[:] = [
            name
            for name in subfolders
            if not {name, (base / name).as_posix()} & _SKIPPED_FOLDERS
            and not name.startswith(_SKIPPED_PREFIXES + _HELD_OUT_TESTS)
        ]
        found += [
            (base / name).as_posix()
            for name in files
            if name.endswith(".py") and not name.startswith(_SKIPPED_PREFIXES + _HELD_OUT_TESTS)
        ]
    return sorted(found)


def _read(path: Path) -> str:
    """Return the file's text, or an empty string where it is blank, unreadable or not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    return text if text.strip() else ""
