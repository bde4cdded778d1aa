"""Loading and saving with transformers: the quantization config and the quantizer it finds by `quant_method`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from cospadi import compat
from cospadi.errors import CheckpointError, UserError
from cospadi.format import manifest, schema, verify
from cospadi.format.schema import DICTIONARY, LEFT, SENTINEL, StoredProjection
from cospadi.runtime.layer import LowRankLinear, SparseDictionaryLinear, reuse_products

CompressedLinear = SparseDictionaryLinear | LowRankLinear


@register_quantization_config(schema.QUANT_METHOD)
class CospadiConfig(QuantizationConfigMixin):
    """`quantization_config` of a compressed model: format version and the compressed projections by name.

    Raises:
        CheckpointError: another format version, or malformed entries.
    """

    def __init__(
        self,
        /,  # a field of any name is a field
        projections: object = None,
        format_version: object = None,
        quant_method: str = schema.QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        schema.check_version(format_version, "config.json")
        schema.check_fields(unknown)
        self.quant_method = quant_method
        self.format_version = format_version
        self.projections = {
            name: entry.model_dump()
            for name, entry in schema.parse_projections({} if projections is None else projections).items()
        }

    def parsed(self) -> dict[str, StoredProjection]:
        """The projections as objects."""
        return schema.parse_projections(self.projections)


@register_quantizer(schema.QUANT_METHOD)
class CospadiQuantizer(HfQuantizer):
    """Swaps the compressed projections' modules in before transformers loads the weights."""

    requires_calibration = True
    is_trainable = True
    is_compileable = True
    manifest: dict[str, Any] | None = None

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(
        self, model: Any, dtype: torch.dtype | None = None, checkpoint_files: Any = None, **_: Any
    ) -> Any:
        projections = self.quantization_config.parsed()
        swap_in_layers(model, projections, dtype, "meta")
        if checkpoint_files:
            self.manifest = self._check([Path(file) for file in checkpoint_files], model, projections)
        return model

    def _check(self, files: list[Path], model: Any, projections: dict[str, StoredProjection]) -> dict[str, Any] | None:
        root = _lexical(Path(str(model.config.name_or_path)))
        folder = _lexical(files[0]).parent
        for file in map(_lexical, files):
            if file.parent != folder or (root.is_dir() and root not in file.parents):
                raise CheckpointError(f"the checkpoint's index names {file}, a path that leaves its folder")
        recorded = manifest.read_manifest(folder, projections)
        present = verify.check_files(files, projections)
        tied, may_miss = compat.tied_weights(model), compat.may_miss(model)
        missing = [
            name
            for name in model.state_dict()
            if name not in present and name not in tied and not any(re.search(p, name) for p in may_miss)
        ]
        if missing:
            raise CheckpointError(f"{folder}: tensor {missing[0]} is in none of the checkpoint's files")
        if os.environ.get("COSPADI_VERIFY") == "1":
            verify.verify(folder)
        return recorded

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for module in model.modules():
            # Counted here, since a compiler that meets the layer before its first call could not keep them.
            if isinstance(module, SparseDictionaryLinear):
                module.column_offsets()
        model.save_pretrained = SavePretrained(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors to save: shared dictionaries once, factors as bf16, and an empty `weight` for each projection.

        The empty tensor makes a transformers that does not know us stop with a size mismatch, where it would
        otherwise fill the projection with random numbers.
        """
        state: dict[str, Tensor] = model.state_dict()
        for name, entry in self.quantization_config.parsed().items():
            for part in (DICTIONARY, LEFT, schema.RIGHT):
                tensor = state.pop(f"{name}.{part}", None)
                if tensor is not None and (part == schema.RIGHT or entry.dictionary == name):
                    state[f"{name}.{part}"] = tensor.to(torch.bfloat16)
            state[f"{name}.{SENTINEL}"] = torch.empty(0, dtype=torch.bfloat16)
        return state, {}


def _lexical(path: Path) -> Path:
    """Absolute and without `..`; links are not followed, since a hub cache is made of them."""
    return Path(os.path.normpath(path.absolute()))


def build_layer(entry: StoredProjection, dtype: torch.dtype | None, device: torch.device | str) -> CompressedLinear:
    """An empty layer for a stored projection in a model of dtype `dtype`.

    In an fp16 model the factors are made as bf16, as stored, so that what `compress` writes is not rounded by fp16
    first. (from_pretrained casts what it loads to the model's dtype.)
    """
    factors = torch.bfloat16 if dtype == torch.float16 else dtype
    if entry.layout == "low-rank":
        layer: CompressedLinear = LowRankLinear(entry.d1, entry.d2, entry.k, entry.bias, factors, device)
    else:
        shape = (entry.d1, entry.d2, entry.k, entry.nnz, entry.value_bits)
        layer = SparseDictionaryLinear(*shape, entry.bias, factors, device)
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.empty(entry.d2, dtype=dtype, device=device))
    return layer


def swap_in_layers(
    model: Any,
    projections: Mapping[str, StoredProjection],
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> dict[str, CompressedLinear]:
    """Replace the projections' modules by empty compressed layers; the layers of a group share one parameter.

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
        if entry.dictionary != name:
            shared = LEFT if entry.layout == "low-rank" else DICTIONARY
            setattr(layers[name], shared, getattr(layers[entry.dictionary], shared))
            tied[f"{name}.{shared}"] = f"{entry.dictionary}.{shared}"
    compat.tie_weights(model, tied)
    for members in _siblings(projections):
        reuse_products(_parent(model, members), [layers[name] for name in members], _in_block(members[0])[1])
    compat.ignore_when_loading(model, (rf"^{re.escape(name)}\.{SENTINEL}$" for name in projections))
    return layers


def _siblings(projections: Mapping[str, StoredProjection]) -> list[list[str]]:
    """The names of projections of one block that hold the same dictionary, where there are several."""
    siblings: dict[tuple[str, str], list[str]] = {}
    for name, entry in projections.items():
        siblings.setdefault((entry.dictionary, _in_block(name)[0]), []).append(name)
    return [members for members in siblings.values() if len(members) > 1]


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
    projections = {name: entry.model_dump() for name, entry in entries.items()}
    quantizer = CospadiQuantizer(CospadiConfig(projections, schema.FORMAT_VERSION), pre_quantized=True)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = schema.QUANT_METHOD
    quantizer.postprocess_model(model)


def quantizer_of(model: Any) -> CospadiQuantizer:
    """The quantizer of a compressed model, which carries its manifest."""
    quantizer = model.hf_quantizer
    assert isinstance(quantizer, CospadiQuantizer)
    return quantizer


class SavePretrained:
    """A compressed model's `save_pretrained`: that of its class, then a new manifest for what it wrote.

    It stands on the instance, since the class is transformers'; a class of its own lets the model be pickled.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`; to upload, use `model.push_to_hub`, which calls this first."""
        if kwargs.get("push_to_hub"):
            raise UserError("save_pretrained would upload before the manifest is written. Use model.push_to_hub(NAME)")
        kwargs.setdefault("save_original_format", False)
        type(self.model).save_pretrained(self.model, save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            quantizer = quantizer_of(self.model)
            unknown: dict[str, Any] = {"projections": {name: {} for name in quantizer.quantization_config.projections}}
            manifest.write_manifest(Path(save_directory), quantizer.manifest or unknown)
