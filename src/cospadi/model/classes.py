"""Which of transformers' classes a model folder is opened with, and which folders are refused for want of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cospadi.errors import UserError


def auto_class(config: Any, folder: Path, text_only: bool = False) -> Any:
    """The auto class that opens a model with all of its tensors: `AutoModelForCausalLM`, or for a model that reads
    images or sound beside text `AutoModelForMultimodalLM`, unless its configuration names its text-only class.

    Args:
        text_only: `AutoModelForCausalLM` all the same.

    Raises:
        UserError: transformers has no such class for this kind of model.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    kind, named = config.model_type, set(getattr(config, "architectures", None) or ())
    causal = _names(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, kind)
    several = _names(modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, kind)
    if text_only and several:
        text = config.get_text_config(decoder=True).model_type
        if not causal or text not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise UserError(f"{folder}: transformers loads no text-only {kind} models. Leave out --text-only")
    if several and not text_only and not named & causal:
        return transformers.AutoModelForMultimodalLM
    if causal:
        return transformers.AutoModelForCausalLM
    if getattr(config, "auto_map", None):
        raise UserError(f"{folder}: {kind} models need code of their own, which is never run")
    raise UserError(f"{folder}: {kind} models are not among the causal language models of transformers")


def _names(mapping: Any, kind: str) -> set[str]:
    """The names of a mapping's classes for a kind of model."""
    names = mapping.get(kind, ())
    return {names} if isinstance(names, str) else set(names)
