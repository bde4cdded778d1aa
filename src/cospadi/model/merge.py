"""An adapter merged into its base, as a model folder like any other."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cospadi import compat
from cospadi.errors import UserError, first_line
from cospadi.format import safetensors
from cospadi.model import adapters, companions, load


def merge_adapter(folder: Path, into: Path, text_only: bool = False) -> Path:
    """Write the dense model that an adapter and its base are together; the model is in memory whole meanwhile.

    Args:
        folder: holds the adapter, alone or beside its base.
        into: a folder for the merged model, made here; and for what is needed on the way.
        text_only: without what the base's text-only class does not know.

    Returns:
        The folder of the merged model. Its tokenizer and companions are the adapter's where that has them.

    Raises:
        UserError: no peft, no base that can be compressed, or an adapter that does not fit it.
    """
    try:
        import peft
    except ImportError:
        raise UserError(
            f'merging the adapter in {folder} needs peft, which is not installed: pip install "cospadi[peft]"'
        ) from None
    if not (folder / adapters.WEIGHTS).is_file():
        raise UserError(f"{folder} has no {adapters.WEIGHTS}. Pickled adapters are never loaded: save it again")
    base = load.resolve_base(folder)
    if base == folder:
        base = _without_adapter(folder, into / "base")
    load.load_config(base)
    unknown = load.load_skeleton(base, text_only=text_only).unknown
    model: Any = load.load_model(base, torch.device("cpu"), text_only)
    tied = compat.tied_weights(model)
    shared = {name.removesuffix(".weight") for name in (*tied, *tied.values())}
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            wrapped = peft.PeftModel.from_pretrained(model, str(folder))
        for name, module in model.named_modules():
            if name in shared and hasattr(module, "merge"):  # peft's layer, and not its whole copy (modules_to_save)
                raise UserError(
                    f"the adapter in {folder} changes {name}, whose weight another layer of its base shares, and would "
                    "change in both. Merge it into a model whose tie_word_embeddings is false"
                )
        for warning in said:
            if "missing adapter keys" in str(warning.message):
                raise ValueError(f"{warning.message!s:.300}")
        _check_all_is_used(folder, wrapped, peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft warns of is looked at here
            model = wrapped.merge_and_unload(safe_merge=True)
    except UserError:
        raise
    except Exception as error:  # peft raises many kinds where an adapter is not made for a model, or cannot be merged
        raise UserError(
            f"the adapter in {folder} cannot be merged into {adapters.base_of(folder)[0]}: {first_line(error)}"
        ) from None
    merged = into / "merged"
    merged.mkdir(parents=True)
    _write(model, merged, {} if text_only else unknown, folder, base)
    companions.copy_companions(base, merged)
    if not base.is_relative_to(into):
        companions.lay_over(folder, merged)
    return merged


def _without_adapter(folder: Path, view: Path) -> Path:
    """The same folder, by links, but for the adapter, which transformers would load by itself."""
    view.mkdir(parents=True)
    for path in folder.iterdir():
        if not path.name.startswith("adapter_"):
            (view / path.name).symlink_to(path.resolve())
    return view


def _check_all_is_used(folder: Path, wrapped: Any, held: Collection[str]) -> None:
    """Refuse an adapter with tensors that its base has no place for, which peft leaves out in silence."""
    own = wrapped.get_base_model().state_dict()
    for name in safetensors.tensor_index(folder / adapters.WEIGHTS):
        inside = name.removeprefix("base_model.model.")
        leaf = inside.rpartition(".")
        if name not in held and inside not in own and f"{leaf[0]}.base_layer.{leaf[2]}" not in own:
            raise UserError(
                f"the adapter in {folder} holds {name}, which its base {adapters.base_of(folder)[0]} has no place for"
            )


def _write(model: Any, merged: Path, unknown: Mapping[str, Path], folder: Path, base: Path) -> None:
    """Configuration and weights, by the model's own names."""
    state, tied, ignored = model.state_dict(), compat.tied_weights(model), compat.not_saved(model)
    tensors = {}
    for name, tensor in state.items():
        source = state.get(tied.get(name, ""))
        if source is not None and not torch.equal(source, tensor):
            raise UserError(
                f"the adapter in {folder} changes {tied[name]} and {name} apart, which are one tensor in its base. "
                "Merge it first, and save it with tie_word_embeddings false"
            )
        if source is None and name not in ignored:
            tensors[name] = safetensors.tensor_in_memory(tensor.shape, tensor.dtype, partial(torch.clone, tensor))
    for name, path in unknown.items():
        tensors[name] = safetensors.tensor_in_file(path, safetensors.tensor_index(path)[name])
    load.write_config(model, merged, base)
    safetensors.write_weights(merged, tensors)
