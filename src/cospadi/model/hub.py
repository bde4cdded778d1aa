"""The hub's cache on this machine: where it is, and what to say where it cannot be used."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR)
"""What a system says of a folder that cannot be made or written."""


def model_cache(name: str) -> Path:
    """The folder in the hub's cache that holds, or would hold, all revisions of a model."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"


def cache_trouble(error: BaseException) -> str | None:
    """A sentence, without its stop, on a cache folder that cannot be written, where an error comes from that."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in NOT_WRITABLE and isinstance(seen.filename, (str, os.PathLike)):
            path = Path(seen.filename).absolute()
            for variable, folder in _caches().items():
                if (path.is_relative_to(folder) or folder.is_relative_to(path)) and (reason := _why_not(folder)):
                    return f"the cache folder {folder} cannot be written ({reason}). Set {variable} to one that can"
        seen = seen.__cause__ or seen.__context__
    return None


def _caches() -> dict[str, Path]:
    """The variable that says where a cache is -> the folder; HF_HOME is around those that are not set."""
    from huggingface_hub import constants

    known = {name: os.environ[name] for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE") if os.environ.get(name)}
    return {name: Path(folder).absolute() for name, folder in (known | {"HF_HOME": constants.HF_HOME}).items()}


def _why_not(folder: Path) -> str | None:
    """Why nothing can be written to a folder; None where it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror
