"""Loading and saving with transformers: the quantization config and the quantizer it finds by `quant_method`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from cospadi import compat
from cospadi.errors import CheckpointError, UserError
from cospadi.experts import unstack
from cospadi.format import manifest, safetensors, schema, verify
from cospadi.format.schema import SENTINEL, StoredProjection
from cospadi.runtime.layer import CompressedLinear
from cospadi.runtime.swap import quantizer_of, swap_in_layers


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
        version = schema.check_version(format_version, "config.json")
        schema.check_fields(unknown)
        self.quant_method = quant_method
        parsed = schema.parse_projections({} if projections is None else projections, version)
        self.format_version, self.projections = schema.spell(parsed)

    def parsed(self) -> dict[str, StoredProjection]:
        """The projections as objects."""
        return schema.parse_projections(self.projections, self.format_version)


@register_quantizer(schema.QUANT_METHOD)
class CospadiQuantizer(HfQuantizer):
    """Swaps the compressed projections' modules in before transformers loads the weights."""

    requires_calibration = True
    is_trainable = True
    is_compileable = True
    manifest: dict[str, Any] | None = None
    quantization_config: CospadiConfig

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(
        self, model: Any, dtype: torch.dtype | None = None, checkpoint_files: Any = None, **_: Any
    ) -> Any:
        stored = self.quantization_config.parsed()
        files = [Path(file) for file in checkpoint_files or ()]
        present = [*(f"{name}.weight" for name in stored)]
        present += [name for file in files for name in safetensors.tensor_index(file)]
        unstack(model, (name for place in compat.places_in_model(model, present).values() for name in place.names))
        # The model may be the text part of the one that was written, where names differ.
        places = compat.places_in_model(model, [f"{name}.weight" for name in stored])
        names = {name: places[f"{name}.weight"].names[0].removesuffix(".weight") for name in stored}
        called = {names[name]: entry.model_copy(update={"owner": names[entry.owner]}) for name, entry in stored.items()}
        version, projections = schema.spell(called)
        self.quantization_config = CospadiConfig(projections, version)
        swap_in_layers(model, called, dtype, "meta")
        if files and (recorded := self._check(files, model, stored)):
            for part in ("projections", "dense"):
                if part in recorded:
                    recorded[part] = {names.get(name, name): what for name, what in recorded[part].items()}
            self.manifest = recorded
        return model

    def _check(self, files: list[Path], model: Any, projections: dict[str, StoredProjection]) -> dict[str, Any] | None:
        root = _lexical(Path(str(model.config.name_or_path)))
        folder = _lexical(files[0]).parent
        for file in map(_lexical, files):
            if file.parent != folder or (root.is_dir() and root not in file.parents):
                raise CheckpointError(f"the checkpoint's index names {file}, a path that leaves its folder")
        recorded = manifest.read_manifest(folder, projections)
        present = compat.places_in_model(model, verify.check_files(files, projections))
        found = {name for place in present.values() for name in place.names}
        tied, may_miss = compat.tied_weights(model), compat.may_miss(model)
        missing = [
            name
            for name in model.state_dict()
            if name not in found and name not in tied and not any(re.search(p, name) for p in may_miss)
        ]
        if missing:
            raise CheckpointError(f"{folder}: tensor {missing[0]} is in none of the checkpoint's files")
        if os.environ.get("COSPADI_VERIFY") == "1":
            verify.verify(folder)
        return recorded

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for module in model.modules():
            if isinstance(module, CompressedLinear):
                module.prepare(model.dtype)
        model.save_pretrained = SavePretrained(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors to save: shared dictionaries once, factors as stored, and for each projection an empty `weight`.

        The empty tensor makes a transformers that does not know us stop with a size mismatch, where it would
        otherwise fill the projection with random numbers.
        """
        state: dict[str, Tensor] = model.state_dict()
        for name, entry in self.quantization_config.parsed().items():
            form = entry.form
            tensors = {form.names.dictionary: form.dictionary_kind.dtype}
            if form.trainable:
                tensors[form.names.values] = form.codec.dtype
            for part, dtype in tensors.items():
                tensor = state.pop(f"{name}.{part}", None)
                if tensor is not None and (part != form.names.dictionary or entry.owner == name):
                    state[f"{name}.{part}"] = tensor.to(dtype)
            state[f"{name}.{SENTINEL}"] = torch.empty(0, dtype=torch.bfloat16)
        return state, {}


def _lexical(path: Path) -> Path:
    """Absolute and without `..`; links are not followed, since a hub cache is made of them."""
    return Path(os.path.normpath(path.absolute()))


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
