"""Where the dense model comes from: a local folder or the hub; its skeleton, its weights, its tokenizer."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cospadi import compat, files
from cospadi.errors import CheckpointError, UserError, first_line
from cospadi.format import safetensors
from cospadi.format.safetensors import WrittenTensor
from cospadi.model import adapters, hub
from cospadi.model.blocks import Blocks, StoredWeight
from cospadi.model.classes import auto_class
from cospadi.model.projections import decoder_blocks

log = logging.getLogger("cospadi")

OUTPUTS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
"""What a forward pass gives back, whatever a model's configuration says."""

MOST_LABELS = 10_000
AT_LEAST_ONE = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
"""Numbers of a configuration that no language model has fewer of."""
DEFAULT_POSITIONS = 2048
DEMO = "demo"
"""Model name that stands for the built-in demo model."""


@dataclass(frozen=True)
class Skeleton:
    """A model's architecture without its weights.

    Attributes:
        model: on the meta device.
        sizes: tensor name -> bytes of all tensors in the checkpoint, by its headers; None if they are not to be had.
        unknown: names of those that the model has no place for, each with its file; none without files.
    """

    model: nn.Module
    sizes: dict[str, int] | None
    unknown: Mapping[str, Path] = field(default_factory=dict)


def resolve(model: str | Path, revision: str | None = None, weights: bool = True, merge_adapter: bool = False) -> Path:
    """The local folder of a model; a hub model is downloaded (its weights only if asked).

    Args:
        model: folder, "demo", or a hub name, with its revision after an @ or apart.
        merge_adapter: the folder is to hold a PEFT adapter, alone or beside a model.

    Raises:
        UserError: no such folder and no such hub model, no network, or an adapter where none is to be merged.
    """
    folder = _found(model, revision, weights, merge_adapter)
    adapters.check(folder, merge_adapter)
    return folder


def resolve_base(folder: Path, weights: bool = True) -> Path:
    """The folder of what an adapter is merged into: the same, where a whole model lies beside it."""
    base, revision = adapters.base_of(folder)
    if base == folder:
        return folder
    try:
        return resolve(base, revision, weights)
    except UserError as error:
        raise UserError(f"the base of the adapter in {folder}: {error}") from None


def _found(model: str | Path, revision: str | None, weights: bool, merge_adapter: bool) -> Path:
    path = files.local_path(model, "model")
    if str(model) == DEMO and not path.exists():
        from cospadi.demo import model_path

        return model_path()
    if path.is_dir() and (merge_adapter or adapters.has_adapter(path)):
        return path
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is not a model folder: it has no config.json")
        return path
    if path.exists():
        raise UserError(f"{path} is a file; a model is a folder with config.json and safetensors files")
    if hub.is_path(model):
        raise UserError(f"model folder {model} does not exist")
    return hub.fetch(str(model), revision, weights)


def source_folder(name: str) -> Path | None:
    """Where on this machine a model is read from, there yet or not; None for a name that no file can have."""
    try:
        path = files.local_path(name, "model")
    except UserError:
        return None
    if path.exists() or hub.is_path(name):
        return path
    return resolve(DEMO) if name == DEMO else hub.model_cache(name)


def check_numbers(folder: Path) -> None:
    """Refuse a configuration with numbers that cannot be, before a library takes them for true.

    Raises:
        CheckpointError: it has such ones, or is no JSON.
    """
    path = folder / "config.json"
    config = files.read_json(path)
    labels = config.get("num_labels")
    if isinstance(labels, int) and labels > MOST_LABELS:  # each would get a name
        raise CheckpointError(f"{path} asks for {labels} labels, which no language model has")
    for part in (config, config.get("text_config")):
        for name in AT_LEAST_ONE:
            value = part.get(name) if isinstance(part, dict) else None
            if isinstance(value, int) and value < 1:
                raise CheckpointError(f"{path} says {name} {value}; there is at least 1. Mend it, or download it again")


def read_config(folder: Path) -> Any:
    """The model's configuration.

    Raises:
        UserError: not a readable one.
    """
    from transformers import AutoConfig

    check_numbers(folder)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, **OUTPUTS)
    except Exception as error:  # a config class may raise anything on values it does not expect
        raise UserError(f"{folder / 'config.json'} cannot be used: {first_line(error)}") from None


def load_config(folder: Path) -> Any:
    """The model's configuration, refused where it cannot be compressed.

    Raises:
        UserError: not a readable configuration, or an already quantized model.
    """
    config = read_config(folder)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = (quantization if isinstance(quantization, dict) else quantization.to_dict()).get("quant_method")
        if method is None:
            raise CheckpointError(
                f"{folder / 'config.json'} has a quantization_config without a quant_method. Take it out if the "
                "weights are whole"
            )
        raise UserError(f"{folder} is already quantized ({method}). Compress the original model instead")
    return config


def check_blocks(config: Any, folder: Path, tensors: int) -> None:
    """Refuse more decoder blocks than the checkpoint's tensors could fill, before they are built.

    Raises:
        CheckpointError: config.json is not that of the weights beside it.
    """
    blocks = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if isinstance(blocks, int) and blocks > tensors:
        raise CheckpointError(
            f"{folder / 'config.json'} asks for {blocks} decoder blocks; the checkpoint has only {tensors} tensors"
        )


def load_skeleton(
    model: str | Path, revision: str | None = None, text_only: bool = False, merge_adapter: bool = False
) -> Skeleton:
    """Read config and safetensors headers only, and build the model on the meta device.

    Its experts multiply in the one way that runs there in every dtype.

    Args:
        text_only: without what the text-only class does not know.
        merge_adapter: of the base that the model's adapter is merged into, which has the same architecture.

    Raises:
        UserError: nothing to load, or no class that builds it. CheckpointError: files with another model's tensors.
    """
    folder = resolve(model, revision, weights=False, merge_adapter=merge_adapter)
    if merge_adapter:
        (model, revision), folder = adapters.base_of(folder), resolve_base(folder, weights=False)
    config = load_config(folder)
    sizes = _stored_sizes(model, folder, revision)
    if sizes is not None:
        check_blocks(config, folder, len(sizes))
    skeleton, unknown = _build(config, folder, text_only), {}
    found = safetensors.weight_files(folder)
    if Path(model).exists():
        check_there(folder, found)
    if all(path.exists() for path in found):  # of a hub's model there may be none yet
        unknown = unknown_tensors(skeleton, folder)
    return Skeleton(skeleton, sizes, unknown)


def _build(config: Any, folder: Path, text_only: bool) -> nn.Module:
    """A model on the meta device."""
    kind = auto_class(config, folder, text_only)
    try:
        with torch.device("meta"):
            model: nn.Module = kind.from_config(
                config, dtype=config.dtype, trust_remote_code=False, experts_implementation="batched_mm"
            )
    except Exception as error:  # a model class may raise anything on a config it cannot build
        raise UserError(f"{folder} does not build a causal language model: {first_line(error)}") from None
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        raise UserError(f"{folder}: {type(model).__name__} is an encoder-decoder, not a causal language model")
    return model.eval()


def unknown_tensors(model: nn.Module, folder: Path) -> dict[str, Path]:
    """Names of a folder's tensors that a dense model has no place for, each with its file.

    Raises:
        CheckpointError: a tensor of the model's is in none of the files, or there in another shape or not as numbers
            with fractions.
    """
    present = safetensors.stored_tensors(folder)
    own, tied, may_miss = model.state_dict(), compat.tied_weights(model), compat.may_miss(model)
    places = compat.places_in_model(model, present)
    found = {name for place in places.values() for name in place.names}
    heads = {source for target, source in tied.items() if target in found}
    for name in own:
        if not (name in found or name in tied or name in heads or any(re.search(p, name) for p in may_miss)):
            raise CheckpointError(
                f"{folder}: tensor {name} is in none of the model's files. Download it again, or mend config.json"
            )
    for name, place in places.items():
        tensor, asked = present[name], own.get(place.names[0])
        if asked is None or not place.same:
            continue
        if tensor.shape != list(asked.shape):
            raise CheckpointError(
                f"{folder}: tensor {name} is {tensor.shape}; config.json asks for {list(asked.shape)}"
            )
        if asked.is_floating_point() and not tensor.dtype.startswith(("F", "BF")):
            raise CheckpointError(f"{folder}: tensor {name} holds {tensor.dtype}, which are no weights")
    return {name: present[name].path for name, place in places.items() if not own.keys() & set(place.names)}


def _stored_sizes(model: str | Path, folder: Path, revision: str | None) -> dict[str, int] | None:
    files = safetensors.weight_files(folder)
    if files and all(path.exists() for path in files):
        return safetensors.tensor_sizes(folder)
    if Path(model).exists():
        return None
    import huggingface_hub

    repo, own = hub.split_name(model)
    try:
        metadata = huggingface_hub.get_safetensors_metadata(repo, revision=own or revision)
    except Exception:  # the figure is a courtesy
        return None
    return {
        name: tensor.data_offsets[1] - tensor.data_offsets[0]
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    }


def load_model(folder: Path, device: torch.device, text_only: bool = False) -> nn.Module:
    """A model, dense or compressed, in the dtype it is stored in, for inference.

    Raises:
        UserError: no safetensors files, a model that is no causal LM. CheckpointError: damaged files.
    """
    config = _check_files(folder)
    if getattr(config, "quantization_config", None) is None:  # else the quantizer knows what should be there
        unknown_tensors(_build(config, folder, text_only), folder)
    return _from_pretrained(folder, text_only).to(device).eval()


def load_blocks(folder: Path, device: torch.device, text_only: bool = False) -> Blocks:
    """A dense model in memory, whole.

    Raises: as `load_model`.
    """
    unknown = unknown_tensors(_build(_check_files(folder), folder, text_only), folder)
    return Blocks(_from_pretrained(folder, text_only).to(device).eval(), device, unknown=unknown, folder=folder)


def _check_files(folder: Path) -> Any:
    """The configuration of a folder that may hold a model."""
    found = safetensors.weight_files(folder)
    check_there(folder, found)
    spare = set(safetensors.all_safetensors(folder)) - set(found)
    for path in sorted(path for path in spare if not path.name.startswith(safetensors.ADAPTER)):
        count = len(safetensors.tensor_index(path))
        log.warning("%s is no part of the model, as transformers reads it: its %d tensors are left out", path, count)
    config = read_config(folder)
    check_blocks(config, folder, len(safetensors.tensor_sizes(folder)))
    return config


def check_there(folder: Path, found: Sequence[Path]) -> None:
    """Refuse a folder some of whose files of weights (`safetensors.weight_files`) are not there.

    Raises:
        UserError: there are none. CheckpointError: one that the index names is missing.
    """
    if not found:
        pickled = [path.name for path in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))]
        raise UserError(
            f"{folder} has no safetensors files"
            + (f", only {pickled[0]}. Pickled weights are never loaded: convert them first" if pickled else ". ")
            + (" (model.save_pretrained writes safetensors)" if pickled else "Download the model's weights")
        )
    for path in found:
        if not path.is_file():
            raise CheckpointError(f"{path}, which the index names, is not there. Download it again")


def _from_pretrained(folder: Path, text_only: bool, **options: Any) -> nn.Module:
    with compat.misfits() as misfits:
        try:
            model: nn.Module = auto_class(read_config(folder), folder, text_only).from_pretrained(
                folder, dtype="auto", use_safetensors=True, trust_remote_code=False, **OUTPUTS, **options
            )
        except (UserError, MemoryError):
            raise
        except Exception as error:  # a model class may raise anything on a config or an index that is damaged
            reason = misfits[0] if misfits else first_line(error)
            raise UserError(f"{folder} cannot be loaded: {reason}") from None
    return model


def open_blocks(folder: Path, device: torch.device, converted: Path, text_only: bool = False) -> Blocks:
    """A dense model whose decoder blocks stay on disk until they are needed, one at a time; the rest is in memory.

    Args:
        converted: a folder for weights that transformers stores in another form than it computes with (experts).
        text_only: without what the text-only class does not know.

    Raises:
        UserError: no safetensors files, a model that is no causal LM. CheckpointError: damaged files.
    """
    _check_files(folder)
    skeleton = load_skeleton(folder, text_only=text_only)
    return _on_disk(folder, skeleton, device, converted, text_only)


def open_compressed(folder: Path, device: torch.device, converted: Path) -> Blocks:
    """`open_blocks` of a compressed model."""
    return _on_disk(folder, Skeleton(_build(_check_files(folder), folder, False), None), device, converted, False)


def check_compressed(folder: Path) -> None:
    """Refuse the folder of a compressed model as `load_model` would, without loading it.

    Raises: as `load_model`.
    """
    from transformers.quantizers.auto import AutoHfQuantizer  # finds ours by its name

    config = _check_files(folder)
    model = _build(config, folder, False)
    quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
    quantizer.preprocess_model(model, dtype=model.dtype, checkpoint_files=safetensors.weight_files(folder))


def _on_disk(folder: Path, skeleton: Skeleton, device: torch.device, converted: Path, text_only: bool) -> Blocks:
    prefix, _ = decoder_blocks(skeleton.model)
    inside, here = f"{prefix}.", device.index or 0 if device.type == "cuda" else "cpu"
    places: dict[str, str | int] = {}
    for name, module in skeleton.model.named_modules():
        if name.startswith(inside):
            if name.count(".") == prefix.count(".") + 1:
                places[name] = "disk"
        elif next(module.children(), None) is None:
            places[name] = here
        elif name != prefix:  # a module with others in it: what it has of its own
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            places |= {f"{name}.{leaf}" if name else leaf: here for leaf, _ in own}
    with _quiet():
        model = _from_pretrained(folder, text_only, device_map=places, offload_folder=converted, offload_buffers=True)
    stored = {
        name: StoredWeight(
            Path(entry["safetensors_file"]), entry.get("weight_name", name), getattr(torch, entry["dtype"])
        )
        for name, entry in compat.take_from_accelerate(model).items()
    }
    return Blocks(model, device, stored, skeleton.unknown, folder=folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Libraries do not tell that parameters are on the disk, which is what was asked for."""
    logs = [logging.getLogger(name) for name in ("accelerate", "transformers")]
    levels = [one.level for one in logs]
    for one in logs:
        one.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(logs, levels, strict=True):
            one.setLevel(level)


def write_config(model: Any, folder: Path, source: Path) -> None:
    """Write config.json, and generation_config.json where the model's source has none to copy, as save_pretrained."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate() and not (source / "generation_config.json").exists():
        model.generation_config.save_pretrained(folder)


def tensors_to_write(
    model: Any, state: Mapping[str, torch.Tensor], blocks: Blocks, held: Mapping[str, Path], text_only: bool = False
) -> dict[str, WrittenTensor]:
    """Where every tensor of a compressed model's checkpoint comes from.

    Args:
        state: tensors to save, on the meta device but for buffers and sentinels.
        held: names of factors -> the safetensors files that hold them under these names.
        text_only: without what the model has no place for.
    """
    tied, ignored = compat.tied_weights(model), compat.not_saved(model)
    indices: dict[Path, dict[str, dict[str, Any]]] = {}

    def in_file(path: Path, name: str) -> dict[str, Any]:
        if path not in indices:
            indices[path] = safetensors.tensor_index(path)
        return indices[path][name]

    tensors: dict[str, WrittenTensor] = {}
    assert blocks.stored is not None
    for name, tensor in state.items():
        if name in ignored or (name in tied and tied[name] in state):
            continue
        if name in held:
            tensors[name] = safetensors.tensor_in_file(held[name], in_file(held[name], name))
        elif not tensor.is_meta:
            tensors[name] = safetensors.tensor_in_memory(tensor.shape, tensor.dtype, partial(torch.clone, tensor))
        elif name in blocks.stored:
            stored = blocks.stored[name]
            entry = in_file(stored.path, stored.name)
            if safetensors.SAFETENSORS_TYPES.get(entry["dtype"]) == stored.dtype and stored.slice is None:
                tensors[name] = safetensors.tensor_in_file(stored.path, entry)
            else:
                tensors[name] = safetensors.tensor_in_memory(tensor.shape, stored.dtype, partial(blocks.read, name))
        else:
            raise CheckpointError(f"tensor {name} is in none of the model's files")
    carried = {} if text_only else blocks.unknown
    return tensors | {name: safetensors.tensor_in_file(path, in_file(path, name)) for name, path in carried.items()}


def load(model: str | Path, device: str = "auto", revision: str | None = None) -> nn.Module:
    """A compressed or dense model, ready to run, in the dtype it is stored in.

    Args:
        model: folder, hub name (or NAME@REVISION), or "demo".
        device: auto, cpu, cuda or cuda:N.

    Raises:
        UserError: nothing to load. CheckpointError: damaged files.
    """
    return load_model(resolve(model, revision), pick_device(device))


def load_tokenizer(folder: Path) -> Any:
    """The model's tokenizer.

    Raises:
        UserError: there is none. CheckpointError: config.json is damaged.
    """
    from transformers import AutoTokenizer

    check_numbers(folder)  # which it reads, too
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # malformed files make transformers raise anything
        raise UserError(f"{folder} has no tokenizer that loads: {first_line(error)}") from None


def vocabulary(model: Any) -> int:
    """Tokens a model knows: the rows of its input embedding."""
    return int(model.get_input_embeddings().weight.shape[0])


def positions(config: Any) -> int:
    """Tokens a model can attend to, by its configuration."""
    found = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else DEFAULT_POSITIONS


def pick_device(name: str) -> torch.device:
    """auto, cpu, cuda, cuda:N -> device.

    Raises:
        UserError: an unknown name, or a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is not known. Use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported. Use auto, cpu, cuda or cuda:N")
    return device
