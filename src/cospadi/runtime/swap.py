"""Compressed layers in the place of a model's linear layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cospadi import compat
from cospadi.errors import CheckpointError
from cospadi.format.schema import QUANT_METHOD, SENTINEL, StoredProjection, spell
from cospadi.runtime.layer import CompressedLinear, reuse_products


def build_layer(entry: StoredProjection, dtype: torch.dtype | None, device: torch.device | str) -> CompressedLinear:
    """An empty layer for a stored projection in a model of dtype `dtype`.

    In an fp16 model the factors are made as bf16, as stored, so that what `compress` writes is not rounded by fp16
    first. (from_pretrained casts what it loads to the model's dtype.)
    """
    factors = torch.bfloat16 if dtype == torch.float16 else dtype
    sizes = (entry.d1, entry.d2, entry.k, entry.nnz)
    layer = CompressedLinear(*sizes, entry.form, entry.bias, factors, device, entry.nbytes)
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.empty(entry.d2, dtype=dtype, device=device))
    return layer


def swap_in_layers(
    model: Any,
    projections: Mapping[str, StoredProjection],
    dtype: torch.dtype | None,
    device: torch.device | str,
    holders: Mapping[str, str] | None = None,
) -> dict[str, CompressedLinear]:
    """Replace the projections' modules by empty compressed layers; the layers of a group share one parameter.

    Args:
        holders: projection -> the one whose dictionary it holds, where that is not its owner (see
            `dictionary_holders`).

    Raises:
        CheckpointError: the model has no linear layer of that name and shape.
    """
    layers: dict[str, CompressedLinear] = {}
    modules = dict(model.named_modules())
    for name, entry in projections.items():
        old = modules.get(name)
        if not isinstance(old, nn.Linear) or (old.in_features, old.out_features) != (entry.d1, entry.d2):
            raise CheckpointError(
                f"config.json: {type(model).__name__} has no linear layer {name} of {entry.d1} x {entry.d2}"
            )
        layers[name] = build_layer(entry, dtype, device)
        model.set_submodule(name, layers[name])
    tied: dict[str, str] = {}
    for name, entry in projections.items():
        holder = entry.owner if holders is None else holders[name]
        if holder != name and layers[name].atoms is not None:
            shared = entry.form.names.dictionary
            setattr(layers[name], shared, layers[holder].atoms)
            tied[f"{name}.{shared}"] = f"{holder}.{shared}"
    compat.tie_weights(model, tied)
    for members in _siblings(projections):
        reuse_products(_parent(model, members), [layers[name] for name in members], _in_block(members[0])[1])
    compat.ignore_when_loading(model, _sentinels(projections))
    return layers


def dictionary_holders(projections: Mapping[str, StoredProjection], place: Callable[[str], Hashable]) -> dict[str, str]:
    """Projection -> the one whose dictionary it holds: its owner, or else the first of its group in the same place.

    Args:
        place: where a projection's tensors will be. One parameter cannot be in two places.
    """
    first = {(entry.owner, place(entry.owner)): entry.owner for entry in projections.values()}
    return {name: first.setdefault((entry.owner, place(name)), name) for name, entry in projections.items()}


def _siblings(projections: Mapping[str, StoredProjection]) -> list[list[str]]:
    """The names of projections of one block that hold the same dictionary, where there are several."""
    siblings: dict[tuple[str, str], list[str]] = {}
    for name, entry in projections.items():
        siblings.setdefault((entry.owner, _in_block(name)[0]), []).append(name)
    return [members for members in siblings.values() if len(members) > 1]


def _sentinels(projections: Iterable[str]) -> list[str]:
    """Expressions for their empty tensors, one for the same projection of all blocks: compiling takes its time."""
    numbers: dict[tuple[str, str], list[str]] = {}
    for name in projections:
        block, inside = _in_block(name)
        before, _, number = block.removesuffix(".").rpartition(".")
        numbers.setdefault((before, inside), []).append(number)
    return [
        rf"^{re.escape(before)}\.(?:{'|'.join(found)})\.{re.escape(inside)}\.{SENTINEL}$"
        if before
        else rf"^{re.escape(inside)}\.{SENTINEL}$"
        for (before, inside), found in numbers.items()
    ]


def _in_block(name: str) -> tuple[str, str]:
    """model.layers.3.mlp.up_proj -> (model.layers.3., mlp.up_proj)."""
    block = re.match(r".*?\.\d+\.", name)
    return (block[0], name[block.end() :]) if block else ("", name)


def _parent(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """The innermost module that has all of these in it and is called, which lists of modules are not."""
    path = names[0].rpartition(".")[0]
    while path and (
        not all(name.startswith(f"{path}.") for name in names)
        or isinstance(model.get_submodule(path), (nn.ModuleList, nn.ModuleDict))
    ):
        path = path.rpartition(".")[0]
    return model.get_submodule(path)


def mark_compressed(model: Any, entries: Mapping[str, StoredProjection]) -> None:
    """Give a model whose layers were swapped in memory the state that `from_pretrained` would leave it in."""
    from transformers.quantizers.auto import AutoHfQuantizer  # finds ours by its name

    version, projections = spell(entries)
    config = {"quant_method": QUANT_METHOD, "format_version": version, "projections": projections}
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    quantizer.postprocess_model(model)


def quantizer_of(model: Any) -> Any:
    """The quantizer of a compressed model, which carries its manifest."""
    return model.hf_quantizer
