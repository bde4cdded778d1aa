"""Tokens a second beside llama.cpp's integers of few bits, on one model of the same shape; all take turns.

    python benchmarks/random_model.py Llama-3.2-1B OUT --bits 2 --bits 3
    python benchmarks/llama_cpp.py OUT/dense OUT/coded-2 OUT/coded-3 --programs FOLDER --type Q2_K --type Q3_K_M

FOLDER holds llama-quantize and llama-bench, built from llama.cpp's sources for this processor:

    cmake -B build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF
    cmake --build build --target llama-quantize llama-bench

The dense model goes into a GGUF file as it is, without a tokenizer (and with queries and keys in transformers' order of
rows, which changes what it says and not how fast); llama-quantize makes the others of it, embeddings left in bf16 as
they are in ours. Needs the package gguf. A line is a model: bits a weight of the projections in the file, bytes of all
tensors in memory, and tokens a second of one sequence, median and half the range over the rounds.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors import safe_open

from cospadi.commands.inspect import inspect_json
from cospadi.format import safetensors
from cospadi.format.verify import read_checkpoint
from cospadi.model.load import load_config

try:
    import gguf
except ImportError:
    sys.exit("This needs the package gguf: pip install --no-deps gguf==0.19.0")

PROMPTS, TOKENS = (128, 512), 16
"""Lengths of prompts, and the tokens that are generated together."""


def write_gguf(folder: Path, path: Path) -> None:
    """A dense Llama in bf16, its norms in float32."""
    config: Any = load_config(folder)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)
                theirs = names.get_name(name, try_suffixes=(".weight",))
                assert theirs is not None, name
                if tensor.ndim == 1:
                    writer.add_tensor(theirs, tensor.float().numpy())
                else:
                    bits = tensor.bfloat16().view(torch.uint8).numpy()
                    writer.add_tensor(theirs, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def bits_of_gguf(path: Path) -> float:
    """Bits a weight of the projections of a GGUF file, all told."""
    matrices = [one for one in gguf.GGUFReader(path).tensors if one.name.startswith("blk.") and len(one.shape) == 2]
    return float(8 * sum(one.n_bytes for one in matrices) / sum(one.n_elements for one in matrices))


def bits_of_ours(folder: Path) -> float:
    """The same of a compressed folder; 16 of a dense one."""
    entries, manifest = read_checkpoint(folder)
    found = inspect_json(entries, manifest, safetensors.stored_tensors(folder))
    return float(16 * found["compressed_bytes"] / found["dense_bytes"])


def run_theirs(program: Path, path: Path, threads: int) -> list[float]:
    """Tokens a second of each prompt, and of generating."""
    words = [program, "-m", path, "-p", ",".join(map(str, PROMPTS)), "-n", TOKENS, "-t", threads, "-r", 1, "-o", "json"]
    told = subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True).stdout
    found = {(one["n_prompt"], one["n_gen"]): one["avg_ts"] for one in json.loads(told)}
    return [found[length, 0] for length in PROMPTS] + [found[0, TOKENS]]


def run_ours(folder: Path, threads: int) -> tuple[list[float], int]:
    """The same, and the bytes of its tensors in memory."""
    words = [sys.executable, "-c", "from cospadi_cli import main; main()", "bench", folder, "--json", "--repeats", 1]
    words += ["--tokens", TOKENS, "--batch", 1, "--threads", threads]
    words += [word for length in PROMPTS for word in ("--prefill", length)]
    told = subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True).stdout
    (found,) = json.loads(told)["models"]
    return [speed["tokens_per_second"] for speed in found["speeds"]], found["tensor_bytes"]


def main(
    dense: Path,
    compressed: list[Path],
    programs: Annotated[Path, typer.Option(help="folder of llama-quantize and llama-bench")],
    kind: Annotated[list[str], typer.Option("--type", help="llama-quantize's, repeatable")],
    rounds: int = 5,
    threads: int = torch.get_num_threads(),
) -> None:
    """Write the GGUF files beside the dense model, and time all."""
    whole = dense.parent / "dense.gguf"
    if not whole.exists():
        write_gguf(dense, whole)
    files = {"llama.cpp BF16": whole}
    for name in kind:
        files[f"llama.cpp {name}"] = path = dense.parent / f"{name}.gguf"
        if not path.exists():
            as_they_are = ["--token-embedding-type", "bf16", "--output-tensor-type", "bf16"]
            quantize = [str(programs / "llama-quantize"), *as_they_are, str(whole), str(path), name, str(threads)]
            subprocess.run(quantize, check=True, capture_output=True)
    bits = {name: bits_of_gguf(path) for name, path in files.items()}
    bits |= {"dense": 16.0} | {folder.name: bits_of_ours(folder) for folder in compressed}
    ours = {"dense": dense} | {folder.name: folder for folder in compressed}
    speeds: dict[str, list[list[float]]] = {name: [] for name in bits}
    memory = {name: path.stat().st_size for name, path in files.items()}
    for _ in range(rounds):
        for name, path in files.items():
            speeds[name].append(run_theirs(programs / "llama-bench", path, threads))
        for name, folder in ours.items():
            found, memory[name] = run_ours(folder, threads)
            speeds[name].append(found)
    print(f"| model | bits | in memory | {' | '.join(f'prompt of {length}' for length in PROMPTS)} | generating |")
    print("|---|---|---|---|---|---|")
    for name in sorted(bits, key=lambda name: (-bits[name], name)):
        cells = [
            f"{statistics.median(runs):.1f} ± {50 * (max(runs) - min(runs)) / statistics.median(runs):.0f} %"
            for runs in zip(*speeds[name], strict=True)
        ]
        print(f"| {name} | {bits[name]:.2f} | {memory[name] / 1e6:,.0f} MB | {' | '.join(cells)} |")


if __name__ == "__main__":
    typer.run(main)
