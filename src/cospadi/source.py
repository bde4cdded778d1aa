"""Where the dense model comes from: a local folder or the hub; its skeleton, its weights, its tokenizer."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cospadi import checkpoint
from cospadi.errors import CheckpointError, UserError, first_line

log = logging.getLogger("cospadi")

OUTPUTS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
"""What a forward pass gives back, whatever a model's configuration says."""

MOST_LABELS = 10_000
DEFAULT_POSITIONS = 2048
DEMO = "demo"
"""Model name that stands for the built-in demo model."""


@dataclass(frozen=True)
class Skeleton:
    """A model's architecture without its weights.

    Attributes:
        model: on the meta device.
        sizes: tensor name -> bytes of all tensors in the checkpoint, by its headers; None if they are not to be had.
    """

    model: nn.Module
    sizes: dict[str, int] | None


def resolve(model: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """The local folder of a model; a hub model is downloaded (its weights only if asked).

    Raises:
        UserError: no such folder and no such hub model, or no network.
    """
    path = checkpoint.local_path(model, "model")
    if str(model) == DEMO and not path.exists():
        from cospadi.demo import model_path

        return model_path()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is not a model folder: it has no config.json")
        return path
    name = str(model)
    if path.exists():
        raise UserError(f"{path} is a file; a model is a folder with config.json and safetensors files")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"model folder {name} does not exist")
    import huggingface_hub

    try:
        wanted = [*checkpoint.COMPANIONS, *(["*.safetensors"] if weights else [])]
        # Some models carry a second copy of their weights, which transformers does not read.
        unwanted = ["consolidated*", "original/*"]
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted)
        )
    except Exception as error:  # many kinds: no network, no such repository, no access, a bad name
        raise UserError(
            f"model {name} is neither a local folder nor to be had from the hub: {first_line(error)}"
        ) from None


def read_config(folder: Path) -> Any:
    """The model's configuration.

    Raises:
        UserError: not a readable one.
    """
    from transformers import AutoConfig

    labels = checkpoint.read_json(folder / "config.json").get("num_labels")
    if isinstance(labels, int) and labels > MOST_LABELS:  # each would get a name
        raise CheckpointError(f"{folder / 'config.json'} asks for {labels} labels, which no language model has")
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


def load_skeleton(model: str | Path, revision: str | None = None) -> Skeleton:
    """Read config and safetensors headers only, and build the model on the meta device.

    Its experts multiply in the one way that runs there in every dtype.
    """
    from transformers import AutoModelForCausalLM

    folder = resolve(model, revision, weights=False)
    config = load_config(folder)
    sizes = _stored_sizes(model, folder, revision)
    if sizes is not None:
        check_blocks(config, folder, len(sizes))
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(
                config, dtype=config.dtype, trust_remote_code=False, experts_implementation="batched_mm"
            ).eval()
    except Exception as error:  # a model class may raise anything on a config it cannot build
        raise UserError(f"{model} does not build a causal language model: {first_line(error)}") from None
    return Skeleton(skeleton, sizes)


def _stored_sizes(model: str | Path, folder: Path, revision: str | None) -> dict[str, int] | None:
    files = checkpoint.weight_files(folder)
    if files and all(path.exists() for path in files):
        return checkpoint.tensor_sizes(folder)
    if Path(model).exists():
        return None
    import huggingface_hub

    try:
        metadata = huggingface_hub.get_safetensors_metadata(str(model), revision=revision)
    except Exception:  # the figure is a courtesy
        return None
    return {
        name: tensor.data_offsets[1] - tensor.data_offsets[0]
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    }


def load_model(folder: Path, device: torch.device) -> nn.Module:
    """A model, dense or compressed, in the dtype it is stored in, for inference.

    Raises:
        UserError: no safetensors files, a model that is no causal LM. CheckpointError: damaged files.
    """
    from transformers import AutoModelForCausalLM

    files = checkpoint.weight_files(folder)
    if not files:
        raise UserError(
            f"{folder} has no safetensors files. Pickled weights are never loaded: "
            "convert them first (model.save_pretrained writes safetensors)"
        )
    check_blocks(read_config(folder), folder, len(checkpoint.tensor_sizes(folder)))
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", use_safetensors=True, trust_remote_code=False, **OUTPUTS
        )
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a model class may raise anything on a config or an index that is damaged
        raise UserError(f"{folder} cannot be loaded: {first_line(error)}") from None
    return model.to(device).eval()


def load(model: str | Path, device: str = "auto", revision: str | None = None) -> nn.Module:
    """A compressed or dense model, ready to run, in the dtype it is stored in.

    Args:
        model: folder, hub name or "demo".
        device: auto, cpu, cuda or cuda:N.

    Raises:
        UserError: nothing to load. CheckpointError: damaged files.
    """
    return load_model(resolve(model, revision), pick_device(device))


def load_tokenizer(folder: Path) -> Any:
    """The model's tokenizer.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # malformed files make transformers raise anything
        raise UserError(f"{folder} has no tokenizer that loads: {first_line(error)}") from None


def vocabulary(model: Any) -> int:
    """Tokens a model knows: the rows of its input embedding."""
    return int(model.get_input_embeddings().weight.shape[0])


def positions(config: Any) -> int:
    """Tokens a model can attend to, by its configuration."""
    text = config.get_text_config(decoder=True)
    return int(getattr(text, "max_position_embeddings", None) or DEFAULT_POSITIONS)


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
