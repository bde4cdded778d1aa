"""The command `cospadi`. No logic here: flags in, calls, tables out.

It stands beside the package, not in it, because importing the package registers the checkpoint format with
transformers, which takes seconds: help and mistyped flags answer at once, and a command imports what it needs.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cospadi.jobs.progress import Stages
    from cospadi.runtime.layer import Runtime

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Make large language models smaller after training, by calibration-guided sparse dictionary learning.",
)

LONGEST_MESSAGE = 1000
NOT_OURS = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP)
"""What a system says of a file that the user named and that nobody could read or write."""

Model = Annotated[str, typer.Argument(metavar="MODEL", help="model folder, hub name, or 'demo'")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="folder that `cospadi compress` wrote")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of tables")]
Progress = Annotated[str, typer.Option(help="progress bars: auto (on a terminal), on, off (log lines)")]
RuntimeFlag = Annotated[
    str, typer.Option("--runtime", help="what layers keep in memory: auto, packed, unpacked (S) or dense (D S)")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]

# Recipe fields as flags. None means: as the recipe file says, or its default.
RecipeFile = Annotated[Path | None, typer.Option(metavar="FILE", help="YAML recipe; flags override its fields")]
Ratio = Annotated[float | None, typer.Option(help="share of the projections' bytes to remove  [default: 0.2]")]
SolverFlag = Annotated[
    str | None, typer.Option(help="mod-htp, ksvd, procrustes, eigen, svd-llm or svd  [default: mod-htp]")
]
Accounting = Annotated[str | None, typer.Option(help="exact, eq10 or eq11  [default: exact]")]
ValueBits = Annotated[int | None, typer.Option(help="bits a stored coefficient, 14 or 16  [default: 14]")]
Rho = Annotated[float | None, typer.Option(help="k / s  [default: chosen with the budgets; 2 where they are uniform]")]
Allocate = Annotated[
    str | None,
    typer.Option(help="spread the bytes by fisher, output or uniform  [default: fisher; uniform without calibration]"),
]
WeightColumns = Annotated[
    str | None,
    typer.Option(
        help="weigh outputs in the solver: fisher, none  [default: fisher; none without text and with output]"
    ),
]
FisherSequences = Annotated[
    int | None, typer.Option(help="calibration sequences that fisher is estimated on  [default: 16]")
]
Compensate = Annotated[
    bool | None,
    typer.Option(
        "--compensate/--no-compensate",
        "--propagate/--no-propagate",
        help="each projection makes up for the errors before it  [default: yes; no without text and with layers:N]",
    ),
]
Update = Annotated[str | None, typer.Option(help="dictionary update of ksvd: power, pca or mod  [default: power]")]
Iterations = Annotated[int | None, typer.Option(help="alternations T of mod-htp, ksvd, procrustes  [default: 60]")]
Tolerance = Annotated[float | None, typer.Option(help="stop when an iteration gains less than this fraction")]
Seed = Annotated[int | None, typer.Option(help="[default: 42]")]
Share = Annotated[
    str | None,
    typer.Option(help="what shares a dictionary: none, input, layers:N or input,layers:N  [default: input]"),
]
DataFree = Annotated[bool | None, typer.Option("--data-free", help="no calibration text")]
Damping = Annotated[float | None, typer.Option(help="shift of a singular Gram, in mean diagonals  [default: 1e-6]")]
Include = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="projections to compress (repeatable)")]
Exclude = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="projections to leave dense (repeatable)")]
Target = Annotated[str | None, typer.Option(help="projection types, comma-separated: up,gate is the paper's UG")]
Calibration = Annotated[
    str | None,
    typer.Option(metavar="SOURCE", help=".txt, .jsonl or .parquet file, hub data set, or builtin  [default: web text]"),
]
CalibrationConfig = Annotated[str | None, typer.Option(help="configuration of a hub data set")]
CalibrationSplit = Annotated[str | None, typer.Option(help="split of a hub data set  [default: train]")]
CalibrationField = Annotated[str | None, typer.Option(help="text field  [default: text, else content]")]
Sequences = Annotated[int | None, typer.Option(help="calibration sequences  [default: 256]")]
Length = Annotated[int | None, typer.Option(help="tokens a sequence  [default: 1024, or the model's positions]")]
BatchSize = Annotated[int | None, typer.Option(help="sequences in a forward pass  [default: 4]")]
RecipeDevice = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N  [default: auto]")]
Revision = Annotated[str | None, typer.Option(help="branch, tag or commit of a hub model")]

# How the work is done, which is no part of a recipe: the result does not depend on it, but for threads.
EngineFlag = Annotated[str, typer.Option("--engine", help="who solves: local (this machine) or ray (a cluster)")]
Workers = Annotated[int, typer.Option(min=1, help="processes that solve, with --engine local; 1 is this one alone")]
ThreadsPerTask = Annotated[
    int | None, typer.Option(min=1, help="CPU threads of one solve  [default: torch's choice over the workers]")
]
RayAddress = Annotated[str | None, typer.Option(help="cluster to join  [default: RAY_ADDRESS, or a local one]")]
AllowMixed = Annotated[
    bool, typer.Option("--allow-mixed", help="let machines of different device models solve parts of one job")
]
CacheGb = Annotated[
    float, typer.Option(min=0, help="GB of hidden states and whitenings kept in memory, not on disk or made again")
]
KeepGrams = Annotated[
    bool,
    typer.Option("--keep-grams", help="write whitenings that exceed that to the job directory, not make them again"),
]
Resume = Annotated[
    bool | None,
    typer.Option(
        "--resume/--no-resume",
        help="go on with an unfinished job in DIR.work, or begin anew  [default: go on if it is the same job]",
    ),
]


@app.command()
def compress(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="folder to write")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is in the output folder")] = False,
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="sizes and recipe that `cospadi plan --measure` saved")
    ] = None,
    recipe: RecipeFile = None,
    ratio: Ratio = None,
    solver: SolverFlag = None,
    accounting: Accounting = None,
    value_bits: ValueBits = None,
    rho: Rho = None,
    allocate: Allocate = None,
    weight_columns: WeightColumns = None,
    fisher_sequences: FisherSequences = None,
    compensate: Compensate = None,
    update: Update = None,
    iterations: Iterations = None,
    tolerance: Tolerance = None,
    seed: Seed = None,
    share: Share = None,
    data_free: DataFree = None,
    damping: Damping = None,
    include: Include = None,
    exclude: Exclude = None,
    target: Target = None,
    calibration: Calibration = None,
    calibration_config: CalibrationConfig = None,
    calibration_split: CalibrationSplit = None,
    calibration_field: CalibrationField = None,
    sequences: Sequences = None,
    length: Length = None,
    batch_size: BatchSize = None,
    device: RecipeDevice = None,
    revision: Revision = None,
    resume: Resume = None,
    engine: EngineFlag = "local",
    workers: Workers = 1,
    threads_per_task: ThreadsPerTask = None,
    ray_address: RayAddress = None,
    allow_mixed: AllowMixed = False,
    cache_gb: CacheGb = 4,
    keep_grams: KeepGrams = False,
    as_json: Json = False,
    progress: Progress = "auto",
) -> None:
    """Compress a model and write a checkpoint that from_pretrained loads."""
    flags = dict(locals())
    with _if_stopped(lambda: _what_is_left(output)):
        built = _recipe(flags)
        stages = _talk(progress)
        from cospadi.commands import tables
        from cospadi.compress import compress as run

        with stages.shown():
            result = run(
                model, built, output, plan=plan, overwrite=overwrite, resume=resume, engine=_engine(flags),
                cache_bytes=int(cache_gb * 1e9), keep_grams=keep_grams, stages=stages,
            )  # fmt: skip
    _show(tables.compressed_json(result, built), as_json, tables.compressed_table(result, built))


@app.command()
def plan(
    model: Model,
    measure: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="calibrate, choose each group's size, save them for `compress --plan FILE`"),
    ] = None,
    recipe: RecipeFile = None,
    ratio: Ratio = None,
    solver: SolverFlag = None,
    accounting: Accounting = None,
    value_bits: ValueBits = None,
    rho: Rho = None,
    allocate: Allocate = None,
    weight_columns: WeightColumns = None,
    fisher_sequences: FisherSequences = None,
    compensate: Compensate = None,
    update: Update = None,
    iterations: Iterations = None,
    tolerance: Tolerance = None,
    seed: Seed = None,
    share: Share = None,
    data_free: DataFree = None,
    damping: Damping = None,
    include: Include = None,
    exclude: Exclude = None,
    target: Target = None,
    calibration: Calibration = None,
    calibration_config: CalibrationConfig = None,
    calibration_split: CalibrationSplit = None,
    calibration_field: CalibrationField = None,
    sequences: Sequences = None,
    length: Length = None,
    batch_size: BatchSize = None,
    device: RecipeDevice = None,
    revision: Revision = None,
    resume: Resume = None,
    engine: EngineFlag = "local",
    workers: Workers = 1,
    threads_per_task: ThreadsPerTask = None,
    ray_address: RayAddress = None,
    allow_mixed: AllowMixed = False,
    cache_gb: CacheGb = 4,
    keep_grams: KeepGrams = False,
    timing: Annotated[
        bool, typer.Option("--timing/--no-timing", help="run pieces of the job for some seconds to tell its time")
    ] = True,
    as_json: Json = False,
    progress: Progress = "auto",
) -> None:
    """Show what `compress` would do: from the model's config and headers alone, or measured."""
    flags = dict(locals())
    with _if_stopped(lambda: _what_is_left(measure) if measure else "Nothing was written."):
        built = _recipe(flags)
        stages = _talk(progress if measure else "off")
        from cospadi.budget.plan import check_plan_file, outlook, write_plan
        from cospadi.commands import tables
        from cospadi.commands.estimate import estimate
        from cospadi.compress import measure_plan, work_folder
        from cospadi.stages.open import allocation_of

        measured = None
        if measure:
            check_plan_file(measure)
            with stages.shown():
                measured = measure_plan(
                    model, built, work=work_folder(measure), resume=resume, engine=_engine(flags),
                    cache_bytes=int(cache_gb * 1e9), keep_grams=keep_grams, stages=stages,
                )  # fmt: skip
            write_plan(measured, built, measure)
        found = outlook(model, built, measured)
        costs = estimate(
            model, built, found.plan, final=measured is not None, cache_bytes=int(cache_gb * 1e9),
            keep_grams=keep_grams, timing=timing,
        )  # fmt: skip
    notes = [f"Whole checkpoint: {tables.megabytes(found.before)} before, {tables.megabytes(found.after)} after."]
    if found.experts:
        notes.append(f"Left dense, experts that are not nn.Linear: {found.experts}")
    if measure:
        notes.append(f"Saved to {measure}: cospadi compress {model} --plan {measure} --output DIR")
    final = measured is not None or allocation_of(built) == "uniform"
    if not final:
        notes.append(
            f"This is the uniform budget. Under --allocate {allocation_of(built)} only the groups and the total are "
            "final: what each group gets is measured with calibration text, which --measure FILE does."
        )
    data = tables.plan_json(found.plan, built, found.before, found.after, final)
    data["estimate"] = tables.estimate_json(costs)
    _show(data, as_json, tables.plan_table(found.plan), *notes, "", tables.estimate_table(costs))


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="DIR", help="compressed or dense model")],
    text: Annotated[Path, typer.Option(metavar="FILE", help="UTF-8 text to measure on")],
    against: Annotated[str | None, typer.Option(metavar="MODEL", help="a second model to compare with")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="tokens a window  [default: min(1024, positions)]")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="windows in a forward pass")] = 4,
    device: Device = "auto",
    runtime: RuntimeFlag = "auto",
    as_json: Json = False,
    progress: Progress = "auto",
) -> None:
    """Perplexity on a text, in non-overlapping windows."""
    stages = _talk(progress)
    from cospadi.commands import tables
    from cospadi.commands.evaluate import evaluate_models

    with stages.shown():
        results = evaluate_models(
            [model, *([against] if against else [])], text, length, batch_size, device, stages, _runtime(runtime)
        )
    _show(tables.perplexity_json(results), as_json, *tables.perplexity_lines(results))


@app.command()
def inspect(folder: Folder, as_json: Json = False) -> None:
    """List what is in a compressed checkpoint: bytes, ratio and error a projection; totals."""
    _talk("off")
    from cospadi.commands import tables
    from cospadi.format import safetensors, verify

    data = tables.inspect_json(*verify.read_checkpoint(folder), safetensors.stored_tensors(folder))
    _show(data, as_json, tables.inspect_table(data), f"Whole checkpoint: {tables.megabytes(data['checkpoint_bytes'])}.")


@app.command()
def verify(folder: Folder, as_json: Json = False) -> None:
    """Check every byte of a compressed checkpoint against its manifest."""
    _talk("off")
    from cospadi.format import verify

    count = verify.verify(folder)
    _show({"tensors": count, "ok": True}, as_json, f"{folder}: all {count} tensors are as they were written.")


@app.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="DIR", help="compressed or dense model")],
    prompt: Annotated[str, typer.Argument(help="text to continue")],
    tokens: Annotated[int, typer.Option(min=1, help="new tokens at most")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 42,
    device: Device = "auto",
    runtime: RuntimeFlag = "auto",
) -> None:
    """Continue a prompt: a quick look that the model still speaks."""
    _talk("off")
    from cospadi.commands.evaluate import continue_text

    typer.echo(continue_text(model, prompt, tokens, temperature, seed, device, _runtime(runtime)))


@app.command()
def demo(
    ratio: Annotated[float, typer.Option(help="share of the projections' bytes to remove")] = 0.3,
    iterations: Annotated[int | None, typer.Option(min=1, help="alternations T of K-SVD")] = None,
    as_json: Json = False,
    progress: Progress = "auto",
) -> None:
    """The whole job with no network: the built-in model, dense vs SVD-LLM vs the paper's K-SVD vs CoSpaDi."""
    from dataclasses import asdict

    stages = _talk(progress)
    from cospadi.commands import tables
    from cospadi.commands.demo import ITERATIONS, run_demo
    from cospadi.recipe import Recipe

    Recipe.build(ratio=ratio)  # refuses one that is out of range before the first model is measured
    with stages.shown():
        rows = run_demo(ratio, iterations or ITERATIONS, stages)
    _show({"rows": [asdict(row) for row in rows]}, as_json, tables.demo_table(rows))


@app.command()
def bench(
    model: Annotated[str, typer.Argument(metavar="DIR", help="compressed or dense model")],
    against: Annotated[str | None, typer.Option(metavar="MODEL", help="the dense model it was made of")] = None,
    low_rank: Annotated[str | None, typer.Option(metavar="DIR", help="a low-rank model of equal bytes")] = None,
    prefill: Annotated[list[int] | None, typer.Option(help="prompt lengths, repeatable  [default: 128, 512]")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="sequences decoded, repeatable  [default: 1, 4, 16]")] = None,
    tokens: Annotated[int, typer.Option(help="decoding steps timed together")] = 16,
    repeats: Annotated[int, typer.Option(help="timed runs of each")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads  [default: torch's choice]")] = None,
    device: Device = "auto",
    runtime: RuntimeFlag = "auto",
    as_json: Json = False,
    progress: Progress = "auto",
) -> None:
    """Tokens per second and memory, side by side with the dense model; the models take turns."""
    stages = _talk(progress)
    import torch

    from cospadi.commands import tables
    from cospadi.commands.bench import DECODE_BATCHES, PREFILL_TOKENS
    from cospadi.commands.bench import bench as measure

    if threads is not None:
        torch.set_num_threads(threads)
    models = [name for name in (against, low_rank, model) if name is not None]
    with stages.shown():
        results = measure(
            models,
            prefill or PREFILL_TOKENS,
            batch or DECODE_BATCHES,
            tokens,
            repeats,
            device,
            _runtime(runtime),
            stages,
        )
    _show(tables.bench_json(results), as_json, tables.bench_table(results))


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine and installation have: versions, kernels, devices, and whether the kernels compute rightly."""
    _talk("off")
    from cospadi.commands import doctor, tables

    found = doctor.examine()
    _show(found.as_json(), as_json, tables.doctor_table(found), *found.advice)
    if not found.right:
        raise typer.Exit(1)


def main() -> None:
    """Entry point: exit code 0, 2 for the user's mistake, 1 for ours, 130 after Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold bytes that are no characters
    if sys.argv[1:2] in (["compress"], ["plan"], ["demo"]):
        # OpenMP's threads then sleep while they wait. Spinning, they slow the many small products of sparse coding
        # several times as soon as anything else wants a core. Read when torch is loaded, which has not happened yet.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "show"):  # click's usage errors
            error.show()
            sys.exit(error.exit_code)
        from cospadi.errors import UserError

        if isinstance(error, UserError):
            _fail(_one_line(str(error)), 2)
        if os.environ.get("COSPADI_TRACEBACK") == "1":
            raise
        if getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error):
            _fail(
                "the disk is full. Free some space and run the same command again: it goes on from what is finished", 1
            )
        if isinstance(error, MemoryError) or "not enough memory" in str(error) or "out of memory" in str(error):
            _fail("out of memory. Use a smaller --batch-size, or a machine with more memory", 1)
        if isinstance(error, OSError) and error.filename is not None and error.errno in NOT_OURS:
            _fail(_one_line(f"{error.filename}: {error.strerror}"), 2)
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        _fail(f"{type(error).__name__}: {first}\nThis is a fault of cospadi. COSPADI_TRACEBACK=1 shows where", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
    typer.echo(message, err=True)
    sys.exit(code)


def _one_line(message: str) -> str:
    """A message of bounded length that a terminal shows as it is, whatever the names in it, which a file may hold."""
    text = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in message)
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]} ..."


def _recipe(flags: dict[str, Any]) -> Any:
    """A Recipe from the flags that were given, over the recipe file or the saved plan."""
    from cospadi.budget.plan import read_plan_recipe
    from cospadi.errors import UserError
    from cospadi.recipe import Recipe

    given = {name: flags[name] for name in Recipe.model_fields if flags.get(name) is not None}
    for name in ("include", "exclude"):
        if name in given:
            given[name] = tuple(given[name])
    if flags.get("plan") is None:
        return Recipe.build(flags["recipe"], **given)
    if flags["recipe"] is not None:
        raise UserError(
            f"--recipe would change the plan that {flags['plan']} holds, which has its recipe. Leave it out"
        )
    return read_plan_recipe(flags["plan"], **given)


def _runtime(name: str) -> Runtime:
    """A --runtime that is known."""
    from typing import cast, get_args

    from cospadi.runtime.layer import Runtime

    if name not in get_args(Runtime):
        raise typer.BadParameter(_one_line(f"--runtime {name} is not known. Use {', '.join(get_args(Runtime))}"))
    return cast(Runtime, name)


@contextmanager
def _if_stopped(message: Callable[[], str]) -> Iterator[None]:
    """On Ctrl-C say so, and what it means."""
    try:
        yield
    except KeyboardInterrupt:
        typer.secho(f"Stopped. {message()}", bold=True, err=True)
        raise


def _what_is_left(output: Path) -> str:
    from cospadi.compress import work_folder

    if not work_folder(output).exists():
        return f"Nothing was written to {output}. The same command starts over."
    return f"What is finished is kept in {work_folder(output)}: the same command goes on from there."


def _engine(flags: dict[str, Any]) -> Any:
    """Who solves, by the flags."""
    from typing import get_args

    from cospadi.jobs.pool import Engine, Kind

    if flags["engine"] not in get_args(Kind):
        raise typer.BadParameter(f"--engine {flags['engine']} is not known. Use {', '.join(get_args(Kind))}")
    names = ("workers", "threads_per_task", "ray_address", "allow_mixed")
    return Engine(flags["engine"], **{name: flags[name] for name in names})


def _talk(progress: str) -> Stages:
    """Progress and log on stderr; other libraries keep quiet."""
    from rich.console import Console

    from cospadi.jobs.progress import Stages, log_to

    if progress not in ("auto", "on", "off"):
        raise typer.BadParameter(_one_line(f"--progress {progress} is not known. Use auto, on or off"))
    console = Console(stderr=True)
    bars = progress == "on" or (progress == "auto" and console.is_terminal)
    log_to(console, bars)
    _silence_libraries()
    return Stages(console if bars else None)


def _silence_libraries() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # for when it is imported later
    logging.getLogger("datasets").setLevel(logging.CRITICAL)


def _show(data: dict[str, Any], as_json: bool, *parts: object) -> None:
    """JSON, or tables and lines, on stdout."""
    if as_json:
        typer.echo(json.dumps(data, indent=2))
        return
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=160)
    for part in parts:
        console.print(part, highlight=False, markup=False)
