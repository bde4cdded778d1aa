"""Perplexity of a model compressed by every method at equal bytes: a row a (method, ratio), a file a row.

    python benchmarks/quality.py run MODEL --calibration FILE --text FILE
    python benchmarks/quality.py run MODEL --calibration FILE --text FILE --ratio 0.2 --ratio 0.3 --method paper
    python benchmarks/quality.py run MODEL --calibration FILE --text FILE --method coded --ratio 0.75 --ratio 0.8125
    python benchmarks/quality.py run MODEL --calibration FILE --text FILE --method gptq --method rtn --ratio 0.79125
    python benchmarks/quality.py table --output docs/results
    python benchmarks/quality.py summary
    python benchmarks/quality.py figure

Methods are those of `cospadi methods`; `sparse+refine=0` is one of them with a field changed. `oats`, `svd-llm-gptq`
and `paper-gptq` are evaluated without a checkpoint (sparse plus low rank, and quantized dictionaries, have no form),
their bytes counted.

A row that has its file is not computed again, so an interrupted run resumes where it stopped.
"""

from __future__ import annotations

import json
import math
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
import yaml
from torch import Tensor

import cospadi
from cospadi.budget.accounting import byte_budget
from cospadi.calibration.grams import Whitening
from cospadi.commands import evaluate
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
    ratio: Annotated[list[float] | None, typer.Option()] = None,
    method: Annotated[list[str] | None, typer.Option()] = None,
    threads: int = 1,
) -> None:
    """Compute the rows that are missing."""
    torch.set_num_threads(threads)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for one_ratio in [0.0] + (ratio or [0.2, 0.3, 0.4, 0.5]):
        for one_method in ["dense"] if one_ratio == 0 else (method or ALL):
            path = RESULTS / f"{model.name}-{one_method}-{one_ratio:g}.json"
            if path.exists():
                continue
            row = _row(model, calibration, text, one_ratio, one_method, threads)
            path.write_text(json.dumps(row, indent=2, sort_keys=True) + "\n")
            print(json.dumps({key: value for key, value in row.items() if key != "relative_errors"}), flush=True)


def frame(method: str) -> dict[str, Any]:
    """The recipe fields that a method's name stands for."""
    name, *changes = method.split("+")
    return {"method": name} | {field: yaml.safe_load(value) for field, _, value in (c.partition("=") for c in changes)}


def _row(model: Path, calibration: str, text: Path, ratio: float, method: str, threads: int) -> dict[str, Any]:
    row: dict[str, Any] = {"model": model.name, "method": method, "ratio_asked": ratio, "text": text.name}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = model
        if method in FORMLESS:
            folder = Path(scratch) / "approximated"
            row |= _write_formless(model, calibration, ratio, FORMLESS[method], folder)
        elif method != "dense":
            recipe = Recipe.build({"ratio": ratio, "calibration": calibration} | frame(method))
            folder = Path(scratch) / "compressed"
            result = cospadi.compress(model, recipe, folder)
            row |= {
                "ratio_reached": result.plan.ratio,
                "bytes": result.plan.bytes,
                "mean_relative_error": sum(result.errors.values()) / len(result.errors),
                "relative_errors": result.errors,
                "iterations": recipe.settled().iterations,
                "seconds_solve": round(result.seconds["solve"], 1),
                "seconds_stages": {stage: round(seconds, 1) for stage, seconds in result.seconds.items()},
                "calibration": result.manifest["recipe"]["calibration"],
                "sequences": result.manifest.get("calibration", {}).get("sequences"),
            }
        if method == "dense":
            ((_, measured),) = evaluate.evaluate_models([model], text, device="cpu")
        else:
            both = evaluate.compare_models(folder, model, text, device="cpu")
            measured, row["kl"] = both.results[0][1], both.divergence
    return row | {
        "perplexity": measured.value,
        "windows": measured.windows,
        "length": measured.length,
        "seconds": round(time.perf_counter() - start, 1),
        "threads": threads,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


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
    models = [row["model"] for row in rows if row["method"] == "dense"]
    return {model: _page(model, [row for row in rows if row["model"] == model]) for model in models}


def _page(model: str, rows: list[dict[str, Any]]) -> str:
    dense = next(row for row in rows if row["method"] == "dense")
    lines = [
        f"# {model}: every method at equal bytes",
        "",
        "Written by `python benchmarks/quality.py table --output docs/results` from `benchmarks/results/quality`.",
        "[What methods and columns mean](../results.md#methods-and-columns).",
        "",
        f"Dense perplexity {dense['perplexity']:.2f} on {dense['text']}",
        f"({dense['windows']} windows of {dense['length']} tokens).",
        "",
        "| ratio | method | T | perplexity | ln(ppl / dense) | of the paper's | KL | error | reached | solving, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    paper = {row["ratio_asked"]: _loss(row, dense) for row in rows if row["method"] == "paper"}
    compressed = [row for row in rows if row["method"] != "dense"]
    for row in sorted(compressed, key=lambda row: (row["ratio_asked"], -_loss(row, dense))):
        ratio, loss = row["ratio_asked"], _loss(row, dense)
        error, reached = row["mean_relative_error"], row["ratio_reached"]
        of_paper = f"{loss / paper[ratio]:.3f}" if ratio in paper else "-"
        divergence = f"{row['kl']:.5f}" if "kl" in row else "-"
        lines.append(
            f"| {ratio:g} | {row['method']} | {row['iterations'] or '-'} | {row['perplexity']:.2f} | {loss:.4f} "
            f"| {of_paper} | {divergence} | {error:.4f} | {reached:.4f} | {row['seconds_solve']:.0f} |"
        )
    return "\n".join(lines) + "\n"


@app.command()
def summary() -> None:
    """Print one line a model and ratio: ln(ppl / dense) of the main methods, then the divergence where it is known,
    then both of levels in a code, by bits, and beside integers."""
    print("\n".join([*summary_lines(), "", *divergence_lines(), "", *bits_lines(), "", *integer_lines()]))


def summary_lines() -> list[str]:
    """The table that README.md and docs/results.md begin with: ln(ppl / dense)."""
    rows = _rows()
    dense = {row["model"]: row for row in rows if row["method"] == "dense"}
    found = {
        (row["model"], row["ratio_asked"], row["method"]): _loss(row, dense[row["model"]])
        for row in rows
        if row["method"] != "dense"
    }
    lines = [f"| model | ratio | {' | '.join(SUMMARY)} |", f"|---|---|{'---|' * len(SUMMARY)}"]
    for model, ratio in sorted({(model, ratio) for model, ratio, _ in found}):
        values = [found.get((model, ratio, name)) for name in SUMMARY]
        if values[-1] is not None:
            shown = " | ".join("-" if value is None else f"{value:.4f}" for value in values)
            lines.append(f"| {model} | {ratio:g} | {shown} |")
    return lines


def divergence_lines() -> list[str]:
    """The same of the predictions' divergence from the dense model's, for the methods where it was measured."""
    found = {(row["model"], row["ratio_asked"], row["method"]): row["kl"] for row in _rows() if "kl" in row}
    names = [name for name in SUMMARY if any(method == name for *_, method in found)]
    lines = [f"| model | ratio | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    for model, ratio in sorted({(model, ratio) for model, ratio, method in found if method in names}):
        values = [found.get((model, ratio, name)) for name in names]
        shown = " | ".join("-" if value is None else f"{value:.5f}" for value in values)
        lines.append(f"| {model} | {ratio:g} | {shown} |")
    return lines


def bits_lines() -> list[str]:
    """A line a model and size of `coded`, in bits a weight, beside `sparse` of as many bytes."""
    rows = {(row["model"], row["ratio_asked"], row["method"]): row for row in _rows()}
    lines = ["| model | bits a weight | ln(ppl / dense) | KL | KL of `sparse` |", "|---|---|---|---|---|"]
    for model, ratio in sorted((model, -ratio) for model, ratio, method in rows if method == "coded"):
        row, other = rows[model, -ratio, "coded"], rows.get((model, -ratio, "sparse"))
        beside = f"{other['kl']:.5f}" if other else "-"
        loss = _loss(row, rows[model, 0.0, "dense"])
        lines.append(f"| {model} | {16 * (1 - row['ratio_reached']):.2f} | {loss:.4f} | {row['kl']:.5f} | {beside} |")
    return lines


def integer_lines() -> list[str]:
    """A line a model and size of `gptq`: ln(ppl / dense) and KL of all levels, of `coded` those of at most as many
    bytes, and the bits a weight that these take."""
    rows = _rows()
    dense = {row["model"]: row for row in rows if row["method"] == "dense"}
    found = {(row["model"], row["ratio_asked"], row["method"]): row for row in rows if row["method"] in LEVELS}
    lines = [f"| model | bits a weight | {' | '.join(LEVELS)} | its bits |", f"|---|---|{'---|' * len(LEVELS)}---|"]
    for model, ratio in sorted((model, -ratio) for model, ratio, method in found if method == "gptq"):
        some = {name: row for name in LEVELS if (row := found.get((model, -ratio, name)))}
        nbytes = some["gptq"]["bytes"]
        smaller = [row for (name, _, method), row in found.items() if (name, method) == (model, "coded")]
        fitting = [row for row in smaller if row["bytes"] <= nbytes]
        some |= {"coded": max(fitting, key=lambda row: row["bytes"])} if fitting else {}
        cells = [
            f"{_loss(some[name], dense[model]):.4f} / {some[name]['kl']:.5f}" if name in some else "-"
            for name in LEVELS
        ]
        cells.append(f"{_bits(some['coded']):.2f}" if "coded" in some else "-")
        lines.append(f"| {model} | {_bits(some['gptq']):.2f} | {' | '.join(cells)} |")
    return lines


def _bits(row: dict[str, Any]) -> float:
    """Bits a weight."""
    return 16 * (1 - float(row["ratio_reached"]))


@app.command()
def figure(output: Annotated[Path, typer.Option(help="folder of the images")] = IMAGES) -> None:
    """Draw errors of projections against their bytes, D stored, D = I, low rank; and the loss added against bits."""
    rows = _rows()
    dense = {row["model"]: row for row in rows if row["method"] == "dense"}
    _draw(
        output / "bytes.svg", rows, DRAWN, ALONE, lambda row: 1 - row["ratio_reached"],
        lambda row: row["mean_relative_error"],
        {"xlabel": "bytes, of the dense ones", "ylabel": "relative error at the outputs, mean"},
    )  # fmt: skip
    _draw(
        output / "bits.svg", rows, DRAWN_BY_BITS, "gptq", _bits, lambda row: _loss(row, dense[row["model"]]),
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


def _loss(row: dict[str, Any], dense: dict[str, Any]) -> float:
    return math.log(row["perplexity"] / dense["perplexity"])


if __name__ == "__main__":
    app()
