"""One projection at a time: a compressed layer against torch's dense bf16 linear, and against a plain read.

    python benchmarks/linear.py run --model Llama-3.2-1B --threads 2
    python benchmarks/linear.py run --shape 2048x8192 --shape 4096x14336 --value-bits 16
    python benchmarks/linear.py levels --model Llama-3.2-1B
    python benchmarks/linear.py table --output docs/performance/projections.md

Every timed call, dense or compressed, takes the next of several copies of its weights, which together exceed four
times the last-level cache, so that weights come from memory. Calls take turns; figures are medians. Factors are
random: a dictionary or none, and supports spread evenly. `run` keeps a row a file; `table` makes a page of them.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from cospadi import native
from cospadi.budget import accounting
from cospadi.format import packing
from cospadi.format.codecs import codec_of_bits
from cospadi.format.dictionaries import DICTIONARIES
from cospadi.format.form import Form
from cospadi.runtime import cpu, op
from cospadi.runtime.layer import CompressedLinear
from cospadi.runtime.levels import Levels, pack_levels

RESULTS = Path(__file__).parent / "results" / "linear"
MODELS = {
    "Llama-3.2-1B": ["2048x2048", "2048x512", "2048x8192", "8192x2048"],
    "Llama-3-8B": ["4096x4096", "4096x1024", "4096x14336", "14336x4096"],
    "Qwen3-8B": ["4096x4096", "4096x1024", "4096x12288", "12288x4096"],
}
"""Projections d1 x d2: q and o, k and v, gate and up, down."""

DECODE_ROWS, PREFILL_ROWS = (1, 4, 16), (128, 512)
RHO = 2.0
TORCH_GROUP = 64
app = typer.Typer(add_completion=False)


@app.command()
def run(
    shape: Annotated[list[str] | None, typer.Option(help="d1xd2, repeatable")] = None,
    model: Annotated[list[str] | None, typer.Option(help=", ".join(MODELS))] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="repeatable  [default: 0.2 to 0.5]")] = None,
    value_bits: Annotated[list[int] | None, typer.Option(help="repeatable  [default: 14]")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="repeatable  [default: 1, 4, 16, 128, 512]")] = None,
    dictionary: Annotated[list[str] | None, typer.Option(help="repeatable  [default: identity]")] = None,
    threads: int = 2,
    seconds: Annotated[float, typer.Option(help="time for each comparison, about")] = 2.0,
) -> None:
    """Measure the rows that are missing."""
    for one_ratio in ratio or []:
        if not 0 < one_ratio < 1:
            raise typer.BadParameter(f"--ratio {one_ratio:g} is not between 0 and 1")
    for kind in dictionary or []:
        if kind not in DICTIONARIES:
            raise typer.BadParameter(f"--dictionary {kind} is not known. Use {', '.join(DICTIONARIES)}")
    for one_shape in _shapes(shape, model, threads):
        for one_ratio in ratio or [0.2, 0.3, 0.4, 0.5]:
            for kind, bits in product(dictionary or ["identity"], value_bits or [14]):
                of_rows = f"-rows{'-'.join(map(str, rows))}" if rows else ""
                path = RESULTS / f"{one_shape}-{one_ratio:g}-{bits}-{threads}-{kind}{of_rows}.json"
                if path.exists():
                    continue
                d1, d2 = map(int, one_shape.split("x"))
                form = Form(kind, "mask", codec_of_bits(bits))
                row = measure(d1, d2, one_ratio, form, rows or [*DECODE_ROWS, *PREFILL_ROWS], seconds)
                path.write_text(json.dumps(row | {"threads": threads}, indent=1) + "\n")
                for line in _lines(row):
                    print(line, flush=True)


@app.command()
def levels(
    shape: Annotated[list[str] | None, typer.Option(help="d1xd2, repeatable")] = None,
    model: Annotated[list[str] | None, typer.Option(help=", ".join(MODELS))] = None,
    bits: Annotated[list[int] | None, typer.Option(help="of a level, repeatable  [default: 3, 4, 5, 6, 8]")] = None,
    threads: int = 2,
    seconds: Annotated[float, typer.Option(help="time for each comparison, about")] = 2.0,
) -> None:
    """Measure the rows that are missing of levels of a code, as they lie in memory."""
    shapes = _shapes(shape, model, threads)
    for one_shape, one_bits in product(shapes, bits or (3, 4, 5, 6, 8)):
        path = RESULTS / f"{one_shape}-levels-{one_bits}-{threads}.json"
        if not path.exists():
            d1, d2 = map(int, one_shape.split("x"))
            row = measure_levels(d1, d2, one_bits, seconds)
            path.write_text(json.dumps(row | {"threads": threads}, indent=1) + "\n")
            print("\n".join(_level_lines(row)), flush=True)


def measure_levels(d1: int, d2: int, bits: int, seconds: float) -> dict[str, Any]:
    """One shape with levels of so many bits in memory: milliseconds of dense, ours, a plain read of what is ours, and
    torch's own product of as many bits."""
    wanted, spread = 4 * last_level_cache(), 2.0**bits / 8
    numbers = (spread * torch.randn(d2, d1)).round().clamp(1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1).to(torch.int16)
    widths = torch.full((d2,), bits, dtype=torch.int32)
    first = pack_levels(numbers, torch.rand(d2), torch.rand(d1), widths)
    copies = [Levels(*(part.clone() for part in first)) for _ in range(wanted // _nbytes(first.packed) + 2)]
    weights = [torch.randn(d2, d1, dtype=torch.bfloat16) for _ in range(wanted // (2 * d1 * d2) + 2)]
    torchs, product = _torch_integers(d1, d2, bits, wanted)
    figures = []
    for count in (*DECODE_ROWS, *PREFILL_ROWS):
        x = torch.randn(count, d1, dtype=torch.bfloat16)
        calls = {
            "dense": partial(_call, weights, torch.nn.functional.linear, x),
            "ours": partial(_call, copies, op.level_matmul, x),
            "read": partial(_call, copies, lambda _, levels: levels.packed.view(torch.int32).sum(), x),
        }
        if torchs:
            calls["torch"] = partial(_call, torchs, product, x)
        figures.append({"rows": count, "ms": {name: 1e3 * t for name, t in take_turns(calls, seconds).items()}})
    return {
        "shape": f"{d1}x{d2}", "levels": bits, "dense_bytes": 2 * d1 * d2, "bytes": sum(map(_nbytes, first)),
        "figures": figures, "level": native.best_level(), "processor": processor(), "torch": torch.__version__,
    }  # fmt: skip


def _torch_integers(
    d1: int, d2: int, bits: int, wanted: int
) -> tuple[list[tuple[Tensor, Tensor]], Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]]:
    """Copies of weights for torch's own products with integers, those that torchao calls, and the product: of 8 bits
    with a scale an output, of 4 bits with a scale and a zero for each TORCH_GROUP inputs; none for other bits."""
    aten = torch.ops.aten
    copies = range(wanted // (d1 * d2 * bits // 8) + 2)
    if bits == 8:
        bytes_ = torch.randint(-127, 128, (d2, d1), dtype=torch.int8)
        scales = torch.rand(d2, dtype=torch.bfloat16)
        return [(bytes_.clone(), scales) for _ in copies], lambda x, own: aten._weight_int8pack_mm(x, *own)
    if bits == 4:
        packed = aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (d2, d1), dtype=torch.int32), 1)
        steps = torch.rand(d1 // TORCH_GROUP, d2, 2, dtype=torch.bfloat16)
        product = aten._weight_int4pack_mm_for_cpu
        return [(packed.clone(), steps.clone()) for _ in copies], lambda x, own: product(x, own[0], TORCH_GROUP, own[1])
    return [], lambda x, _: x


def _shapes(shape: list[str] | None, model: list[str] | None, threads: int) -> list[str]:
    """What is to be measured, each once, where all is as it has to be.

    Raises:
        typer.BadParameter: it is not.
    """
    for name in model or []:
        if name not in MODELS:
            raise typer.BadParameter(f"--model {name} is not known. Use {', '.join(MODELS)}")
    for one_shape in shape or []:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", one_shape):
            raise typer.BadParameter(f"--shape {one_shape} is not d1xd2, for example 2048x8192")
    if not cpu.AVAILABLE:
        raise typer.BadParameter("the CPU kernels were not built; `cospadi doctor` says what to do")
    torch.set_num_threads(threads)
    RESULTS.mkdir(parents=True, exist_ok=True)
    shapes = list(dict.fromkeys([*(shape or []), *(one for name in model or [] for one in MODELS[name])]))
    return shapes or MODELS["Llama-3.2-1B"]


def measure(d1: int, d2: int, ratio: float, form: Form, rows: list[int], seconds: float) -> dict[str, Any]:
    """One shape at one ratio: milliseconds of dense, ours, its parts, and a plain read of the packed coefficients."""
    k, s = even_size(form, ratio, d1, d2)
    wanted = 4 * last_level_cache()
    first = random_layer(d1, d2, k, s, form)
    packed_bytes = sum(map(_nbytes, _packed(first)))
    compressed_bytes = packed_bytes + (0 if first.atoms is None else _nbytes(first.atoms))
    layers = [first, *(_copy(first) for _ in range(wanted // compressed_bytes + 1))]
    weights = [torch.randn(d2, d1, dtype=torch.bfloat16) for _ in range(wanted // (2 * d1 * d2) + 2)]
    # As many copies of the packed coefficients alone as exceed the caches too.
    codes = [first, *(_copy(first) for _ in range(wanted // packed_bytes + 1))]
    merged = first._weight(torch.bfloat16)
    kept = [merged.clone() for _ in weights] if any(count > cpu.DECODE_ROWS for count in rows) else []
    figures = []
    for count in rows:
        x, z = (torch.randn(count, width, dtype=torch.bfloat16) for width in (d1, k))
        calls = {
            "dense": partial(_call, weights, torch.nn.functional.linear, x),
            "ours": partial(_call, layers, lambda x, layer: layer(x), x),
            "codes": partial(_call, codes, _multiply, z),
            "read": partial(_call, codes, lambda _, layer: _read(layer), z),
        }
        if count > cpu.DECODE_ROWS:
            calls["kept dense"] = partial(_call, kept, torch.nn.functional.linear, x)
        figures.append({"rows": count, "ms": {name: 1e3 * t for name, t in take_turns(calls, seconds).items()}})
    return {
        "shape": f"{d1}x{d2}", "ratio": ratio, "dictionary": form.dictionary, "value_bits": form.codec.bits,
        "k": k, "s": s, "dense_bytes": 2 * d1 * d2, "bytes": compressed_bytes, "codes_bytes": packed_bytes,
        "flops_bound": 1.0 if first.atoms is None else d1 * d2 / (k * (d1 + d2)), "figures": figures,
        "level": native.levels() and native.best_level(), "processor": processor(), "torch": torch.__version__,
    }  # fmt: skip


def even_size(form: Form, ratio: float, d1: int, d2: int) -> tuple[int, int]:
    """k, and nonzeros of every column, at a ratio."""
    budget = accounting.byte_budget(ratio, d1, [d2])
    if form.dictionary_kind.atoms(d1) is None:
        return accounting.exact_size(budget, form, d1, [d2], RHO)
    k, nonzeros = accounting.free_size(budget, form, d1, [d2], RHO)
    return k, nonzeros // d2


def _call(copies: Sequence[Any], product: Callable[[Tensor, Any], Tensor], x: Tensor, index: int) -> Tensor:
    return product(x, copies[index % len(copies)])


def take_turns(calls: Mapping[str, Callable[[int], object]], seconds: float) -> dict[str, float]:
    """Median seconds of each call; every round makes one of each, with the round's number."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for call in calls.values():
            call(0)
        end, index = time.perf_counter() + seconds, 0
        while time.perf_counter() < end or index < 7:
            index += 1
            for name, call in calls.items():
                start = time.perf_counter()
                call(index)
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def random_layer(d1: int, d2: int, k: int, s: int, form: Form) -> CompressedLinear:
    """A layer whose columns have s random nonzeros each."""
    layer = CompressedLinear(d1, d2, k, s * d2, form, dtype=torch.bfloat16)
    support = torch.zeros(d2, k, dtype=torch.bool)
    for block in range(0, d2, 1024):
        drawn = torch.rand(min(1024, d2 - block), k)
        support[block : block + 1024].scatter_(1, drawn.topk(s, dim=1).indices, True)
    with torch.no_grad():
        if layer.atoms is not None:
            layer.atoms.normal_()
    mask, values = _packed(layer)
    mask.copy_(packing.pack_support(support))
    values.copy_(form.numbers.encode(torch.randn(s * d2)))
    layer.column_offsets()
    return layer


def processor() -> str:
    """This machine's, as it calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
        return name + (" with AMX" if any(" amx_bf16" in line for line in lines) else "")
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def last_level_cache() -> int:
    """Bytes of this machine's last-level cache; 64 MB where the system does not tell."""
    try:
        return max(os.sysconf("SC_LEVEL3_CACHE_SIZE"), os.sysconf("SC_LEVEL2_CACHE_SIZE"), 32 << 20)
    except (ValueError, OSError):
        return 64 << 20


def _copy(layer: CompressedLinear) -> CompressedLinear:
    shape = (layer.in_features, layer.out_features, layer.k, layer.nnz, layer.form)
    copy = CompressedLinear(*shape, dtype=torch.bfloat16)
    copy.load_state_dict(layer.state_dict())
    copy.column_offsets()
    return copy


def _multiply(z: Tensor, layer: CompressedLinear) -> Tensor:
    offsets = layer.column_offsets()
    assert offsets is not None
    return cpu.sparse_matmul(z, *_packed(layer), offsets, layer.k, layer.form.codec.bits)


def _read(layer: CompressedLinear) -> Tensor:
    """Touch every byte of the packed coefficients, as fast as torch sums numbers."""
    mask, values = (tensor.view(torch.uint8).flatten() for tensor in _packed(layer))
    return mask[: len(mask) // 8 * 8].view(torch.int64).sum() + values[: len(values) // 8 * 8].view(torch.int64).sum()


def _packed(layer: CompressedLinear) -> tuple[Tensor, Tensor]:
    """The mask and the values."""
    assert layer.support is not None
    return layer.support, layer.codes


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@app.command()
def table(output: Annotated[Path | None, typer.Option(help="the page; without it it is printed")] = None) -> None:
    """All rows as Markdown: what was reached, decoding, then prefill."""
    if output is None:
        print(page())
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page(), encoding="utf-8")


def page() -> str:
    """The page of all rows there are."""
    every = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    rows = [row for row in every if "levels" not in row]
    rows.sort(key=lambda row: (row["threads"], row["value_bits"], row["dense_bytes"], row["shape"], row["ratio"]))
    lines = [HEADER]
    sections = sorted({_section(row) for row in rows})
    for section in sections:
        some = [row for row in rows if _section(row) == section]
        dictionary, machine, threads = section
        lines += [f"\n## Dictionary {dictionary}, {machine}, {threads} threads\n", *_reached(some), DECODE_HEAD]
        lines += [line for row in some for line in _lines(row, prefill=False)]
        lines.append(PREFILL_HEAD)
        lines += [line for row in some for line in _lines(row, decode=False)]
    of_levels = [row for row in every if "levels" in row]
    of_levels.sort(key=lambda row: (row["levels"], row["dense_bytes"], row["shape"]))
    for machine, threads in sorted({(row["processor"], row["threads"]) for row in of_levels}):
        lines += [f"\n## Levels in memory, {machine}, {threads} threads\n{LEVEL_HEAD}"]
        some = [row for row in of_levels if (row["processor"], row["threads"]) == (machine, threads)]
        lines += [line for row in some for line in _level_lines(row)]
    return "\n".join(lines) + "\n"


def _section(row: dict[str, Any]) -> tuple[str, str, int]:
    """What rows of one table have in common: kind of dictionary, processor, threads."""
    return row["dictionary"], row["processor"], row["threads"]


HEADER = """# Projections, one at a time

Written by `python benchmarks/linear.py table --output docs/performance/projections.md` from
`benchmarks/results/linear`, which these commands filled:

```sh
# hours; not run by the tests
python benchmarks/linear.py run --dictionary stored --shape 2048x8192 --shape 4096x14336 --ratio 0.2 --ratio 0.4 \\
    --ratio 0.5 --value-bits 14 --value-bits 16 --seconds 1.5
python benchmarks/linear.py run --dictionary stored --model Llama-3.2-1B --seconds 1.5
python benchmarks/linear.py run --dictionary stored --model Llama-3-8B --model Qwen3-8B --ratio 0.4 --seconds 1
python benchmarks/linear.py run --dictionary identity --model Llama-3.2-1B --ratio 0.3 --ratio 0.5 --seconds 1
python benchmarks/linear.py levels --model Llama-3.2-1B --seconds 1
```

"Of it" is the speed-up over the dense bf16 linear divided by the byte ratio (dense bytes over stored bytes), or by the
bound that FLOPs give. Every call takes the next of several copies of its weights, which together exceed four times the
last-level cache. "Torch's" are its own products with integers of 8 bits (a scale an output) and of 4 (a scale and a
zero for each 64 inputs), which torchao calls on CPU. "S" is the packed coefficients alone; "plain read" sums the same
bytes as 64-bit integers. Tables of different processors do not compare: a dense product of many rows is several times
as fast with AMX."""
DECODE_HEAD = """
| d1 x d2 | ratio | bits | rows | dense, ms | ours, ms | speed-up | byte ratio | of it | S, GB/s | plain read, GB/s | of it |
|---|---|---|---|---|---|---|---|---|---|---|---|"""  # noqa: E501
PREFILL_HEAD = """
| d1 x d2 | ratio | bits | rows | dense, ms | ours, ms | speed-up | FLOP bound | of it | `--runtime dense` |
|---|---|---|---|---|---|---|---|---|---|"""


LEVEL_HEAD = """
| d1 x d2 | bits | rows | dense, ms | ours, ms | speed-up | byte ratio | of it | ours, GB/s | plain read, GB/s | torch's, ms |
|---|---|---|---|---|---|---|---|---|---|---|"""  # noqa: E501


def _level_lines(row: dict[str, Any]) -> list[str]:
    lines, byte_ratio = [], row["dense_bytes"] / row["bytes"]
    for figure in row["figures"]:
        ms = figure["ms"]
        speedup = ms["dense"] / ms["ours"]
        cells = [row["shape"].replace("x", " x "), row["levels"], figure["rows"]]
        cells += [f"{ms['dense']:.3f}", f"{ms['ours']:.3f}", f"{speedup:.2f}"]
        cells += [f"{byte_ratio:.2f}", f"{speedup / byte_ratio:.2f}"]
        cells += [f"{row['bytes'] / ms[name] / 1e6:.1f}" for name in ("ours", "read")]
        lines.append(_markdown([*cells, f"{ms['torch']:.3f}" if "torch" in ms else ""]))
    return lines


def _speedup(row: dict[str, Any], ms: dict[str, float]) -> float:
    return ms["dense"] / ms["ours"]


def _of_bytes(row: dict[str, Any], ms: dict[str, float]) -> float:
    return _speedup(row, ms) * float(row["bytes"] / row["dense_bytes"])


def _of_flops(row: dict[str, Any], ms: dict[str, float]) -> float:
    return _speedup(row, ms) / float(row["flops_bound"])


def _of_dense(row: dict[str, Any], ms: dict[str, float]) -> float:
    return ms["dense"] / ms["kept dense"]


def _of_read(row: dict[str, Any], ms: dict[str, float]) -> float:
    return ms["read"] / ms["codes"]


WIDE = ("2048x8192", "4096x14336")
SMALL = ("2048x512", "2048x2048", "4096x1024")
MISREAD = ("2048x512", "8192x2048")
"""Where torch's sum, which is the plain read here, is slower than the kernel."""

GOALS: list[
    tuple[str, float, Callable[[dict[str, Any], dict[str, float]], float], Callable[[dict[str, Any], int], bool]]
] = [
    (
        "one row, 2048 x 8192 and 4096 x 14336: speed-up over the byte ratio", 0.9, _of_bytes,
        lambda row, count: count == 1 and row["shape"] in WIDE,
    ),
    (
        "one row, shapes of Llama-3.2-1B, 14 bits: speed-up", 1, _speedup,
        lambda row, count: count == 1 and row["shape"] in MODELS["Llama-3.2-1B"] and row["value_bits"] == 14,
    ),
    ("512 rows, ratio 0.4: speed-up", 0.85, _speedup, lambda row, count: count == 512 and row["ratio"] == 0.4),
    (
        "512 rows, 4096 x 4096, 2048 x 8192, 8192 x 2048 and larger: speed-up over the FLOP bound", 0.85, _of_flops,
        lambda row, count: count == 512 and row["shape"] not in SMALL,
    ),
    (
        "512 rows, 2048 x 2048, 4096 x 1024 and 2048 x 512: the same", 0.85, _of_flops,
        lambda row, count: count == 512 and row["shape"] in SMALL,
    ),
    ("`--runtime dense`: speed-up", 0.95, _of_dense, lambda _, count: count in PREFILL_ROWS),
    (
        "one row, 4096 x 14336, bf16 values: reading S, over a plain read", 0.85, _of_read,
        lambda row, count: count == 1 and row["shape"] == "4096x14336" and row["value_bits"] == 16,
    ),
    (
        "one row, the large shapes else: the same", 0.85, _of_read,
        lambda row, count: count == 1 and row["shape"] not in (*SMALL, *MISREAD)
        and (row["shape"], row["value_bits"]) != ("4096x14336", 16),
    ),
]  # fmt: skip
"""What the layer was built to reach: what, at least how much, how it is computed, from which rows."""


def _reached(rows: list[dict[str, Any]]) -> list[str]:
    """What the figures come to, against what the layer was built to reach: a line a goal."""
    figures = [(row, figure["rows"], figure["ms"]) for row in rows for figure in row["figures"]]
    lines = ["| | wanted | reached |", "|---|---|---|"]
    for what, wanted, of, chosen in GOALS:
        values = [of(row, ms) for row, count, ms in figures if chosen(row, count)]
        if values:
            missed = ", **missed**" if min(values) < wanted else ""
            lines.append(f"| {what} | {wanted:g} | {min(values):.2f} to {max(values):.2f}{missed} |")
    return lines


def _lines(row: dict[str, Any], decode: bool = True, prefill: bool = True) -> list[str]:
    lines = []
    byte_ratio = row["dense_bytes"] / row["bytes"]
    for figure in row["figures"]:
        ms, few = figure["ms"], figure["rows"] <= cpu.DECODE_ROWS
        speedup = ms["dense"] / ms["ours"]
        cells = [row["shape"].replace("x", " x "), f"{row['ratio']:g}", row["value_bits"], figure["rows"]]
        cells += [f"{ms['dense']:.3f}", f"{ms['ours']:.3f}", f"{speedup:.2f}"]
        if few and decode:
            read, reached = (row["codes_bytes"] / ms[name] / 1e6 for name in ("read", "codes"))
            cells += [f"{byte_ratio:.2f}", f"{speedup / byte_ratio:.2f}", f"{reached:.1f}", f"{read:.1f}"]
            lines.append(_markdown([*cells, f"{reached / read:.2f}"]))
        elif not few and prefill:
            bound = row["flops_bound"]
            kept = f"{ms['dense'] / ms['kept dense']:.2f}x"
            lines.append(_markdown([*cells, f"{bound:.2f}", f"{speedup / bound:.2f}", kept]))
    return lines


def _markdown(cells: list[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    app()
