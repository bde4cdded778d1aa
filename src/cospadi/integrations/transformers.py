"""Loading and saving with transformers: the quantization config and the quantizer it finds by `quant_method`."""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from cospadi import compat
from cospadi.errors import CheckpointError, UserError
from cospadi.experts import is_adapted, restack, unstack
from cospadi.files import beside
from cospadi.format import card, manifest, safetensors, schema, verify
from cospadi.format.safetensors import open_file
from cospadi.format.schema import SENTINEL, StoredProjection
from cospadi.runtime.dense import move_weights, read_fast
from cospadi.runtime.layer import CompressedLinear
from cospadi.runtime.pages import mapped_files
from cospadi.runtime.swap import dictionary_holders, quantizer_of, swap_in_layers


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

    def to_dict(self) -> dict[str, Any]:
        """As its class does. PEFT asks a model for its config in this form before it puts adapters in."""
        meet_peft()
        return super().to_dict()  # type: ignore[no-any-return]


log = logging.getLogger("cospadi")


def meet_peft() -> None:
    """Have PEFT know compressed layers, if a program uses it. (Importing it takes a second, which others keep.)"""
    if "peft" in sys.modules:
        importlib.import_module("cospadi.integrations.peft")


@register_quantizer(schema.QUANT_METHOD)
class CospadiQuantizer(HfQuantizer):
    """Swaps the compressed projections' modules in before transformers loads the weights."""

    requires_calibration = True
    is_compileable = True
    is_trainable = True
    is_qat_trainable = True
    """The model trains as it is: gradients pass through every layer, and reach what is a parameter of it. Norms,
    embeddings, biases, dictionaries, and values that are stored as they are or were unpacked; packed values stay."""
    manifest: dict[str, Any] | None = None
    card: str | None = None
    """The model card that lay beside what was loaded."""
    quantization_config: CospadiConfig
    files: tuple[Path, ...] = ()
    """Where the tensors were loaded from."""
    carried: Mapping[str, Path] = {}
    """Tensors of the checkpoint that the model has no place for, which saving keeps -> their files."""
    copies: Mapping[str, list[str]] = {}
    """Shared dictionary -> the tensors that hold it again, in other places of a device_map."""

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(
        self,
        model: Any,
        dtype: torch.dtype | None = None,
        device_map: Any = None,
        checkpoint_files: Any = None,
        **_: Any,
    ) -> Any:
        stored = self.quantization_config.parsed()
        self.files = tuple(Path(file) for file in checkpoint_files or ())
        file_of = {name: file for file in self.files for name in safetensors.tensor_index(file)}
        present = [*(f"{name}.weight" for name in stored), *file_of]
        places = compat.places_in_model(model, present)
        unstack(model, [*present, *(name for place in places.values() for name in place.names)])
        # The model may be the text part of the one that was written, where names differ.
        found = compat.places_in_model(model, [f"{name}.weight" for name in stored])
        names = {name: found[f"{name}.weight"].names[0].removesuffix(".weight") for name in stored}
        called = {names[name]: entry.model_copy(update={"owner": names[entry.owner]}) for name, entry in stored.items()}
        version, projections = schema.spell(called)
        self.quantization_config = CospadiConfig(projections, version)
        swap_in_layers(model, called, dtype, "meta", self._holders(called, device_map))
        if names == {name: name for name in stored} and type(model).__name__ in (model.config.architectures or ()):
            own, ours = model.state_dict(keep_vars=True), {f"{name}.{SENTINEL}" for name in stored}
            self.carried = {
                name: file
                for name, file in file_of.items()
                if name not in ours and own.keys().isdisjoint(places[name].names)
            }
        if self.files and (recorded := self._check(list(self.files), model, stored)):
            for part in ("projections", "dense"):
                if part in recorded:
                    recorded[part] = {names.get(name, name): what for name, what in recorded[part].items()}
            self.manifest = recorded
        if self.files and (path := beside(self.files[0].parent, card.CARD)).is_file():
            with suppress(UserError):  # a model is not refused for its card
                self.card = card.read(path)
        return model

    def _holders(self, projections: Mapping[str, StoredProjection], device_map: Any) -> dict[str, str]:
        """Projection -> the one whose layer holds its dictionary: the owner of a shared one, or where that is in
        another place of a device_map, one that holds a copy (`copies`)."""
        # What "auto" and its like become keeps tied tensors together.
        places = device_map if isinstance(device_map, dict) else {}
        holders = dictionary_holders(projections, lambda name: _place(name, places))
        self.copies = defaultdict(list)
        for name, entry in projections.items():
            if holders[name] != entry.owner and _place(name, places) == "disk":
                holders[name] = name  # transformers finds on disk what is tied to a tensor of the checkpoint, alone
            if holders[name] == name != entry.owner:
                self.copies[entry.dictionary_tensor].append(f"{name}.{entry.form.names.dictionary}")
        return holders

    def get_weight_conversions(self) -> list[Any]:
        return compat.copy_when_loading(self.copies)

    def _check(self, files: list[Path], model: Any, projections: dict[str, StoredProjection]) -> dict[str, Any] | None:
        root = _lexical(Path(str(model.config.name_or_path)))
        folder = _lexical(files[0]).parent
        for file in map(_lexical, files):
            if file.parent != folder or (root.is_dir() and root not in file.parents):
                raise CheckpointError(f"the checkpoint's index names {file}, a path that leaves its folder")
        beside(folder, manifest.MANIFEST)
        recorded = manifest.read_manifest(folder, projections)
        present = compat.places_in_model(model, verify.check_files(files, projections))
        found = {name for place in present.values() for name in place.names}
        tied, may_miss = compat.tied_weights(model), compat.may_miss(model)
        here = found | {copy for copies in self.copies.values() for copy in copies} | tied.keys()
        state = model.state_dict(keep_vars=True)
        missing = [name for name in state if name not in here and not any(re.search(p, name) for p in may_miss)]
        if missing:
            raise CheckpointError(f"{folder}: tensor {missing[0]} is in none of the checkpoint's files")
        for file in files:
            for name, header in safetensors.tensor_index(file).items():
                asked = state.get(present[name].names[0]) if present[name].same else None
                if asked is not None and header["shape"] != list(asked.shape):
                    raise CheckpointError(
                        f"{file}: tensor {name} is {header['shape']}; config.json asks for {list(asked.shape)}"
                    )
        if os.environ.get("COSPADI_VERIFY") == "1":
            verify.verify(folder)
        return recorded

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        places = set(map(str, getattr(model, "hf_device_map", {}).values()))
        one_place = len(places) <= 1
        was_read_here, moved = self.files and places <= {"cpu"}, set[nn.Parameter]()
        mapped = mapped_files(".safetensors") if was_read_here else []
        for module in model.modules():
            if was_read_here:
                move_weights(module, moved, mapped)
            if isinstance(module, CompressedLinear):
                module.replaces_code = one_place  # what is offloaded comes and goes as it is stored
                module.prepare(model.dtype)
        read_fast(model)
        model.save_pretrained, model.push_to_hub = SavePretrained(model), PushToHub(model)
        meet_peft()
        return model

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Of `model.dequantize()`: an ordinary dense model, in its own dtype where none is given.

        Raises:
            UserError: layers are offloaded, or experts have adapters.
        """
        return super().dequantize(model, dtype or model.dtype)

    def _dequantize(self, model: Any, dtype: torch.dtype) -> Any:
        layers = [
            (parent, name, layer)
            for parent in model.modules()
            for name, layer in parent.named_children()
            if isinstance(layer, CompressedLinear)
        ]
        if any(layer.weight_is_away() for _, _, layer in layers):
            raise UserError("layers are offloaded, and cannot be made dense there. Load the model into memory first")
        adapted = next((name for name, module in model.named_modules() if is_adapted(module)), None)
        if adapted is not None:
            raise UserError(
                f"adapters lie on experts ({adapted}), whose weights become one parameter when they are made dense, "
                "which has no place for them. Keep the model compressed, or train adapters on other projections"
            )
        for parent, name, layer in layers:
            setattr(parent, name, layer.to_linear(dtype))
        entries = self.quantization_config.parsed()
        restack(model)
        compat.untie(model, (f"{name}.{entry.form.names.dictionary}" for name, entry in entries.items()))
        del model.save_pretrained, model.push_to_hub
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors to save: shared dictionaries once, factors as stored, and for each projection an empty `weight`.

        The empty tensor makes a transformers that does not know us stop with a size mismatch, where it would
        otherwise fill the projection with random numbers. Offloaded tensors are on the meta device, and are read while
        the files are written.

        Raises:
            UserError: a shared dictionary was trained in several places, and is not one any more.
        """
        state: dict[str, Tensor] = model.state_dict()
        for name, copies in self.copies.items():
            for copy in copies:
                one, other = state[name], state[copy]
                if not one.is_meta and not other.is_meta and not torch.equal(one, other.to(one.device)):
                    raise UserError(
                        f"{name} and {copy} were one dictionary, which device_map put in two places, and differ after "
                        "training. Train with device_map=None, or keep dictionaries as they are (requires_grad=False)"
                    )
        stored = self.stored_dtypes()
        for name, entry in self.quantization_config.parsed().items():
            tensor = state.pop(f"{name}.{entry.form.names.dictionary}", None)
            if tensor is not None and entry.owner == name:
                state[entry.dictionary_tensor] = tensor
            state[f"{name}.{SENTINEL}"] = torch.empty(0, dtype=torch.bfloat16)
        state = {name: self.as_stored(name, tensor, stored) for name, tensor in state.items()}
        return state | self._carried_tensors(), {}

    def _carried_tensors(self) -> dict[str, Tensor]:
        """The tensors of `carried`; a file that is gone by now is told of."""
        tensors: dict[str, Tensor] = {}
        for path in sorted(set(self.carried.values())):
            names = [name for name, where in self.carried.items() if where == path]
            if not path.exists():
                log.warning("%s is gone, and with it %d tensors that the model does not know", path, len(names))
                continue
            with open_file(path) as file:
                tensors |= {name: file.get_tensor(name) for name in names}
        return tensors

    def stored_dtypes(self) -> dict[str, torch.dtype]:
        """The parameters that the format stores in a dtype of its own, whatever the model's is."""
        dtypes: dict[str, torch.dtype] = {}
        for name, entry in self.quantization_config.parsed().items():
            dtypes[entry.dictionary_tensor] = entry.form.dictionary_kind.dtype
            if entry.form.trainable:
                dtypes[f"{name}.{entry.form.names.values}"] = entry.form.codec.dtype
        return dtypes

    def as_stored(self, name: str, tensor: Tensor, dtypes: Mapping[str, torch.dtype]) -> Tensor:
        """A tensor of the model in the dtype that it is stored in.

        fp16 does not hold every number of bf16: where a number is still what was loaded, rounded to fp16, it is saved
        as it was loaded, if the checkpoint is still there.
        """
        stored = tensor.to(dtypes.get(name, tensor.dtype))
        if stored.dtype == torch.bfloat16 and tensor.dtype == torch.float16 and not tensor.is_meta:
            loaded = self._loaded(name)
            if loaded is not None and loaded.dtype == stored.dtype and loaded.shape == stored.shape:
                loaded = loaded.to(tensor.device)
                return torch.where(loaded.to(torch.float16) == tensor, loaded, stored)
        return stored

    def _loaded(self, name: str) -> Tensor | None:
        """A tensor of the checkpoint that the model was loaded from, if that is still there."""
        with suppress(CheckpointError):
            for path in self.files:
                with open_file(path) as file:
                    if name in file.keys():  # noqa: SIM118  the file is no mapping
                        loaded: Tensor = file.get_tensor(name)
                        return loaded
        return None


def _place(name: str, device_map: Mapping[str, Any]) -> str | None:
    """Where a device_map puts a module: what it says of the innermost module around it."""
    while name and name not in device_map:
        name = name.rpartition(".")[0]
    return str(device_map[name]) if name in device_map else None


def _lexical(path: Path) -> Path:
    """Absolute and without `..`; links are not followed, since a hub cache is made of them."""
    return Path(os.path.normpath(path.absolute()))


class SavePretrained:
    """A compressed model's `save_pretrained`: that of its class, then a new manifest for what it wrote, and the card.

    It stands on the instance, since the class is transformers'; a class of its own lets the model be pickled.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`; to upload, use `model.push_to_hub`, which calls this first."""
        if kwargs.get("push_to_hub"):
            raise UserError("save_pretrained would upload before the manifest is written. Use model.push_to_hub(NAME)")
        if compat.has_adapters(self.model):  # which alone are written
            type(self.model).save_pretrained(self.model, save_directory, *args, **kwargs)
            return
        kwargs.setdefault("save_original_format", False)
        quantizer = quantizer_of(self.model)
        for name in quantizer.quantization_config.projections:
            if not isinstance(self.model.get_submodule(name), CompressedLinear):
                raise UserError(
                    f"{name} is no compressed layer any more: {type(self.model.get_submodule(name)).__name__} stands "
                    "in its place. Adapters are saved by the save_pretrained of the model that PEFT made; unload() "
                    "takes them off"
                )
        stored = quantizer.stored_dtypes()
        with compat.convert_offloaded(self.model, lambda name, tensor: quantizer.as_stored(name, tensor, stored)):
            type(self.model).save_pretrained(self.model, save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            unknown: dict[str, Any] = {"projections": {name: {} for name in quantizer.quantization_config.projections}}
            folder, before = Path(save_directory), quantizer.manifest or unknown
            now = manifest.write_manifest(folder, before)
            path, text = folder / card.CARD, quantizer.card
            if text is not None and (not path.exists() or path.read_bytes() == text.encode()):  # else it is another's
                same = manifest.tensor_hashes(now).items() >= manifest.tensor_hashes(before).items()
                path.write_text(text if same else card.without_measured(text), encoding="utf-8", newline="")


class PushToHub:
    """A compressed model's `push_to_hub`: what `save_pretrained` writes, its manifest and its card with it.

    That of its class would put a card of its own in place of the model's.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: bool | str | None = None,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | None = None,
        **commit: Any,
    ) -> str:
        """As `PreTrainedModel.push_to_hub`; gives back the commit's address.

        Args:
            commit: commit_message, commit_description, revision (a branch) and create_pr.

        Raises:
            UserError: the hub cannot be reached or does not let the model be written; nothing was committed.
        """
        if compat.has_adapters(self.model):  # which alone are uploaded
            asked = {"private": private, "token": token, "max_shard_size": max_shard_size, "tags": tags}
            return type(self.model).push_to_hub(self.model, repo_id, **asked, **commit)  # type: ignore[no-any-return]
        from cospadi.model import hub  # inference does without

        repo = repo_id if commit.get("create_pr") else hub.claim(repo_id, private, token)
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder, max_shard_size=max_shard_size)
            path = Path(folder) / card.CARD
            if tags and path.is_file():
                path.write_text(card.tagged(card.read(path), tags), encoding="utf-8", newline="")
            return hub.upload(Path(folder), repo, token=token, **commit).url
