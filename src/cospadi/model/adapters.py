"""PEFT adapters in a model's folder: seen before anything is loaded, since transformers would merge or ignore them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from cospadi.errors import UserError
from cospadi.files import read_json
from cospadi.format import safetensors
from cospadi.format.manifest import MANIFEST
from cospadi.format.safetensors import ADAPTER

CONFIG = "adapter_config.json"
WEIGHTS = f"{ADAPTER}.safetensors"


def has_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, alone or beside a model."""
    return any((folder / name).exists() for name in (CONFIG, WEIGHTS, f"{ADAPTER}.bin"))


def has_model(folder: Path) -> bool:
    """Whether a folder holds a whole model."""
    return (folder / "config.json").is_file() and bool(safetensors.weight_files(folder))


def check(folder: Path, merge: bool) -> None:
    """Refuse a folder with an adapter, or, where one is to be merged, a folder without.

    Raises:
        UserError: it is so.
    """
    if not has_adapter(folder):
        if merge:
            raise UserError(f"{folder} holds no PEFT adapter ({CONFIG}, {WEIGHTS}). Leave --merge-adapter out")
        return
    if merge:
        base = None
        with suppress(UserError):  # which is told where the adapter is merged
            base = base_of(folder)[0]
        if base is not None and _is_compressed(base):
            raise UserError(
                f"the base of the adapter in {folder}, {base}, is a compressed model, whose stored values nothing can "
                "be merged into. Make it dense (dequantize), merge there, save, and compress that"
            )
        return
    first = "or merge it first (merge_and_unload of peft, then save_pretrained)"
    if has_model(folder):
        raise UserError(
            f"{folder} holds a PEFT adapter ({CONFIG}) beside a whole model: which of them is meant? Give compress or "
            f"plan --merge-adapter for both, {first}, or move the adapter's files elsewhere"
        )
    try:
        base = base_of(folder)[0]
    except UserError as error:
        raise UserError(f"{folder} is a PEFT adapter and no whole model, and {error}. Name it there, {first}") from None
    if _is_compressed(base):
        raise UserError(
            f"{folder} is a PEFT adapter of {base}, a compressed model, whose stored values nothing can be merged "
            "into. Load it with PeftModel.from_pretrained; or make the model dense (dequantize), merge there and save"
        )
    raise UserError(
        f"{folder} is a PEFT adapter of {base}, and no whole model. Compress both merged with --merge-adapter, {first}"
    )


def _is_compressed(base: Path | str) -> bool:
    return (Path(base) / MANIFEST).is_file()


def base_of(folder: Path) -> tuple[Path | str, str | None]:
    """What an adapter is merged into: the model beside it, else the one that its configuration names, and a revision.

    Raises:
        UserError: it names none.
    """
    if has_model(folder):
        return folder, None
    config = read_json(folder / CONFIG)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name:
        raise UserError(f"{folder / CONFIG} names no base model (base_model_name_or_path)")
    return name, revision if isinstance(revision, str) and not Path(name).exists() else None
