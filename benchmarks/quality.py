"""Perplexity of a model compressed by every method at equal bytes: pages and figures of the rows of `cospadi compare`.

    python benchmarks/quality.py run MODEL --calibration FILE --text FILE --output FOLDER
    python benchmarks/quality.py run MODEL --calibration FILE --text FILE --output FOLDER --ratio 0.2 --method paper
    python benchmarks/quality.py run MODEL --calibration FILE --text FILE --output FOLDER --bits 3 --method coded
    python benchmarks/quality.py table --output docs/results
    python benchmarks/quality.py summary
    python benchmarks/quality.py figure

`run` is a call of `cospadi.compare`, whose rows it copies to results/quality; a row that is there stays as it is.
Beside the methods that `compare` knows there are `oats`, `svd-llm-gptq` and `paper-gptq`, evaluated without a
checkpoint (sparse plus low rank, and quantized dictionaries, have no form), their bytes counted.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import cospadi
from cospadi.budget.accounting import byte_budget
from cospadi.calibration.grams import Whitening
from cospadi.commands.compare import measured, surroundings
from cospadi.commands.comparison import DENSE, dense_row, json_text, loss, markdown_table
from cospadi.format.codecs.f14 import F14
from cospadi.format.codecs.integers import INTEGERS, Integers
from cospadi.jobs.ledger import Ledger
from cospadi.jobs.pool import Engine
from cospadi.jobs.progress import Stages
from cospadi.recipe import CACHE_BYTES, METHODS, Recipe
from cospadi.solvers import MetricProblem, Problem, SolverOptions
from cospadi.solvers.gptq import gptq
from cospadi.solvers.ksvd import ksvd
from cospadi.solvers.oats import oats
from cospadi.solvers.omp import omp, scatter_codes
from cospadi.solvers.rtn import rtn
from cospadi.stages.measure import measured_groups
from cospadi.stages.open import opened
from cospadi.stages.solve import integer_coder
from cospadi.stages.text import read_text

SUMMARY = ("svd-llm", "paper", "wanda", "sparsegpt", "alps", "sparse")
OATS = "oats"
VARIANTS = (
    "sparse+refine=0",
    "sparse+refine=0+compensate=false",
    "sparse+compensate=true",
    "sparse+allocate=uniform",
    "sparse+metric=two-sided",
    "sparse+metric=two-sided+compensate=true",
    "sparse+metric=output",
)
"""The default with one thing changed, or two."""
ALONE = "paper+solver=htp"
"""Nothing but D = I in place of the paper's dictionary."""
DRAWN = {
    ALONE: ("D = I (htp)", "-"),
    "alps": ("D = I (ALPS)", "-"),
    "paper": ("D stored (K-SVD)", "--"),
    "rocket": ("D stored (ROCKET)", "--"),
    "compot": ("D stored (COMPOT)", "--"),
    "svd-llm": ("low rank (SVD-LLM)", ":"),
}
"""Methods of the same frame -> label and line of the figure."""
OATS_ITERATIONS = 80
"""As its authors run."""
TUNED = "paper+refine=128"
"""The paper's, its values tuned as the default's are."""
SVD_GPTQ, PAPER_GPTQ = "svd-llm-gptq", "paper-gptq"
PAPER_ITERATIONS = 4
"""Of K-SVD where its factors are quantized; the paper runs 60."""
LEVELS = ("rtn", SVD_GPTQ, PAPER_GPTQ, "gptq", "gptq+compensate=true", "coded")
"""Of few bits: their sizes are others than those of weights left out."""
DRAWN_BY_BITS = {
    "coded": ("--bits", "-"),
    "sparse": ("--ratio: weights left out, 14 bits", "-"),
    "gptq+compensate=true": ("GPTQ, compensated", "--"),
    "gptq": ("GPTQ", "--"),
    "rtn": ("round to nearest", "--"),
    SVD_GPTQ: ("SVD-LLM, factors by GPTQ", ":"),
    PAPER_GPTQ: ("the paper's (T = 4), factors in 4 bits", ":"),
}
"""Methods of the figure of bits -> label and line."""
ALL = (*(name for name in METHODS if name not in ("svd", *LEVELS)), OATS, ALONE, TUNED, *VARIANTS)
RESULTS = Path(__file__).parent / "results" / "quality"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
app = typer.Typer(add_completion=False)


@app.command()
def run(
    model: Path,
    calibration: Annotated[str, typer.Option()],
    text: Annotated[Path, typer.Option()],
    output: Annotated[Path, typer.Option(help="folder of the comparison, in which a run that was stopped resumes")],
    ratio: Annotated[list[float] | None, typer.Option(help="repeatable  [default: 0.2 to 0.5 without --bits]")] = None,
    bits: Annotated[list[float] | None, typer.Option(help="repeatable")] = None,
    method: Annotated[list[str] | None, typer.Option(help="repeatable  [default: all]")] = None,
    threads: int = 1,
) -> None:
    """Compute the rows that are missing."""
    torch.set_num_threads(threads)
    bits, ratio = bits or [], ratio or ([] if bits else [0.2, 0.3, 0.4, 0.5])
    names = method or [*(ALL if ratio else ()), *(LEVELS if bits else ())]
    known = [name for name in names if name not in FORMLESS]
    if known:
        recipe = {"calibration": calibration}
        for row in cospadi.compare(model, text, output, ratios=ratio, bits=bits, methods=known, recipe=recipe):
            _keep({name: value for name, value in row.items() if name != "of"})
    for name in (name for name in names if name in FORMLESS):
        for size in ratio if name == OATS else [Recipe.build(bits=size).ratio for size in bits]:
            if not _place(model.name, name, size).exists():
                _keep(_formless_row(model, calibration, text, size, name))


def _place(model: str, method: str, ratio: float) -> Path:
    return RESULTS / f"{model}-{method}-{ratio:g}.json"


def _keep(row: dict[str, Any]) -> None:
    """Put a row among the results, unless it is there, or its size was too small."""
    path = _place(row["model"], row["method"], row["ratio_asked"])
    if "perplexity" in row and not path.exists():
        path.write_text(json_text(row))


def _formless_row(model: Path, calibration: str, text: Path, ratio: float, method: str) -> dict[str, Any]:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "approximated"
        found = _write_formless(model, calibration, ratio, FORMLESS[method], folder)
        found |= measured(folder, model, text, 4, "auto", Stages())
    row: dict[str, Any] = {"model": model.name, "method": method, "ratio_asked": ratio, "text": text.name}
    return row | found | surroundings("auto") | {"seconds": round(time.perf_counter() - start, 1)}


@dataclass(frozen=True)
class Approximation:
    """What replaces a projection, (d1, d2), its relative error in the metric of outputs, and the bytes it takes."""

    weight: Tensor
    error: float
    nbytes: int


def _oats(weight: Tensor, whitening: Whitening, nbytes: int) -> Approximation:
    gram = None if whitening.gram is None else whitening.gram.float()
    problem = MetricProblem(weight.float(), gram, (), (weight.shape[1],))
    found = oats(problem, nbytes, SolverOptions(iterations=OATS_ITERATIONS))
    return Approximation(F14.rounded(found.coefficients) + found.low_rank, found.errors[-1], found.nbytes)


def _svd_gptq(weight: Tensor, whitening: Whitening, nbytes: int) -> Approximation:
    """SVD-LLM's factors, both by GPTQ, the right one fitted anew to the left one's rounding: of integers of 3, 4 and 8
    bits in groups of 64, as many as the bytes hold, those of the least error."""
    assert whitening.gram is not None
    assert whitening.factor is not None
    gram, factor, (d1, d2) = whitening.gram, whitening.factor, weight.shape
    left, values, _ = torch.linalg.svd(factor @ weight.double(), full_matrices=False)
    options, found = SolverOptions(iterations=1), []
    for codec in (INTEGERS[name] for name in ("int3g64", "int4g64", "int8g64")):

        def size(rank: int, codec: Integers = codec) -> int:
            return codec.nbytes([rank, d1]) + codec.nbytes([d2, rank])

        rank = max((r for r in range(1, min(d1, d2) + 1) if size(r) <= nbytes), default=0)
        if not rank:
            continue
        coder, root = integer_coder(codec), values[:rank].sqrt()
        atoms = torch.linalg.solve_triangular(factor, left[:, :rank] * root, upper=True)
        atoms = gptq(MetricProblem(atoms.float(), gram.float(), (), (rank,)), coder, options).members[0].weight.double()
        inner = atoms.T @ gram @ atoms
        inner += 1e-6 * inner.diagonal().mean() * torch.eye(rank, dtype=torch.float64)
        codes = torch.linalg.solve(inner, atoms.T @ gram @ weight.double())
        codes = gptq(MetricProblem(codes.float(), inner.float(), (), (d2,)), coder, options).members[0].weight.double()
        made = atoms @ codes
        found.append(Approximation(made, _error(weight, made, whitening), size(rank)))
    return min(found, key=lambda one: one.error)


def _paper_gptq(weight: Tensor, whitening: Whitening, nbytes: int) -> Approximation:
    """The paper's factors at k / s = 2 with few alternations: the dictionary by GPTQ, in integers of 4 bits and groups
    of 64; coded anew, values rounded to 4 bits with a scale and a zero a column."""
    assert whitening.gram is not None
    assert whitening.factor is not None
    gram, factor, (d1, d2), codec = whitening.gram, whitening.factor, weight.shape, INTEGERS["int4g64"]

    def size(k: int) -> int:
        return codec.nbytes([k, d1]) + d2 * -(-k // 8) + -(-(4 * (k // 2) + 20) * d2 // 8)

    k = max(k for k in range(2, 2 * d1 + 1, 2) if size(k) <= nbytes)
    target, options = (factor @ weight.double()).float(), SolverOptions(iterations=PAPER_ITERATIONS)
    learned = ksvd(Problem(target), k, k // 2, options).dictionary
    assert learned is not None
    atoms = torch.linalg.solve_triangular(factor, learned.double(), upper=True)
    atoms = gptq(MetricProblem(atoms.float(), gram.float(), (), (k,)), integer_coder(codec), options).members[0].weight
    whitened = (factor @ atoms.double()).float()
    norms = torch.linalg.vector_norm(whitened, dim=0).clamp(min=1e-30)
    whitened /= norms
    codes, _ = scatter_codes(*omp(whitened.T @ whitened, whitened.T @ target, k // 2), k)
    codes /= norms[:, None]
    rounded = rtn(MetricProblem(codes, None, (), (d2,)), integer_coder(INTEGERS["int4"]), options).members[0].weight
    made = (atoms @ rounded).double()
    return Approximation(made, _error(weight, made, whitening), size(k))


def _error(weight: Tensor, made: Tensor, whitening: Whitening) -> float:
    whole = whitening.energy(weight.double()).sum()
    return float((whitening.energy(weight.double() - made).sum() / whole).sqrt())


FORMLESS = {OATS: _oats, SVD_GPTQ: _svd_gptq, PAPER_GPTQ: _paper_gptq}
"""Methods whose result no checkpoint holds -> (weight (d1, d2), whitening, bytes) -> what is evaluated."""


def _write_formless(
    model: Path, calibration: str, ratio: float, approximate: Callable[..., Approximation], folder: Path
) -> dict[str, Any]:
    """Write the dense model that approximations stand for, each projection at the same ratio; what its row says."""
    recipe = Recipe.build({"ratio": ratio, "calibration": calibration, "method": "wanda"})
    nbytes, errors, seconds = 0, {}, 0.0
    with opened(model, recipe, None, Stages(), Engine(), Ledger(), CACHE_BYTES, whole=True) as job:
        read_text(job)
        dense: Any = job.blocks.model
        for block in measured_groups(job, job.uniform.groups):
            for group, whitening, weight in block.measure(block.sets[0]):
                begun = time.perf_counter()
                found = approximate(weight, whitening, byte_budget(ratio, group.d1, group.d2s))
                seconds += time.perf_counter() - begun
                (member,) = group.members
                dense.get_submodule(member.name).weight.data.copy_(found.weight.T)
                nbytes += found.nbytes
                errors[member.name] = found.error
        dense.save_pretrained(folder)
        job.tokenizer.save_pretrained(folder)
        total = job.uniform.dense_bytes
        sequences = None if job.sequences is None else len(job.sequences)
    return {
        "ratio_reached": 1 - nbytes / total,
        "bytes": nbytes,
        "mean_relative_error": sum(errors.values()) / len(errors),
        "relative_errors": errors,
        "iterations": {_oats: OATS_ITERATIONS, _paper_gptq: PAPER_ITERATIONS}.get(approximate, 1),
        "seconds_solve": round(seconds, 1),
        "calibration": Path(calibration).name,
        "sequences": sequences,
    }


@app.command()
def table(
    output: Annotated[
        Path | None, typer.Option(help="folder of the pages, one a model; without it they are printed")
    ] = None,
) -> None:
    """Every row there is as Markdown, a page a model."""
    for model, text in pages().items():
        if output is None:
            print(text)
        else:
            output.mkdir(parents=True, exist_ok=True)
            (output / f"{model}.md").write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Model -> its page."""
    rows = _rows()
    models = [row["model"] for row in rows if row["method"] == DENSE]
    return {model: _page(model, [row for row in rows if row["model"] == model]) for model in models}


def _page(model: str, rows: list[dict[str, Any]]) -> str:
    dense = dense_row(rows)
    head = ["ratio", "method", "T", "perplexity", "ln(ppl / dense)", "of the paper's", "KL", "error", "reached"]
    lines = []
    paper = {row["ratio_asked"]: loss(row, dense) for row in rows if row["method"] == "paper"}
    compressed = [row for row in rows if row is not dense]
    for row in sorted(compressed, key=lambda row: (row["ratio_asked"], -loss(row, dense))):
        ratio, added = row["ratio_asked"], loss(row, dense)
        line = [f"{ratio:g}", row["method"], str(row["iterations"] or "-"), f"{row['perplexity']:.2f}", f"{added:.4f}"]
        line += [f"{added / paper[ratio]:.3f}" if ratio in paper else "-", f"{row['kl']:.5f}" if "kl" in row else "-"]
        line += [f"{row['mean_relative_error']:.4f}", f"{row['ratio_reached']:.4f}", f"{row['seconds_solve']:.0f}"]
        lines.append(line)
    return f"""\
# {model}: every method at equal bytes

Written by `python benchmarks/quality.py table --output docs/results` from `benchmarks/results/quality`.
[What methods and columns mean](../results.md#methods-and-columns).

Dense perplexity {dense["perplexity"]:.2f} on {dense["text"]}
({dense["windows"]} windows of {dense["length"]} tokens).

{markdown_table([*head, "solving, s"], lines)}
"""


@app.command()
def summary() -> None:
    """Print one line a model and ratio: ln(ppl / dense) of the main methods, then the divergence where it is known,
    then both of levels in a code, by bits, and beside integers."""
    print("\n".join([*summary_lines(), "", *divergence_lines(), "", *bits_lines(), "", *integer_lines()]))


def summary_lines() -> list[str]:
    """The table that README.md and docs/results.md begin with: ln(ppl / dense)."""
    rows = _rows()
    dense = {row["model"]: row for row in rows if row["method"] == DENSE}
    found = {
        (row["model"], row["ratio_asked"], row["method"]): loss(row, dense[row["model"]])
        for row in rows
        if row["method"] != DENSE
    }
    return _by_ratio(found, SUMMARY, "{:.4f}", needed=SUMMARY[-1])


def divergence_lines() -> list[str]:
    """The same of the predictions' divergence from the dense model's, for the methods where it was measured."""
    found = {(row["model"], row["ratio_asked"], row["method"]): row["kl"] for row in _rows() if "kl" in row}
    return _by_ratio(found, [name for name in SUMMARY if any(method == name for *_, method in found)], "{:.5f}")


def _by_ratio(
    found: dict[tuple[str, float, str], float], names: Sequence[str], form: str, needed: str | None = None
) -> list[str]:
    """A line a model and ratio at which one of these methods was measured, or the needed one; a column a method."""
    places = {(model, ratio) for model, ratio, method in found if method in ([needed] if needed else names)}
    lines = []
    for model, ratio in sorted(places):
        values = [found.get((model, ratio, name)) for name in names]
        lines.append([model, f"{ratio:g}", *("-" if value is None else form.format(value) for value in values)])
    return markdown_table(["model", "ratio", *names], lines).splitlines()


def bits_lines() -> list[str]:
    """A line a model and size of `coded`, in bits a weight, beside `sparse` of as many bytes."""
    rows = {(row["model"], row["ratio_asked"], row["method"]): row for row in _rows()}
    lines = []
    for model, ratio in sorted((model, -ratio) for model, ratio, method in rows if method == "coded"):
        row, other = rows[model, -ratio, "coded"], rows.get((model, -ratio, "sparse"))
        beside = f"{other['kl']:.5f}" if other else "-"
        added = loss(row, rows[model, 0.0, DENSE])
        lines.append([model, f"{_bits(row):.2f}", f"{added:.4f}", f"{row['kl']:.5f}", beside])
    head = ["model", "bits a weight", "ln(ppl / dense)", "KL", "KL of `sparse`"]
    return markdown_table(head, lines).splitlines()


def integer_lines() -> list[str]:
    """A line a model and size of `gptq`: ln(ppl / dense) and KL of all levels, of `coded` those of at most as many
    bytes, and the bits a weight that these take."""
    rows = _rows()
    dense = {row["model"]: row for row in rows if row["method"] == DENSE}
    found = {(row["model"], row["ratio_asked"], row["method"]): row for row in rows if row["method"] in LEVELS}
    lines = []
    for model, ratio in sorted((model, -ratio) for model, ratio, method in found if method == "gptq"):
        some = {name: row for name in LEVELS if (row := found.get((model, -ratio, name)))}
        nbytes = some["gptq"]["bytes"]
        smaller = [row for (name, _, method), row in found.items() if (name, method) == (model, "coded")]
        fitting = [row for row in smaller if row["bytes"] <= nbytes]
        some |= {"coded": max(fitting, key=lambda row: row["bytes"])} if fitting else {}
        cells = [
            f"{loss(some[name], dense[model]):.4f} / {some[name]['kl']:.5f}" if name in some else "-" for name in LEVELS
        ]
        cells.append(f"{_bits(some['coded']):.2f}" if "coded" in some else "-")
        lines.append([model, f"{_bits(some['gptq']):.2f}", *cells])
    return markdown_table(["model", "bits a weight", *LEVELS, "its bits"], lines).splitlines()


def _bits(row: dict[str, Any]) -> float:
    """Bits a weight."""
    return 16 * (1 - float(row["ratio_reached"]))


@app.command()
def figure(output: Annotated[Path, typer.Option(help="folder of the images")] = IMAGES) -> None:
    """Draw errors of projections against their bytes, D stored, D = I, low rank; and the loss added against bits."""
    rows = _rows()
    dense = {row["model"]: row for row in rows if row["method"] == DENSE}
    _draw(
        output / "bytes.svg", rows, DRAWN, ALONE, lambda row: 1 - row["ratio_reached"],
        lambda row: row["mean_relative_error"],
        {"xlabel": "bytes, of the dense ones", "ylabel": "relative error at the outputs, mean"},
    )  # fmt: skip
    _draw(
        output / "bits.svg", rows, DRAWN_BY_BITS, "gptq", _bits, lambda row: loss(row, dense[row["model"]]),
        {"xlabel": "bits a weight, all told", "ylabel": "ln(perplexity / dense)", "ylim": (1e-4, 10)},
    )  # fmt: skip


def _draw(
    path: Path,
    rows: list[dict[str, Any]],
    drawn: dict[str, tuple[str, str]],
    needed: str,
    x: Callable[[dict[str, Any]], float],
    y: Callable[[dict[str, Any]], float],
    axes_are: dict[str, Any],
) -> None:
    """A panel a model that has rows of the method `needed`, a line a method; what is not above 0 is left out."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "cospadi"
    from matplotlib import pyplot

    models = sorted({row["model"] for row in rows if row["method"] == needed})
    drawing, axes = pyplot.subplots(1, len(models), figsize=(4.2 * len(models), 3.4), squeeze=False)
    for axis, model in zip(axes.flat, models, strict=True):
        for index, (method, (label, line)) in enumerate(drawn.items()):
            found = [row for row in rows if (row["model"], row["method"]) == (model, method)]
            points = sorted((x(row), y(row)) for row in found if y(row) > 0)
            if points:
                axis.plot(*zip(*points, strict=True), line, marker=".", color=f"C{index}", label=label)
        axis.set(yscale="log", **axes_are)
        axis.set_title(model, fontsize=9)
        axis.grid(alpha=0.3, which="both")
    axes.flat[-1].legend(*axes.flat[0].get_legend_handles_labels(), fontsize=7)
    drawing.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, metadata={"Date": None})
    print(path)


def _rows() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


if __name__ == "__main__":
    app()
