"""Tokens per second and memory of models side by side: `cospadi bench`.

Timed runs take turns: every repeat runs every model once, so that a machine that slows down slows them all. Memory is
measured in a fresh process a model, since a process cannot tell whose peak it was.
"""

from __future__ import annotations

import mmap
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from cospadi.commands import tables
from cospadi.errors import UserError
from cospadi.jobs.progress import Stages, peak_memory
from cospadi.model import load
from cospadi.runtime.layer import CompressedLinear, Runtime, set_runtime

PREFILL_TOKENS = (128, 512)
DECODE_BATCHES = (1, 4, 16)
PROMPT = 32
"""Tokens in the cache before decoding is timed."""


@dataclass(frozen=True)
class Speed:
    """Tokens a second of one model at one kind of run, over the repeats.

    Attributes:
        kind: "prefill" (one sequence of `size` tokens) or "decode" (`size` sequences, one new token a step each).
    """

    kind: str
    size: int
    tokens_per_second: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.tokens_per_second)

    @property
    def spread(self) -> float:
        """Half the range over the median."""
        return (max(self.tokens_per_second) - min(self.tokens_per_second)) / 2 / self.median


@dataclass(frozen=True)
class Memory:
    """Bytes of one model in a process of its own; None where the system does not tell.

    Attributes:
        weights: growth of the resident set from before loading to after one token (allocated, on a GPU).
        peak: the largest resident set, with the largest batch decoded and the longest prefill (allocated, on a GPU).
        tensors: bytes of the model's parameters and buffers, each storage once.
        load_seconds: from before from_pretrained to after one token, when every weight has been read, in a process
            that has torch and transformers loaded.
    """

    weights: int | None
    peak: int | None
    tensors: int
    load_seconds: float


@dataclass(frozen=True)
class Benched:
    """One model's figures."""

    name: str
    memory: Memory
    speeds: list[Speed]


def bench(
    models: Sequence[str | Path],
    prefill: Sequence[int] = PREFILL_TOKENS,
    batches: Sequence[int] = DECODE_BATCHES,
    tokens: int = 16,
    repeats: int = 5,
    device: str = "auto",
    runtime: Runtime = "auto",
    stages: Stages | None = None,
) -> list[Benched]:
    """Measure models side by side, in the dtypes they are stored in.

    Args:
        models: folders, hub names or "demo"; compressed and dense ones.
        prefill: lengths of prompts to time.
        batches: numbers of sequences to time decoding with.
        tokens: decoding steps that are timed together.
        repeats: timed runs of each, after one that is not timed.
        runtime: of compressed layers, see `cospadi.runtime.layer.set_runtime`.

    Raises:
        UserError: models that cannot be read, or sizes that their positions do not hold.
    """
    where = load.pick_device(device)
    stages = stages or Stages()
    folders = [load.resolve(model) for model in models]
    _check_sizes(folders, prefill, batches, tokens, repeats)
    with stages.stage("memory", len(folders)) as progress:
        memory = []
        for folder in folders:
            memory.append(_in_new_process(folder, max(prefill), max(batches), where, runtime))
            progress.advance(1)
    with stages.stage("load", len(folders)) as progress:
        networks = []
        for folder in folders:
            networks.append(_loaded(folder, where, runtime))
            progress.advance(1)
    runs = [("prefill", size) for size in prefill] + [("decode", size) for size in batches]
    speeds: list[list[Speed]] = [[] for _ in networks]
    with stages.stage("bench", len(runs) * (repeats + 1)) as progress:
        for kind, size in runs:
            seconds: list[list[float]] = [[] for _ in networks]
            for repeat in range(repeats + 1):
                for taken, network in zip(seconds, networks, strict=True):
                    one = _prefill(network, size, where) if kind == "prefill" else _decode(network, size, tokens, where)
                    if repeat:  # the first warms up
                        taken.append(one)
                progress.advance(1)
            done = size if kind == "prefill" else size * tokens
            for of_model, taken in zip(speeds, seconds, strict=True):
                of_model.append(Speed(kind, size, [done / one for one in taken]))
    return [
        Benched(str(name), measured, of_model) for name, measured, of_model in zip(models, memory, speeds, strict=True)
    ]


def _check_sizes(
    folders: Sequence[Path], prefill: Sequence[int], batches: Sequence[int], tokens: int, repeats: int
) -> None:
    for flag, values in (
        ("--prefill", prefill),
        ("--batch", batches),
        ("--tokens", [tokens]),
        ("--repeats", [repeats]),
    ):
        if any(value < 1 for value in values):
            raise UserError(f"{flag} must be at least 1")
    longest = max([*prefill, PROMPT + tokens])
    for folder in folders:
        room = load.positions(load.read_config(folder))
        if longest > room:
            raise UserError(f"{folder} has {room} positions, and {longest} tokens were asked for. Use smaller sizes")


def _loaded(folder: Path, where: torch.device, runtime: Runtime) -> nn.Module:
    model = load.load_model(folder, where)
    set_runtime(model, runtime)
    return model


def _tokens(model: nn.Module, rows: int, length: int, where: torch.device) -> Tensor:
    config: Any = model.config
    vocabulary = config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (rows, length), generator=generator).to(where)


@torch.inference_mode()
def _prefill(model: Any, length: int, where: torch.device) -> float:
    """Seconds of one forward pass over a prompt, with the logits of its last token."""
    ids = _tokens(model, 1, length, where)
    start = _now(where)
    model(input_ids=ids, use_cache=True, logits_to_keep=1)
    return _now(where) - start


@torch.inference_mode()
def _decode(model: Any, rows: int, steps: int, where: torch.device) -> float:
    """Seconds of `steps` greedy steps of `rows` sequences, after a prompt that is not timed."""
    output = model(input_ids=_tokens(model, rows, PROMPT, where), use_cache=True, logits_to_keep=1)
    start = _now(where)
    for _ in range(steps):
        chosen = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=chosen, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
    return _now(where) - start


def _now(where: torch.device) -> float:
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    return time.perf_counter()


def memory_of_loading(folder: Path, where: torch.device) -> Memory:
    """What a model takes that is loaded and gives one token, in a process of its own.

    Raises:
        MemoryError: the process was killed.
    """
    return _in_new_process(folder, 1, 1, where, "auto")


def _in_new_process(folder: Path, length: int, rows: int, where: torch.device, runtime: Runtime) -> Memory:
    # Spawned, not forked: a fork would start with this process's memory.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        arguments = folder, length, rows, str(where), runtime, torch.get_num_threads()
        try:
            return pool.submit(_measure_memory, *arguments).result()
        except BrokenProcessPool:
            raise MemoryError(f"the process that loaded {folder} was killed") from None


def _measure_memory(folder: Path, length: int, rows: int, device: str, runtime: Runtime, threads: int) -> Memory:
    """Runs in a process of its own."""
    torch.set_num_threads(threads)
    where = torch.device(device)
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # What libraries load and allocate on first use is not the model's memory.
    _decode(load.load_model(load.resolve("demo"), where), 1, 1, where)
    before = _resident(where)
    start = _now(where)
    model = load.load_model(folder, where)
    set_runtime(model, runtime)
    _prefill(model, 1, where)  # touches every weight, and little else
    load_seconds = _now(where) - start
    weights = _resident(where)
    _decode(model, rows, 1, where)
    _prefill(model, length, where)
    grown = None if before is None or weights is None else weights - before
    return Memory(grown, _peak(where), tensor_bytes(model), load_seconds)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, buffers, and what its layers keep beside them, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            tensors += module.kept_tensors()
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def memory_of_layers(folder: Path) -> dict[str, Any]:
    """Bytes that the compressed layers and the whole model take in this machine's memory, once each layer has run.

    Raises:
        UserError: the model cannot be loaded.
    """
    model = load.load_model(folder, torch.device("cpu"))
    layers = [module for module in model.modules() if isinstance(module, CompressedLinear)]
    with torch.inference_mode():
        for layer in layers:
            layer(torch.zeros(1, layer.in_features, dtype=layer.dtype))
    taken, weights = tensor_bytes(nn.ModuleList(layers)), sum(one.in_features * one.out_features for one in layers)
    return {
        "layers_bytes": taken,
        "layers_bits": 8 * taken / weights if weights else 0.0,
        "model_bytes": tensor_bytes(model),
    }


def _resident(where: torch.device) -> int | None:
    if where.type == "cuda":
        return torch.cuda.memory_allocated(where)
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * mmap.PAGESIZE if status.exists() else None


def _peak(where: torch.device) -> int | None:
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated(where)
    return peak_memory()


def bench_json(results: Sequence[Benched]) -> dict[str, Any]:
    """Figures of `cospadi bench` for machines; the first model is the one that others are compared with."""
    return {
        "models": [
            {
                "model": result.name,
                "load_seconds": round(result.memory.load_seconds, 3),
                "tensor_bytes": result.memory.tensors,
                "resident_weight_bytes": result.memory.weights,
                "peak_resident_bytes": result.memory.peak,
                "speeds": [
                    {
                        "kind": speed.kind,
                        "size": speed.size,
                        "tokens_per_second": round(speed.median, 3),
                        "spread": round(speed.spread, 4),
                        "against_first": round(speed.median / first.median, 4),
                        "runs": [round(run, 3) for run in speed.tokens_per_second],
                    }
                    for speed, first in zip(result.speeds, results[0].speeds, strict=True)
                ],
            }
            for result in results
        ]
    }


def bench_table(results: Sequence[Benched]) -> Table:
    """A line a kind of run: median tokens a second of each model, the spread, and the ratio to the first."""
    table = tables.new_table("", *(result.name for result in results))
    for index, first in enumerate(results[0].speeds):
        what = f"{first.size} tokens" if first.kind == "prefill" else f"batch {first.size}"
        cells = []
        for result in results:
            speed = result.speeds[index]
            ratio = "" if result is results[0] else f"  {speed.median / first.median:.2f}x"
            cells.append(f"{speed.median:,.1f} ± {100 * speed.spread:.0f}%{ratio}")
        table.add_row(f"{first.kind}, {what}, tokens/s", *cells)
    table.add_section()
    table.add_row("weights, as stored in memory", *(tables.megabytes(result.memory.tensors) for result in results))
    table.add_row("resident after one token", *(tables.megabytes(result.memory.weights) for result in results))
    table.add_row("peak resident", *(tables.megabytes(result.memory.peak) for result in results))
    table.add_row("loading and one token", *(f"{result.memory.load_seconds:.1f} s" for result in results))
    return table
