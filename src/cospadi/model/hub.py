"""The hub: models fetched from it, folders uploaded to it, its cache on this machine, and a sentence for whatever goes
wrong. Retries, resumed downloads, tokens and offline mode are huggingface_hub's own."""

from __future__ import annotations

import errno
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cospadi import files
from cospadi.__about__ import __version__
from cospadi.errors import UserError, first_line
from cospadi.format import card
from cospadi.model import companions

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger("cospadi")

WEIGHTS = (".safetensors", ".safetensors.index.json")
"""How the names of weights end, and of the list of their files."""
SECOND_COPIES = ("consolidated*", "original/*")
"""Some models carry a second copy of their weights, which transformers does not read."""

LONGEST_REASON = 400
LOG_IN = "log in (`hf auth login`) or set HF_TOKEN"

NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR)
"""What a system says of a folder that cannot be made or written."""


def split_name(name: str | Path) -> tuple[str, str | None]:
    """NAME or NAME@REVISION -> the repository's name, and a branch, tag or commit if there is one."""
    repo, at, revision = str(name).partition("@")
    return repo, revision if at else None


def is_path(name: str | Path) -> bool:
    """Whether a name can only be a path on this machine, there or not."""
    return str(name).startswith((".", "/", "~")) or split_name(name)[0].count("/") > 1


def model_cache(name: str) -> Path:
    """The folder in the hub's cache that holds, or would hold, all revisions of a model."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{split_name(name)[0].replace('/', '--')}"


def fetch(name: str, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of a hub model in the cache, downloaded as far as it is not there.

    Args:
        name: NAME or NAME@REVISION.
        revision: branch, tag or commit, for a name without one.
        weights: its safetensors files, too.

    Raises:
        UserError: no such model, no access, no network and not in the cache.
    """
    import huggingface_hub

    repo, own = split_name(name)
    if own == "":
        raise UserError(
            f"model {name} names no revision after its @. Name a branch, a tag or a commit, or leave it out"
        )
    if own is not None and revision is not None:
        raise UserError(f"model {name} and revision {revision} name two revisions. Give one of them")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=own or revision,
                allow_patterns=[*companions.COMPANIONS, *(["*.safetensors"] if weights else [])],
                ignore_patterns=list(SECOND_COPIES),
            )
        )
    except Exception as error:  # many kinds: no network, no such repository, no access, a bad name
        if trouble := cache_trouble(error):
            raise UserError(f"model {name} cannot be fetched: {trouble}") from None
        why = reason(error, repo, own or revision)
        raise UserError(f"model {name} is neither a local folder nor to be had from the hub: {why}") from None


def folder_of(name: str | Path) -> Path:
    """The folder of a checkpoint, local or from the hub, whatever it holds.

    Raises:
        UserError: as of `fetch`.
    """
    path = files.local_path(name, "model")
    return path if path.exists() or is_path(name) else fetch(str(name))


@dataclass(frozen=True)
class Pushed:
    """What an upload has made.

    Attributes:
        repo: the repository's full name.
        commit: the hash by which the model can be loaded for ever.
        url: where the commit is shown.
    """

    repo: str
    commit: str
    url: str


def claim(repo: str, private: bool | None = None, token: str | bool | None = None) -> str:
    """Make sure that a repository can be written to, before anything long begins; it is made where there is none.

    Args:
        private: it has to be; None leaves that of a new one to its owner's settings.
        token: None is that of HF_TOKEN or of `hf auth login`.

    Returns:
        Its full name, with its owner.
    Raises:
        UserError: a name that cannot be, no token or one that may not write there, no network.
    """
    from huggingface_hub import CommitOperationAdd

    api = _api(token)
    with _told(f"{repo} cannot be written to on the hub", repo):
        full: str = api.create_repo(repo, private=private, exist_ok=True).repo_id
        if private and not api.repo_info(full).private:
            raise UserError(f"{full} is on the hub already, and public. Make it private there, or name another")
        # An upload's first request, which the hub refuses to those who may not write. (Small files: none is sent.)
        api.preupload_lfs_files(full, [CommitOperationAdd("cospadi.json", b"{}")])
    return full


def upload(
    folder: Path,
    repo: str,
    commit_message: str | None = None,
    commit_description: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> Pushed:
    """Upload a folder as one commit; what an interrupted upload has left at the hub is not sent again.

    The card names the repository. Weights that the repository has and the folder has not are deleted, since they would
    be read in place of these; they stay in its history.

    Args:
        repo: one that is there, as of `claim`.
        revision: the branch to commit to, made if there is none; None is main.
        create_pr: commit to a new pull request instead.

    Raises:
        UserError: the upload failed; nothing was committed.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api, name = _api(token), repo.rpartition("/")[2]
    paths = {path.relative_to(folder).as_posix(): path for path in _visible(folder)}
    adding: list[Any] = [CommitOperationAdd(inside, path) for inside, path in paths.items() if inside != card.CARD]
    if card.CARD in paths:
        text = card.naming(card.read(paths[card.CARD]), repo)
        adding.append(CommitOperationAdd(card.CARD, text.encode()))
    log.info(
        "uploading %d files, %.1f MB, to %s", len(paths), sum(p.stat().st_size for p in paths.values()) / 1e6, repo
    )
    with _told(f"{folder} is not uploaded to {repo}", repo, revision):
        if revision is not None and not create_pr:
            api.create_branch(repo, branch=revision, exist_ok=True)
        there = api.list_repo_files(repo, revision=None if create_pr else revision)
        stale = [file for file in there if file not in paths and "/" not in file and file.endswith(WEIGHTS)]
        if stale:
            log.warning(
                "%s of %s, which the folder has not, are deleted; its history keeps them", ", ".join(stale), repo
            )
        done = api.create_commit(
            repo,
            [*adding, *map(CommitOperationDelete, stale)],
            commit_message=commit_message or f"Upload {name}, compressed with CoSpaDi",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
    return Pushed(repo, str(done.oid), str(done.pr_url or done.commit_url))


def _api(token: str | bool | None = None) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="cospadi", library_version=__version__)


def _visible(folder: Path) -> Sequence[Path]:
    """A folder's files, but for hidden ones and those in hidden folders, such as a download's notes."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


@contextmanager
def _told(doing: str, repo: str, revision: str | None = None) -> Iterator[None]:
    """Turn whatever the hub's library raises into a sentence that begins with what was not done."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # its own kinds, those of its HTTP library, and those of its storage's
        raise UserError(f"{doing}: {reason(error, repo, revision)}") from None


def reason(error: BaseException, repo: str, revision: str | None = None) -> str:
    """What went wrong at the hub, from whatever its library raised, and what to do: a sentence without its stop."""
    from huggingface_hub import constants, errors, get_token

    url = f"{constants.ENDPOINT}/{repo}"
    seen: BaseException | None = error
    while seen is not None:
        status = getattr(getattr(seen, "response", None), "status_code", None)
        if isinstance(seen, errors.OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE switches the hub off. Unset it where there is a network"
        if isinstance(seen, errors.GatedRepoError):
            return f"it is gated. Ask for access at {url}, then {LOG_IN}"
        if isinstance(seen, errors.RevisionNotFoundError):
            known = f"{url}/tree/main shows its branches and tags; a commit is named by its whole hash"
            return f"it has no revision {revision or 'main'}. {known}"
        if isinstance(seen, errors.RepositoryNotFoundError):
            return f"there is no {url}, or it is private. Check the name; if it is private, {LOG_IN}"
        if status == 401 or isinstance(seen, errors.LocalTokenNotFoundError):
            told = "does not know this token" if get_token() else "asks who you are, and there is no token"
            return f"the hub {told}. To go on, {LOG_IN}"
        if status == 403:
            return f"this token may not do that ({_server_said(seen)}). For one that may, {LOG_IN}"
        if status is not None:
            again = "Try again later" if status >= 500 or status == 429 else "Check what is asked for"
            return f"the hub answers {status} ({_server_said(seen)}). {again}"
        if type(seen).__module__.partition(".")[0].startswith("httpx") or isinstance(seen, ConnectionError):
            return f"{constants.ENDPOINT} cannot be reached ({first_line(seen)}). Check the network, and try again"
        seen = seen.__cause__ or seen.__context__
    told = " ".join(str(error).split()).rstrip(".")
    return f"{told[:LONGEST_REASON]} ..." if len(told) > LONGEST_REASON else told or type(error).__name__


def _server_said(error: BaseException) -> str:
    """The server's own words, else the first line of the library's."""
    return str(getattr(error, "server_message", None) or first_line(error)).strip().rstrip(".").replace("\n", " ")


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
