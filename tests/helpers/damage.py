"""Ways in which a model's folder goes wrong, each chosen by a seed."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Damage = Callable[[random.Random, Path], tuple[str, ...] | None]
"""Damages a folder; returns what a refusal has to mention one of, or None where what is left is a model like another. A
damage that may leave a usable model ends its tuple with an empty string."""

EITHER = ""


def _weights(rng: random.Random, folder: Path) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def _change(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    path.unlink()  # it may be a link to a file that others use
    save_file(tensors, path, {"format": "pt"})


def _some_tensor(rng: random.Random, folder: Path) -> tuple[Path, str]:
    path = _weights(rng, folder)
    return path, rng.choice(sorted(load_file(path)))


def drop(rng: random.Random, folder: Path) -> tuple[str, ...]:
    path, name = _some_tensor(rng, folder)

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    _change(path, change)
    return name, path.name


def truncate(rng: random.Random, folder: Path) -> tuple[str, ...]:
    path = _weights(rng, folder)
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: rng.randrange(len(content))])
    return (path.name,)


def garble(rng: random.Random, folder: Path) -> tuple[str, ...]:
    """Bytes of the header."""
    path = _weights(rng, folder)
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little")
    for _ in range(rng.randint(1, 4)):
        content[rng.randrange(8 + header)] = rng.randrange(256)
    path.unlink()
    path.write_bytes(bytes(content))
    return path.name, "tensor", EITHER


def rename(rng: random.Random, folder: Path) -> tuple[str, ...]:
    path, name = _some_tensor(rng, folder)
    other = rng.choice([name + "_", name.replace("layers", "blocks"), name.upper(), f"module.{name}"])
    _change(path, lambda tensors: tensors.update({other: tensors.pop(name)}))
    return name, path.name, *([EITHER] if other == name else [])


def reshape(rng: random.Random, folder: Path) -> tuple[str, ...]:
    path, name = _some_tensor(rng, folder)

    def change(tensors: dict[str, Tensor]) -> None:
        tensor = tensors[name]
        twice = tensor.repeat(2, *[1] * (tensor.ndim - 1))
        tensors[name] = rng.choice([tensor[:-1], tensor[None], tensor.flatten()[:1], twice]).contiguous()

    _change(path, change)
    return name, path.name


def retype(rng: random.Random, folder: Path) -> tuple[str, ...]:
    path, name = _some_tensor(rng, folder)
    dtype = rng.choice(
        [torch.int8, torch.int64, torch.bool, torch.uint8, torch.float64, torch.float16, torch.float8_e4m3fn]
    )
    _change(path, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    return name, path.name, *([EITHER] if dtype.is_floating_point else [])


def swap_shards(rng: random.Random, folder: Path) -> tuple[str, ...]:
    """Two files change their names; of a model in one file, its tensors change places."""
    paths = sorted(folder.glob("*.safetensors"))
    if len(paths) > 1:
        one, other = rng.sample(paths, 2)
        aside = folder / "aside"
        one.rename(aside)
        other.rename(one)
        aside.rename(other)
        return one.name, other.name, "tensor", EITHER

    def change(tensors: dict[str, Tensor]) -> None:
        one, other = rng.sample(sorted(tensors), 2)
        tensors[one], tensors[other] = tensors[other], tensors[one]

    _change(paths[0], change)
    return "tensor", EITHER


def wrong_index(rng: random.Random, folder: Path) -> tuple[str, ...] | None:
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        return None
    index = json.loads(path.read_text())
    names, files = sorted(index["weight_map"]), sorted(set(index["weight_map"].values()))
    name = rng.choice(names)
    kind = rng.randrange(6)
    if kind == 0:
        index["weight_map"][name] = "no-such.safetensors"
    elif kind == 1:
        index["weight_map"][name] = rng.choice(files)
    elif kind == 2:
        del index["weight_map"][name]
    elif kind == 3:
        index["weight_map"][name] = rng.choice(["../x.safetensors", "/etc/passwd", 5, None, ["a"]])
    elif kind == 4:
        index["weight_map"]["no.such.tensor"] = files[0]
    else:
        index["weight_map"] = rng.choice([[], "x", None, {}])
    path.unlink()
    path.write_text(json.dumps(index))
    return path.name, name, "no-such.safetensors", "tensor", "safetensors files", EITHER


def not_finite(rng: random.Random, folder: Path) -> tuple[str, ...]:
    path, name = _some_tensor(rng, folder)
    value = rng.choice([float("nan"), float("inf"), -float("inf")])

    def change(tensors: dict[str, Tensor]) -> None:
        flat = tensors[name].flatten()
        flat[rng.randrange(len(flat))] = value

    _change(path, change)
    return (name,)


def zeros(rng: random.Random, folder: Path) -> None:
    """A row, a column or all of a tensor."""
    path, name = _some_tensor(rng, folder)

    def change(tensors: dict[str, Tensor]) -> None:
        tensor = tensors[name]
        place = rng.randrange(3)
        if place == 0:
            tensor.zero_()
        else:
            tensor.select(min(place - 1, tensor.ndim - 1), 0).zero_()

    _change(path, change)


def duplicate(rng: random.Random, folder: Path) -> tuple[str, ...] | None:
    """A tensor of one file in another too, with other values."""
    paths = sorted(folder.glob("*.safetensors"))
    if len(paths) < 2:
        return None
    one, other = rng.sample(paths, 2)
    name = rng.choice(sorted(load_file(one)))
    tensor = load_file(one)[name]
    _change(other, lambda tensors: tensors.update({name: tensor + 1}))
    return name, one.name, other.name


def lose_a_file(rng: random.Random, folder: Path) -> tuple[str, ...]:
    path = rng.choice([*sorted(folder.glob("*.safetensors")), folder / "config.json"])
    path.unlink()
    return path.name, "safetensors files", str(folder)


LIES: dict[str, tuple[Any, ...]] = {
    "num_attention_heads": (1, 2, 3, 8, 0, -4, 10**9, "4", None),
    "num_key_value_heads": (1, 3, 4, 0, 10**9),
    "head_dim": (1, 8, 24, 0, 10**8),
    "hidden_size": (24, 47, 96, 0, 10**9, -1),
    "intermediate_size": (1, 79, 10**9),
    "num_hidden_layers": (0, 1, 3, 50, 10**7),
    "vocab_size": (1, 100, 261, 10**9, 10**12),
    "max_position_embeddings": (1, 2, 10**9, -5),
    "tie_word_embeddings": (True, "yes"),
    "dtype": ("float16", "float32", "float64", "int8", "nonsense"),
    "rope_parameters": (
        {"rope_type": "linear"}, {"rope_type": "yarn", "factor": 0}, {"rope_theta": "x"}, [],
        {"rope_theta": float("inf")},
    ),
    "rope_theta": (0, -1.0, 1e30, "x"),
    "rms_norm_eps": (0, -1, 1e9, "x"),
    "hidden_act": ("gelu", "nonsense", None),
    "model_type": ("mistral", "gpt2", "bert", "nonsense", "qwen3_moe"),
    "architectures": ([], ["MistralForCausalLM"], ["LlamaForSequenceClassification"], "LlamaForCausalLM", None),
    "quantization_config": ({"quant_method": "gptq"}, {"quant_method": "cospadi"}, {}, "x"),
    "attention_bias": (True,),
}  # fmt: skip


def lie(rng: random.Random, folder: Path) -> tuple[str, ...]:
    """A field of config.json that is not the weights'."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    field = rng.choice(sorted(LIES))
    config[field] = rng.choice(LIES[field])
    path.unlink()
    path.write_text(json.dumps(config))
    return path.name, "tensor", str(folder), "model.layers", EITHER


OF_SEVERAL_FILES = {"swap shards", "wrong index", "duplicate"}

DAMAGES: dict[str, Damage] = {
    "drop": drop, "truncate": truncate, "garble": garble, "rename": rename, "reshape": reshape, "retype": retype,
    "swap shards": swap_shards, "wrong index": wrong_index, "not finite": not_finite, "zeros": zeros,
    "duplicate": duplicate, "lose a file": lose_a_file, "lie": lie,
}  # fmt: skip


def damaged(source: Path, folder: Path, kind: str, seed: int) -> tuple[str, ...] | None:
    """Copy a folder, and damage the copy; as `Damage`."""
    shutil.copytree(source, folder)
    return DAMAGES[kind](random.Random(f"{kind} {seed}"), folder)
