"""A GPU in one command: are the kernels right, how fast are they and whole models, how long does a job take?

    python benchmarks/gpu.py
    python benchmarks/gpu.py --shape 2048x8192 --ratio 0.4 --bits 14 --dictionary identity --json gpu.json

Needs an NVIDIA GPU and Triton; exits with 2 where they are missing and with 1 where a result is wrong or a part has
failed; the other parts run all the same.

First every kernel is held to products in float64, at real and at odd shapes. Then each step is timed in bf16: dense
F.linear, z = x D, y = z S by the kernel, and both; and levels of a code, as they lie in a GPU's memory. One CUDA
graph holds a call for each of several copies of the weights, which together exceed four times the L2 cache, so that
each call finds its weights in memory; its replays are timed by CUDA events. A figure is the median over replays, the
spread half the distance of the quartiles. GB/s are weight bytes as stored over time; the bandwidth beside them is
that of a copy of 1 GiB, read and write counted.

Then whole models of random weights in a real one's shape, dense, at ratio 0.4 and of levels, with their memory; and
the dense one is compressed, both ways, calibrated on random words: seconds of each stage, in passes of the calibration
text, too, and the peak of the GPU's memory. What is known so far is written after every part, so that a limit of time
loses only what follows.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import random_model
import torch
import typer
from linear import even_size
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, StaticCache

import cospadi
from cospadi.commands.bench import _decode as decode
from cospadi.commands.bench import _prefill as prefill
from cospadi.commands.compress import compressed_json, compressed_table
from cospadi.format import packing
from cospadi.format.codecs import codec_of_bits
from cospadi.format.dictionaries import DICTIONARIES
from cospadi.format.form import Form
from cospadi.model import load
from cospadi.model.projections import find_projections
from cospadi.recipe import Recipe
from cospadi.runtime import reference
from cospadi.runtime import triton as kernels
from cospadi.runtime.layer import CompressedLinear
from cospadi.runtime.levels import EQUAL_WIDTHS, Levels, dense, pack_levels

SHAPES = ["2048x512", "2048x2048", "2048x8192", "8192x2048", "4096x14336", "14336x4096"]
ROWS = [1, 4, 16, 128, 512, 2048]
CHECKED = [
    ("2048x8192", 0.4),
    ("4096x14336", 0.2),
    ("2048x512", 0.5),
    ("1001x777", 0.3),
    ("97x2051", 0.4),
    ("33x5", 0.2),
]
CHECKED_ROWS = [1, 3, 4, 5, 16, 17, 128, 300]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Error of a product in relation to its norm: the rounding of the result, or that of sums in float32."""

MODEL = "Llama-3.2-1B"
RATIO, BITS = 0.4, 3.0
"""Sizes that the jobs compress a whole model to; the first, of whole models that are timed, too."""

KINDS: dict[str, int | None] = {f"ratio {RATIO:g}": None} | {f"levels of {bits} bits": bits for bits in EQUAL_WIDTHS}
"""Whole models that are timed, and the bits of their levels in memory."""

PROMPTS = (512, 2048)
WORDS = 400_000
"""Of the random text that jobs calibrate on."""

STEP_PROMPT = 128
"""Tokens behind a step that is one graph."""

CACHES = 4
"""Copies of the weights exceed the L2 cache this many times."""


class Coefficients(NamedTuple):
    """S as the kernels take it."""

    support: Tensor
    values: Tensor
    offsets: Tensor
    k: int
    bits: int

    @property
    def bytes(self) -> int:
        """What a checkpoint stores: the mask and the values."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.support, self.values))

    def copy(self) -> Coefficients:
        return Coefficients(self.support.clone(), self.values.clone(), self.offsets.clone(), self.k, self.bits)

    def times(self, z: Tensor) -> Tensor:
        """z S by the kernel under test."""
        return kernels.sparse_matmul(z, self.support, self.values, self.offsets, self.k, self.bits)


def main(
    shape: Annotated[list[str] | None, typer.Option(help="d1xd2, repeatable")] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="repeatable")] = None,
    bits: Annotated[list[int] | None, typer.Option(help="14 or 16, repeatable")] = None,
    dictionary: Annotated[list[str] | None, typer.Option(help="identity or stored, repeatable")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="rows of x, repeatable")] = None,
    replays: Annotated[int, typer.Option(min=2)] = 30,
    model: Annotated[str, typer.Option(help=f"shape of whole models: {', '.join(random_model.CONFIGS)}")] = MODEL,
    check_only: bool = False,
    save: Annotated[Path | None, typer.Option("--json", help="also write everything as JSON")] = None,
) -> None:
    """Check the kernels, time them, whole models and jobs, and print tables."""
    if model not in random_model.CONFIGS:
        raise typer.BadParameter(f"--model {model} is not known. Use {', '.join(random_model.CONFIGS)}")
    if not torch.cuda.is_available():
        _refuse("There is no NVIDIA GPU that torch can use on this machine: nothing was checked or timed.")
    if not kernels.AVAILABLE:
        _refuse("Triton is not installed: run pip install triton, in the version that torch requires.")
    if kernels.INTERPRETED:
        _refuse("TRITON_INTERPRET is set, and Triton's interpreter would be timed: unset it.")
    torch.manual_seed(0)
    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    print(f"{properties.name}, torch {torch.__version__}\n")
    cold, shapes, counts = CACHES * int(properties.L2_cache_size), shape or SHAPES, rows or ROWS
    report: dict[str, Any] = {"device": properties.name, "torch": torch.__version__, "failed": {}}

    def part(name: str, run: Callable[[], Any]) -> None:
        begun = time.perf_counter()
        try:
            report[name] = run()
        except Exception:  # whatever a driver, a compiler or this script meets
            report["failed"][name] = traceback.format_exc()
            print(f"\n{name} failed:\n{report['failed'][name]}", flush=True)
        print(f"\n({name}: {time.perf_counter() - begun:.0f} s)", flush=True)
        if save:
            save.write_text(json.dumps(report, indent=1) + "\n")

    def timed() -> list[dict[str, Any]]:
        given = ratio or [0.2, 0.4, 0.5], bits or [14, 16], dictionary or list(DICTIONARIES), counts
        heading("D", "ratio", "bits", "k", "rows", "dense", "x D", "z S", "both", "x dense", "bytes x dense")
        return [row for one in shapes for row in time_shape(one, *given, cold, replays, report["copy_gb_s"], device)]

    def timed_levels() -> list[dict[str, Any]]:
        heading("bits", "rows", "dense", "levels", "x dense", "bytes x dense")
        return [row for one in shapes for row in time_levels(one, counts, cold, replays, report["copy_gb_s"], device)]

    def heading(*columns: str) -> None:
        print(
            f"\nCopy bandwidth {report['copy_gb_s']:.0f} GB/s; weights of at least {cold / 2**20:.0f} MiB in turn; "
            "microseconds, with spread; x dense: how many times faster than dense, or smaller; GB/s of S or levels\n"
        )
        columns = ("d1 x d2", *columns, "GB/s", "of copy")
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")

    part("checks", lambda: check(device))
    part("level_checks", lambda: check_levels(device))
    if not check_only:
        part("copy_gb_s", lambda: copy_bandwidth(device, replays))
        part("rows", timed)
        part("level_rows", timed_levels)
        with tempfile.TemporaryDirectory() as scratch:
            part("models", lambda: time_models(model, device))
            part("written", lambda: write_dense(model, Path(scratch), device))
            for name, size in (("coded", {"bits": BITS}), ("sparse", {"ratio": RATIO})):
                part(f"job_{name}", partial(time_job, Path(scratch), device, size))
    checks = [*report.get("checks", []), *report.get("level_checks", [])]
    if report["failed"] or not all(one["right"] for one in checks):
        raise typer.Exit(1)


def check(
    device: torch.device, shapes: list[tuple[str, float]] = CHECKED, row_counts: list[int] = CHECKED_ROWS
) -> list[dict[str, Any]]:
    """Hold every kernel to float64; print and return the worst error of each shape, width and dtype."""
    print("| d1 x d2 | ratio | bits | dtype | worst error | allowed | |\n|---|---|---|---|---|---|---|")
    found = []
    for shape, ratio in shapes:
        d1, d2 = map(int, shape.split("x"))
        for bits in (14, 16):
            k, s = even_size(Form("stored", "mask", codec_of_bits(bits)), ratio, d1, d2)
            coefficients = random_coefficients(k, d2, s, bits, device)
            dense = reference.coefficients(
                coefficients.support, coefficients.values, d2, k, "mask", codec_of_bits(bits), torch.float64
            ).T
            for dtype, allowed in TOLERANCE.items():
                known = {"shape": shape, "ratio": ratio, "bits": bits}
                found.append(known | _held_to(dense, coefficients.times, dtype, allowed, row_counts, known))
    return found


def _held_to(
    matrix: Tensor,
    product: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    allowed: float,
    row_counts: list[int],
    known: dict[str, Any],
) -> dict[str, Any]:
    """Compare a product with that of a float64 matrix (inputs, outputs), for several numbers of rows; print a line that
    begins with what is known, and return the worst error and whether all is right."""
    worst, repeatable = 0.0, True
    for count in row_counts:
        x = torch.randn(count, len(matrix), device=matrix.device).to(dtype)
        y, expected = product(x), x.double() @ matrix
        worst = max(worst, float((y.double() - expected).norm() / expected.norm()))
        repeatable &= torch.equal(y, product(x))
    right, name = worst <= allowed and repeatable, str(dtype).removeprefix("torch.")
    verdict = "ok" if right else "WRONG" if repeatable else "NOT REPEATABLE"
    cells = [*known.values(), name, f"{worst:.2e}", f"{allowed:.2e}", verdict]
    print(f"| {' | '.join(map(str, cells))} |", flush=True)
    return {"dtype": name, "error": worst, "right": right}


def random_levels(d1: int, d2: int, bits: int, device: torch.device) -> Levels:
    """Levels of so many bits, of which a few lie beside the others."""
    numbers = (2.0**bits / 6 * torch.randn(d2, d1, device=device)).round().to(torch.int16)
    outputs, inputs = (0.5 + torch.rand(size, device=device) for size in (d2, d1))
    return pack_levels(numbers, outputs, inputs, bits)


def check_levels(
    device: torch.device, shapes: list[tuple[str, float]] = CHECKED, row_counts: list[int] = CHECKED_ROWS
) -> list[dict[str, Any]]:
    """The same of levels of a code."""
    print("\n| d1 x d2 | bits of levels | dtype | worst error | allowed | |\n|---|---|---|---|---|---|")
    found = []
    for (shape, _), bits, (dtype, allowed) in product(shapes, EQUAL_WIDTHS, TOLERANCE.items()):
        d1, d2 = map(int, shape.split("x"))
        levels, known = random_levels(d1, d2, bits, device), {"shape": shape, "levels": bits}
        matrix = dense(levels).double().T
        allowed *= 2  # x times the steps of the inputs is rounded, too
        found.append(known | _held_to(matrix, partial(_multiply, levels), dtype, allowed, row_counts, known))
    return found


def _multiply(levels: Levels, x: Tensor) -> Tensor:
    return kernels.level_matmul(x, levels)


def time_levels(
    shape: str, row_counts: list[int], cold: int, replays: int, bandwidth: float, device: torch.device
) -> list[dict[str, Any]]:
    """Time levels of one projection; print and return a row for each width and number of rows."""
    d1, d2 = map(int, shape.split("x"))
    found = []
    weights = _copies(torch.randn(d2, d1, device=device, dtype=torch.bfloat16), 2 * d1 * d2, cold)
    for bits in EQUAL_WIDTHS:
        levels = random_levels(d1, d2, bits, device)
        size = sum(part.nbytes for part in levels)
        copies = [Levels(*(part.clone() for part in levels)) for _ in range(cold // size + 1)]
        for count in row_counts:
            x = torch.randn(count, d1, device=device, dtype=torch.bfloat16)
            times = {
                "dense": _time([_linear(x, weight) for weight in weights], replays),
                "levels": _time([partial(_multiply, one, x) for one in copies], replays),
            }
            reached, speedup = size / times["levels"][0] / 1e9, times["dense"][0] / times["levels"][0]
            row = {"shape": shape, "levels": bits, "rows": count, "seconds": times, "dense_bytes": 2 * d1 * d2}
            found.append(row | {"bytes": size, "speedup": speedup, "gb_s": reached})
            shown = " | ".join(f"{middle * 1e6:.1f} ± {spread * 1e6:.1f}" for middle, spread in times.values())
            print(
                f"| {shape} | {bits} | {count} | {shown} | {speedup:.2f} | {2 * d1 * d2 / size:.2f} | {reached:.0f} | "
                f"{reached / bandwidth:.0%} |",
                flush=True,
            )
    return found


def time_shape(
    shape: str,
    ratios: list[float],
    widths: list[int],
    kinds: list[str],
    row_counts: list[int],
    cold: int,
    replays: int,
    bandwidth: float,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Time one projection; print and return a row for each dictionary, ratio, width and number of rows."""
    d1, d2 = map(int, shape.split("x"))
    found = []
    weights = _copies(torch.randn(d2, d1, device=device, dtype=torch.bfloat16), 2 * d1 * d2, cold)
    inputs = {count: torch.randn(count, d1, device=device, dtype=torch.bfloat16) for count in row_counts}
    dense = {count: _time([_linear(x, weight) for weight in weights], replays) for count, x in inputs.items()}
    del weights
    for kind, ratio, bits in product(kinds, ratios, widths):
        form = Form(kind, "mask", codec_of_bits(bits))
        k, s = even_size(form, ratio, d1, d2)
        coefficients = random_coefficients(k, d2, s, bits, device)
        dictionary_bytes = form.dictionary_kind.nbytes(d1, k)
        stored = dictionary_bytes + coefficients.bytes
        sparse = _copies(coefficients, coefficients.bytes, cold)
        atoms, dictionaries = None, []
        if dictionary_bytes:
            atoms = torch.randn(k, d1, device=device, dtype=torch.bfloat16) * d1**-0.5
            dictionaries = _copies(atoms, dictionary_bytes, cold)
        pairs = range(-(-cold // stored))
        for count, x in inputs.items():
            z = x if atoms is None else x @ atoms.T
            times = {"dense": dense[count], "x D": (0.0, 0.0)}
            times["z S"] = times["both"] = _time([_sparse(z, one) for one in sparse], replays)
            if dictionaries:
                times["x D"] = _time([_linear(x, one) for one in dictionaries], replays)
                times["both"] = _time([_both(x, dictionaries[i], sparse[i]) for i in pairs], replays)
            reached = coefficients.bytes / times["z S"][0] / 1e9
            row = {"shape": shape, "dictionary": kind, "ratio": ratio, "bits": bits, "k": k, "s": s, "rows": count}
            row |= {
                "seconds": times,
                "dense_bytes": 2 * d1 * d2,
                "bytes": stored,
                "sparse_bytes": coefficients.bytes,
            }
            row |= {"speedup": times["dense"][0] / times["both"][0], "sparse_gb_s": reached}
            found.append(row)
            shown = " | ".join(f"{middle * 1e6:.1f} ± {spread * 1e6:.1f}" for middle, spread in times.values())
            print(
                f"| {shape} | {kind} | {ratio} | {bits} | {k} | {count} | {shown} | {row['speedup']:.2f} | "
                f"{2 * d1 * d2 / stored:.2f} | {reached:.0f} | {reached / bandwidth:.0%} |",
                flush=True,
            )
    return found


def write_dense(shape: str, folder: Path, device: torch.device) -> None:
    """Write a dense model of random weights in a real one's shape, and a tokenizer and a text of random words."""
    random_network(shape, device).save_pretrained(folder / "dense")
    count = random_model.CONFIGS[shape].vocab_size
    words = Tokenizer(models.WordLevel({str(word): word for word in range(count)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder / "dense")
    drawn = torch.randint(count, (WORDS,), generator=torch.Generator().manual_seed(0))
    (folder / "words.txt").write_text(" ".join(map(str, drawn.tolist())))


def random_network(shape: str, device: torch.device) -> Any:
    """A model of random weights, bf16."""
    config = random_model.CONFIGS[shape]
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1) if "norm" in name else parameter.normal_(0, 0.02)
    return model


def compress_at_random(model: Any, kind: str) -> None:
    """Put random weights of a kind, one of KINDS, in place of all projections of a model."""
    for projection in find_projections(model):
        linear = model.get_submodule(projection.name)
        model.set_submodule(projection.name, random_layer(linear, kind))


def random_layer(linear: torch.nn.Linear, kind: str) -> CompressedLinear:
    """A layer of the shape of another: levels of so many bits each, or 14-bit values and a mask at RATIO."""
    (d2, d1), device = linear.weight.shape, linear.weight.device
    bits = KINDS[kind]
    if bits is None:
        form = Form("identity", "mask", codec_of_bits(14))
        k, s = even_size(form, RATIO, d1, d2)
        layer = CompressedLinear(d1, d2, k, d2 * s, form, dtype=torch.bfloat16, device=device)
        made = random_coefficients(k, d2, s, 14, device)
        assert layer.support is not None
        layer.support.copy_(made.support)
        layer.codes.copy_(made.values)
        layer.prepare(torch.bfloat16)
        return layer
    layer = CompressedLinear(d1, d2, d1, 0, Form("identity", "full", "ec"), dtype=torch.bfloat16, device=device)
    layer.hold(random_levels(d1, d2, bits, device))
    return layer


def time_models(shape: str, device: torch.device, batches: Sequence[int] = (1, 4, 16)) -> list[dict[str, Any]]:
    """Whole models: decoding with each step one CUDA graph, as servers do it, so that Python has no part in it, and
    step by step from Python; prompts; bytes on the GPU. Printed and returned."""
    print("\n| model | GPU memory, MB | what | tokens/s | x dense |\n|---|---|---|---|---|")
    found: list[dict[str, Any]] = []
    for kind in ("dense", *KINDS):
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        model = random_network(shape, device)
        if kind != "dense":
            compress_at_random(model, kind)
        taken = torch.cuda.memory_allocated(device) - before if device.type == "cuda" else 0
        runs: list[tuple[str, float]] = []
        for batch in batches:
            runs.append((f"batch {batch}, a graph a step", batch / graph_step(model, batch, device)[0]))
        for batch in batches:
            steps = 8
            decode(model, batch, 2, device)
            times = [decode(model, batch, steps, device) for _ in range(3)]
            runs.append((f"batch {batch}, from Python", batch * steps / statistics.median(times)))
        for length in PROMPTS if device.type == "cuda" else PROMPTS[:1]:
            prefill(model, length, device)
            runs.append((f"prompt of {length}", length / min(prefill(model, length, device) for _ in range(3))))
        for what, speed in runs:
            first = next((one["speed"] for one in found if one["what"] == what), speed)
            found.append({"model": kind, "bytes": taken, "what": what, "speed": speed})
            print(f"| {kind} | {taken / 1e6:,.0f} | {what} | {speed:,.0f} | {speed / first:.2f} |", flush=True)
        del model
    return found


@torch.inference_mode()
def graph_step(model: Any, rows: int, device: torch.device, steps: int = 32) -> tuple[float, float]:
    """Seconds of a greedy step of so many sequences with STEP_PROMPT tokens behind them, and their spread."""
    room = STEP_PROMPT + 2 * steps
    cache = StaticCache(config=model.config, max_cache_len=room)
    prompt = torch.randint(model.config.vocab_size, (rows, STEP_PROMPT), device=device)
    token = model(input_ids=prompt, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    place = torch.full((rows, 1), STEP_PROMPT, device=device)
    places = torch.arange(room, device=device)

    def step() -> None:
        seen = (places <= place[:1])[None, None].expand(rows, 1, 1, room)
        answer = model(
            input_ids=token, attention_mask=seen, position_ids=place, past_key_values=cache, logits_to_keep=1
        )
        token.copy_(answer.logits.argmax(-1))
        place.add_(1)

    if device.type != "cuda":
        step()
        begun = time.perf_counter()
        step()
        return time.perf_counter() - begun, 0.0
    for _ in range(2):  # compiles and allocates, which a capture cannot
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    event: Any = torch.cuda.Event
    events = [event(enable_timing=True) for _ in range(steps + 1)]
    graph.replay()
    for one in events:
        one.record()
        if one is not events[-1]:
            graph.replay()
    torch.cuda.synchronize()
    seconds = [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]
    lower, middle, upper = statistics.quantiles(seconds, n=4)
    return middle, (upper - lower) / 2


def time_job(folder: Path, device: torch.device, size: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Compress the dense model of a folder to a size; what the command would report, and the GPU's peak of memory.

    Args:
        fields: of the recipe, which else has its defaults.
    """
    recipe = Recipe.build(size | fields | {"calibration": str(folder / "words.txt"), "device": str(device)})
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    begun = time.perf_counter()
    result = cospadi.compress(folder / "dense", recipe, folder / "made", overwrite=True)
    found = compressed_json(result, recipe) | {"seconds_all": time.perf_counter() - begun}
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    Console(width=160).print(compressed_table(result, recipe), highlight=False)
    print(f"In all {found['seconds_all']:.0f} s, GPU memory at most {peak or 0:,} bytes", flush=True)
    load.load_model(folder / "made", device)
    return found | {"peak_bytes": peak}


def random_coefficients(k: int, d2: int, s: int, bits: int, device: torch.device) -> Coefficients:
    """S with s atoms a column, which lie anywhere, and normal values."""
    support = torch.zeros(d2, k, dtype=torch.bool, device=device)
    support.scatter_(1, torch.rand(d2, k, device=device).topk(s).indices, True)
    values = packing.pack_values(torch.randn(d2 * s, device=device), bits)
    offsets = torch.arange(d2 + 1, dtype=torch.int32, device=device) * s
    return Coefficients(packing.pack_support(support), values, offsets, k, bits)


def copy_bandwidth(device: torch.device, replays: int) -> float:
    """GB/s of a copy of 1 GiB, what is read and what is written together."""
    source = torch.zeros(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * 2**30 / _time([lambda: target.copy_(source)], replays)[0] / 1e9


def _copies(weight: Any, size: int, cold: int) -> list[Any]:
    """Enough copies of a tensor or of coefficients, `size` bytes each, to exceed `cold` bytes."""
    copy = weight.copy if isinstance(weight, Coefficients) else weight.clone
    return [copy() for _ in range(cold // size + 1)]


def _linear(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.nn.functional.linear(x, weight)


def _sparse(z: Tensor, coefficients: Coefficients) -> Callable[[], Tensor]:
    return lambda: coefficients.times(z)


def _both(x: Tensor, dictionary: Tensor, coefficients: Coefficients) -> Callable[[], Tensor]:
    return lambda: coefficients.times(torch.nn.functional.linear(x, dictionary))


def _time(calls: list[Callable[[], Tensor]], replays: int) -> tuple[float, float]:
    """Seconds of one call, and their spread, over replays of a graph of all calls in turn."""
    calls[0]()  # Tunes and compiles, which a capture cannot.
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    event: Any = torch.cuda.Event
    events = [(event(enable_timing=True), event(enable_timing=True)) for _ in range(replays)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    seconds = [start.elapsed_time(end) / 1e3 / len(calls) for start, end in events]
    lower, middle, upper = statistics.quantiles(seconds, n=4)
    return middle, (upper - lower) / 2


def _refuse(reason: str) -> None:
    typer.echo(reason, err=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    typer.run(main)
