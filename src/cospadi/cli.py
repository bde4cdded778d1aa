"""The command `cospadi`. No logic here: flags in, calls, tables out.

The flags of a job are made of the recipe's fields. Each command imports what it needs, since torch and transformers
take seconds: help and mistyped flags answer at once (see `cospadi_cli`).
"""

from __future__ import annotations

import errno
import functools
import importlib
import io
import json
import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from inspect import Parameter, Signature, signature
from pathlib import Path
from types import FrameType, NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, cast, get_args, get_origin

import typer

from cospadi.__about__ import __version__
from cospadi.errors import UserError
from cospadi.recipe import CACHE_BYTES, CALIBRATED, MOST, Healing, Recipe

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

    from cospadi.jobs.progress import Stages
    from cospadi.model.hub import Pushed
    from cospadi.runtime.layer import Runtime

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Make large language models smaller after training, by calibration-guided sparse dictionary learning.",
)


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"cospadi {__version__}")
        raise typer.Exit


@app.callback()
def _any_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    pass


LM_EVALS_OWN = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""For a command whose flags, --help too, another program reads."""

GB = 10**9
LONGEST_MESSAGE = 1000
NOT_OURS = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP)
"""What a system says of a file that the user named and that nobody could read or write."""

Model = Annotated[str, typer.Argument(metavar="MODEL", help="folder, hub name, NAME@REVISION, or 'demo'")]
TextField = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="the rows' text field  [default: text, content, messages, conversations]"),
]
Folder = Annotated[
    str, typer.Argument(metavar="DIR", help="folder that `cospadi compress` wrote, or where it is on the hub")
]
AnyModel = Annotated[
    str, typer.Argument(metavar="DIR", help="compressed or dense model: folder, hub name, or NAME@REVISION")
]
Private = Annotated[bool, typer.Option("--private", help="the repository has to be private; a new one is made so")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of tables")]
Progress = Annotated[
    str, typer.Option(help="progress bars: auto (on a terminal), on, off (log lines); json: lines of JSON on stderr")
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="of what is drawn at a temperature above 0")]
RuntimeFlag = Annotated[
    str, typer.Option("--runtime", help="what layers keep in memory: auto, packed, unpacked (S) or dense (D S)")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
RecipeFile = Annotated[Path | None, typer.Option(metavar="FILE", help="YAML recipe; flags override its fields")]
CacheGb = Annotated[
    float,
    typer.Option(
        min=0,
        max=10**6,
        help="GB (10^9 bytes) of hidden states kept in memory, not on disk",
    ),
]

Resume = Annotated[
    bool | None,
    typer.Option(
        "--resume/--no-resume",
        help="resume what is unfinished, or restart it  [default: resume if it is the same job]",
    ),
]

ALIASES = {"compensate": "propagate"}
"""Recipe field -> another spelling of its flag."""
BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def _how(
    resume: Resume = None,
    engine: Annotated[str, typer.Option(help="who solves: local (this machine) or ray (a cluster)")] = "local",
    workers: Annotated[
        int, typer.Option(min=1, help="processes that solve, with --engine local; 1 is this one alone")
    ] = 1,
    threads_per_task: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of one solve  [default: torch's choice over the workers]")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="cluster to join  [default: RAY_ADDRESS, or a local one]")
    ] = None,
    allow_mixed: Annotated[
        bool, typer.Option("--allow-mixed", help="let machines of different device models solve parts of one job")
    ] = False,
    cache_gb: CacheGb = CACHE_BYTES / GB,
) -> dict[str, Any]:
    """How a job runs, which is no part of its recipe, as keywords of `compress` and `measure_plan`."""
    from cospadi.jobs.pool import Engine, Kind

    if engine not in get_args(Kind):
        raise typer.BadParameter(_one_line(f"--engine {engine} is not known. Use {', '.join(get_args(Kind))}"))
    return {
        "resume": resume,
        "engine": Engine(cast(Kind, engine), workers, threads_per_task, ray_address, allow_mixed),
        "cache_bytes": int(cache_gb * GB),
    }


HOW = signature(_how, eval_str=True).parameters


def _flag(name: str, field: FieldInfo) -> Parameter:
    """A field of the recipe as a flag; it is None where the flag is not given."""
    kind, metavar = _but_none(field.annotation), field.title
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        kind, metavar = type(choices[0]), f"[{'|'.join(map(str, choices))}]"
    elif get_origin(kind) is tuple:
        kind = list[str]
    spelled = [word.replace("_", "-") for word in (name, ALIASES.get(name)) if word]
    flags = [f"--{word}/--no-{word}" if kind is bool else f"--{word}" for word in spelled]
    option = typer.Option(*flags, metavar=metavar, help=_help(field))
    annotation: Any = Annotated[kind | None, option]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _but_none(annotation: Any) -> Any:
    """X of `X | None`."""
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    return kinds[0] if NoneType in get_args(annotation) else annotation


def _help(field: FieldInfo) -> str:
    """A field's description, its default, and the range of its values where somebody could leave it."""
    text, _, default = (field.description or "").removesuffix(")").partition(" (default: ")
    if not default:
        text, default = field.description or "", _shown(field.default)
    if get_origin(field.annotation) is tuple:
        text += " (repeatable)"
    limits = [
        f"{words} {_shown(limit)}"
        for bound, words in BOUNDS.items()
        for limit in (getattr(rule, bound, None) for rule in field.metadata)
        if limit is not None and limit < MOST
    ]
    return f"{text}  [{'; '.join([f'default: {default}', *limits])}]"


def _shown(value: object) -> str:
    """A default or a limit, for reading."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _taking(made: Sequence[Parameter]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Put flags in place of a command's parameter `flags`, which gets what was given."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        names = [parameter.name for parameter in made]
        parameters: list[Parameter] = []
        for parameter in signature(command, eval_str=True).parameters.values():
            parameters += made if parameter.name == "flags" else [parameter]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            command(flags={name: given.pop(name) for name in names}, **given)

        keywords = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in parameters]
        run.__signature__ = Signature(keywords)  # type: ignore[attr-defined]
        return run

    return decorate


def _fields(model: type[BaseModel]) -> list[Parameter]:
    return [_flag(name, field) for name, field in model.model_fields.items()]


def _of_a_job(command: Callable[..., None]) -> Callable[..., None]:
    """Flags for the recipe and for `_how`."""
    file = Parameter("recipe", Parameter.KEYWORD_ONLY, default=None, annotation=RecipeFile)
    return _taking([file, *_fields(Recipe), *HOW.values()])(command)


def _of_jobs(command: Callable[..., None]) -> Callable[..., None]:
    """Flags for what jobs of several recipes have in common, and for `_how`."""
    fields = [_flag(name, Recipe.model_fields[name]) for name in CALIBRATED]
    return _taking([*fields, *HOW.values()])(command)


@app.command()
@_of_a_job
def compress(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="folder to write")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is in the output folder")] = False,
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="sizes and recipe that `cospadi plan --measure` saved")
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="REPO", help="upload the result to this hub repository, made if there is none")
    ] = None,
    private: Private = False,
    report: Annotated[
        bool, typer.Option("--report", help="write DIR/report.html, too: see cospadi report, which can compare as well")
    ] = False,
    *,
    flags: dict[str, Any],
    as_json: Json = False,
    progress: Progress = "auto",
) -> None:
    """Compress a model and write a checkpoint that from_pretrained loads."""
    if private and push is None:
        raise UserError("--private is of --push, which is not given")
    with _if_stopped(lambda: _what_is_left(output)):
        recipe = _recipe(flags, plan)
        stages, how = _talk(progress), _how(**_part(flags, HOW))
        from cospadi.commands.compress import compressed_json, compressed_parts
        from cospadi.compress import compress as run
        from cospadi.model import hub
        from cospadi.stages.open import check_before

        if report:
            from cospadi.commands.report import REPORT, gather, write
            from cospadi.report.figures import check_library

            check_library()
        repo = None
        if push is not None:
            check_before(output, overwrite)  # a repository is not made for nothing
            repo = hub.claim(push, private or None)
        with stages.shown():
            result = run(model, recipe, output, plan=plan, overwrite=overwrite, stages=stages, **how)
    data, parts = compressed_json(result, recipe), compressed_parts(result, recipe)
    done, failed = f"The model is compressed, and {output} is written.", None
    if report:
        write(gather(output, before=result.before or None), output / REPORT)
        parts.append(f"Report: {output / REPORT}")
    if repo is not None:
        again = f"{shlex.join(['cospadi', 'push', str(output), repo])} uploads it"
        with _if_stopped(lambda: f"{output} is written: {again}."):
            try:
                pushed = hub.upload(output, repo)
                data["pushed"] = asdict(pushed)
                parts.append(_pushed(pushed))
            except UserError as error:
                failed = UserError(f"{error}. {output} is whole: {again}")
    _show(data, as_json, *parts, done=None if failed else done)
    if failed:
        raise failed


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder that `cospadi compress` wrote")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="hub repository, made if there is none")],
    private: Private = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="branch to commit to, made if there is none  [default: main]")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="open a pull request with the commit")] = False,
    commit_message: Annotated[str | None, typer.Option(metavar="TEXT", help="the commit's first line")] = None,
    as_json: Json = False,
) -> None:
    """Check every byte of a compressed checkpoint and upload it to the hub, as one commit."""
    _talk("off", loads_models=False)
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from cospadi.format import verify
    from cospadi.model import hub

    if not sys.stderr.isatty():
        disable_progress_bars()
    verify.verify(folder)
    full = repo if create_pr else hub.claim(repo, private or None)
    with _if_stopped(lambda: "Nothing was committed. The same command sends what is missing."):
        pushed = hub.upload(folder, full, commit_message, revision=revision, create_pr=create_pr)
    _show(asdict(pushed), as_json, _pushed(pushed), done=f"{folder} is uploaded: {pushed.url}.")


def _pushed(pushed: Pushed) -> str:
    return f"Uploaded: {pushed.url}\n{pushed.repo}@{pushed.commit} names it for ever."


@app.command()
@_of_a_job
def plan(
    model: Model,
    measure: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="calibrate, choose each group's size, save them for `compress --plan FILE`"),
    ] = None,
    *,
    flags: dict[str, Any],
    timing: Annotated[
        bool, typer.Option("--timing/--no-timing", help="run pieces of the job for some seconds to tell its time")
    ] = True,
    as_json: Json = False,
    progress: Progress = "auto",
) -> None:
    """Show what `compress` would do: from the model's config and headers alone, or measured."""
    with _if_stopped(lambda: _what_is_left(measure) if measure else "Nothing was written."):
        recipe = _recipe(flags)
        stages, how = _talk(progress if measure else "off"), _how(**_part(flags, HOW))
        from cospadi.commands.plan import plan as look

        with stages.shown():
            found = look(model, recipe, measure, timing, stages, **how)
    _show(found.as_json(), as_json, *found.parts(), done=f"The plan is saved to {measure}." if measure else None)


@app.command()
@_of_jobs
def compare(
    model: Model,
    text: Annotated[Path, typer.Option(metavar="FILE", help="text, or rows, for perplexity and divergence")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="folder of rows, tables and figure")],
    ratios: Annotated[
        str | None, typer.Option(metavar="R,R", help="sizes of methods that leave weights out, or are of low rank")
    ] = None,
    bits: Annotated[str | None, typer.Option(metavar="B,B", help="sizes of methods that store levels")] = None,
    methods: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="of `cospadi methods`; METHOD+FIELD=VALUE is one changed  [default: all]"),
    ] = None,
    text_field: TextField = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAMES", help="lm-eval's tasks, with commas between; 'paper': the paper's")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(metavar="FOLDER", help="more task files of lm-eval's")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="the first documents of each task  [default: all]")] = None,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="leave the models in DIR/models")] = False,
    *,
    flags: dict[str, Any],
    runtime: RuntimeFlag = "auto",
    as_json: Json = False,
    progress: Progress = "auto",
) -> None:
    """Compress a model by every method at every size: one table and one figure of what each loses."""
    if tasks is None and (include_path is not None or limit is not None):
        raise UserError("--include-path and --limit are of --tasks, which is not given")
    with _if_stopped(lambda: f"What is finished is kept in {output}: the same command resumes from there."):
        given = _given(flags, CALIBRATED)
        stages, how = _talk(progress), _how(**_part(flags, HOW))
        from cospadi.commands.compare import compare as run
        from cospadi.commands.compare import parse_sizes
        from cospadi.commands.comparison import comparison_json, comparison_table, notes

        with stages.shown():
            rows = run(
                model,
                text,
                output,
                ratios=parse_sizes(ratios, "--ratios"),
                bits=parse_sizes(bits, "--bits"),
                methods=methods and methods.split(","),
                recipe=given,
                text_field=text_field,
                tasks=tasks and tasks.split(","),
                include_path=include_path,
                limit=limit,
                keep_models=keep_models,
                runtime=_runtime(runtime),
                stages=stages,
                **how,
            )
    parts = [comparison_table(rows), *notes(rows), f"Written to {output}."]
    _show(comparison_json(rows), as_json, *parts, done=f"The rows are computed, and {output} is written.")


@app.command()
@_taking(_fields(Healing))
def heal(
    folder: Folder,
    text: Annotated[
        Path, typer.Option(metavar="FILE", help="text, or rows (.jsonl, .json, .parquet); its end is set aside")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUTPUT", help="folder to write")],
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="the dense model  [default: the one that the folder names]")
    ] = None,
    text_field: TextField = None,
    *,
    flags: dict[str, Any],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is in the output folder")] = False,
    resume: Resume = None,
    device: Device = "auto",
    as_json: Json = False,
    progress: Progress = "auto",
) -> None:
    """Train what a compressed folder stores towards its dense model's predictions; the bytes stay the same."""
    how = Healing.build(**{name: value for name, value in flags.items() if value is not None})
    with _if_stopped(lambda: _what_is_left(output)):
        stages = _talk(progress)
        from cospadi.commands.heal import healed_json, healed_lines, healed_table
        from cospadi.heal import heal as run
        from cospadi.jobs.ranks import is_first

        given: dict[str, Any] = {"teacher": teacher, "text_field": text_field, "device": device, "resume": resume}
        with stages.shown():
            result = run(folder, text, output, how, overwrite=overwrite, stages=stages, **given)
    if is_first():
        shown = healed_table(result), *healed_lines(result)
        _show(healed_json(result), as_json, *shown, done=f"{output} is written.")


@app.command("eval")
def evaluate(
    model: AnyModel,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="text, or rows (.jsonl, .json, .parquet), for perplexity")
    ] = None,
    text_field: TextField = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAMES", help="lm-eval's tasks, with commas between; 'paper': the paper's")
    ] = None,
    against: Annotated[str | None, typer.Option(metavar="MODEL", help="a second model to compare with")] = None,
    kl: Annotated[bool, typer.Option("--kl", help="the divergence from it too, with both in memory")] = False,
    length: Annotated[int | None, typer.Option(min=2, help="tokens a window  [default: min(1024, positions)]")] = None,
    include_path: Annotated[Path | None, typer.Option(metavar="FOLDER", help="more task files of lm-eval's")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="the first documents of each task  [default: all]")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="windows or requests in a forward pass")] = 4,
    card: Annotated[
        bool, typer.Option("--card", help="write the figures into the model's card, DIR/README.md")
    ] = False,
    device: Device = "auto",
    runtime: RuntimeFlag = "auto",
    as_json: Json = False,
    progress: Progress = "auto",
) -> None:
    """Perplexity on a text, in non-overlapping windows; accuracy on tasks, by lm-evaluation-harness."""
    if text is None and tasks is None:
        raise UserError("there is nothing to measure. Give --text FILE, --tasks NAMES or both")
    if tasks is None and (include_path is not None or limit is not None):
        raise UserError("--include-path and --limit are of --tasks, which is not given")
    if text is None and text_field is not None:
        raise UserError("--text-field is of --text, which is not given")
    if kl and (text is None or against is None):
        raise UserError("--kl compares with a second model on a text. Give --text FILE and --against MODEL")
    stages, chosen = _talk(progress), _runtime(runtime)
    models = [model, *([against] if against else [])]
    if card:
        from cospadi.commands.card import check_card, quality_rows, write_measured

        path = check_card(model)
    data: dict[str, Any] = {}
    parts: list[object] = []
    with stages.shown():
        if tasks is not None:
            from cospadi.commands import accuracy

            suite = accuracy.open_suite(tasks.split(","), include_path)
        if text is not None:
            from cospadi.commands.evaluate import compare_models, evaluate_models, perplexity_json, perplexity_lines

            divergence, how = None, (length, batch_size, device, stages, chosen, text_field)
            if kl and against is not None:
                compared = compare_models(model, against, text, *how)
                results, divergence = compared.results, compared.divergence
            else:
                results = evaluate_models(models, text, *how)
            data |= perplexity_json(results, divergence)
            parts += perplexity_lines(results, divergence)
        if tasks is not None:
            found = accuracy.measure_accuracies(models, suite, limit, batch_size, device, stages, chosen)
            data["tasks"] = accuracy.accuracy_json(found)
            parts += [accuracy.accuracy_table(found), accuracy.HOW_TO_READ]
    if card:
        asked = {"text": text, "text-field": text_field, "tasks": tasks, "against": against, "kl": kl, "length": length}
        asked |= {"include-path": include_path, "limit": limit, "batch-size": batch_size}
        write_measured(path, "eval", asked, [against], quality_rows(data))
        parts.append(f"Written to {path}.")
    _show(data, as_json, *parts)


@app.command("lm-eval", context_settings=LM_EVALS_OWN)
def lm_eval(context: typer.Context) -> None:
    """lm-evaluation-harness's own command line, which then knows --model cospadi --model_args pretrained=DIR."""
    _talk("off", loads_models=False)
    importlib.import_module("cospadi.integrations.lm_eval").main(context.args)


@app.command()
def methods(as_json: Json = False) -> None:
    """List the named recipes of --method: what each is and what it sets."""
    _talk("off", loads_models=False)
    from cospadi.commands.tables import new_table
    from cospadi.recipe import METHODS

    table = new_table("method", "what it is", "what it sets")
    for name, method in METHODS.items():
        table.add_row(name, method.says, " ".join(f"{field}={value}" for field, value in method.fields.items()) or "-")
    _show({name: {"is": method.says, "sets": method.fields} for name, method in METHODS.items()}, as_json, table)


@app.command()
def inspect(
    folder: Folder,
    memory: Annotated[
        bool, typer.Option("--memory", help="load it, too, and tell what it takes in this machine's memory")
    ] = False,
    as_json: Json = False,
) -> None:
    """List what is in a compressed checkpoint: bytes, ratio and error a projection; totals."""
    _talk("off", loads_models=memory)
    from cospadi.commands.inspect import inspect as look
    from cospadi.commands.inspect import inspect_table, memory_line
    from cospadi.commands.tables import megabytes
    from cospadi.model import hub

    path = hub.folder_of(folder)
    data = look(path)
    parts = [inspect_table(data), f"Whole checkpoint: {megabytes(data['checkpoint_bytes'])}."]
    if memory:
        from cospadi.commands.bench import memory_of_layers

        data["memory"] = memory_of_layers(path)
        parts.append(memory_line(data["memory"]))
    _show(data, as_json, *parts)


@app.command()
def verify(folder: Folder, as_json: Json = False) -> None:
    """Check every byte of a compressed checkpoint against its manifest."""
    _talk("off", loads_models=False)
    from cospadi.format import verify
    from cospadi.model import hub

    count = verify.verify(hub.folder_of(folder))
    _show({"tensors": count, "ok": True}, as_json, f"{folder}: all {count} tensors are as they were written.")


@app.command()
def report(
    folder: Folder,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="the dense model it was made of, to compare with")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="held-out text, or rows, on which both are compared")
    ] = None,
    text_field: TextField = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="page to write  [default: DIR/report.html]")
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="print a summary for a model card instead; no page is written")
    ] = False,
    length: Annotated[int | None, typer.Option(min=2, help="tokens a window  [default: min(1024, positions)]")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="windows in a forward pass")] = 4,
    device: Device = "auto",
    runtime: RuntimeFlag = "auto",
    as_json: Json = False,
    progress: Progress = "auto",
) -> None:
    """One page of HTML on a compressed model: sizes, errors by layer, its recipe; with --against and --text what is
    lost, token by token. It opens from the disk and needs no network."""
    if text is not None and against is None:
        raise UserError("--text compares with the dense model. Give --against MODEL, too")
    if text is None and (text_field is not None or length is not None):
        raise UserError("--text-field and --length are of --text, which is not given")
    if markdown and output is not None:
        raise UserError("--markdown prints, and writes no page. Leave --output out")
    stages, chosen = _talk(progress, loads_models=text is not None), _runtime(runtime)
    from cospadi.commands.report import check_place, gather, report_json, report_lines, write
    from cospadi.report.page import markdown as summary

    place = None if markdown else check_place(folder, output)
    with stages.shown():
        content = gather(folder, against, text, length, batch_size, device, stages, chosen, text_field)
    if place is None:
        _show(report_json(content, None), as_json, summary(content))
        return
    write(content, place)
    _show(report_json(content, place), as_json, *report_lines(content, place), done=f"The report is in {place}.")


@app.command()
def generate(
    model: AnyModel,
    prompt: Annotated[str, typer.Argument(help="text to continue")],
    chat: Annotated[
        bool, typer.Option("--chat", help="the prompt is a message, in the form of the model's chat template")
    ] = False,
    tokens: Annotated[int, typer.Option(min=1, help="new tokens at most")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time")] = 0.0,
    seed: Seed = 42,
    device: Device = "auto",
    runtime: RuntimeFlag = "auto",
) -> None:
    """Continue a prompt, or answer it. The text goes to stdout as it comes, how fast it came to stderr."""
    _talk("off")
    from cospadi.commands import generate as speech

    sampling = speech.Sampling(tokens, temperature)
    speaker = speech.load_speaker(model, sampling, seed, device, _runtime(runtime))

    def tell(pace: speech.Pace) -> None:
        typer.secho(f"{pace}; {speaker.weights()}.", dim=True, err=True)

    try:
        if chat:
            _, pace = speech.answer(speaker, [{"role": "user", "content": prompt}], sampling, _print_part)
        else:
            pace = speech.continue_text(speaker, prompt, sampling, _print_part)
    except speech.Stopped as stopped:
        tell(stopped.pace)
        raise
    _print("")
    tell(pace)


@app.command()
def chat(
    model: AnyModel,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="what the system says first")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="new tokens an answer, at most")] = 512,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 takes the likeliest token each time  [default: as the model says]")
    ] = None,
    seed: Seed = 42,
    device: Device = "auto",
    runtime: RuntimeFlag = "auto",
) -> None:
    """Talk with a model: a line is a message. Ctrl-C stops an answer, Ctrl-D ends the conversation."""
    _talk("off")
    from cospadi.commands import generate as speech

    sampling = speech.Sampling(tokens, temperature)
    speaker = speech.load_speaker(model, sampling, seed, device, _runtime(runtime))
    speech.check_template(speaker)
    typer.secho(f"{model}: {speaker.weights()}. Ctrl-C stops an answer, Ctrl-D ends.", dim=True, err=True)

    def tell(pace: speech.Pace) -> None:
        typer.secho(f"{pace}.", dim=True, err=True)

    speech.chat(speaker, _lines(), sampling, _print_part, tell, system)


def _lines() -> Iterator[str]:
    """What is typed, or comes through a pipe."""
    asks = sys.stdin is not None and sys.stdin.isatty()
    if asks:
        with suppress(ImportError):
            importlib.import_module("readline")  # lines can be edited, and called up again
    while True:
        try:
            yield input("> " if asks else "")
        except (EOFError, RuntimeError):  # the second where stdin is closed
            return


def _print_part(text: str) -> None:
    _print(text, end="")


@app.command()
def demo(
    ratio: Annotated[float, typer.Option(help="fraction of the projections' bytes to remove")] = 0.3,
    iterations: Annotated[int | None, typer.Option(min=1, help="alternations T of K-SVD")] = None,
    as_json: Json = False,
    progress: Progress = "auto",
) -> None:
    """The whole job with no network: the built-in model, dense vs SVD-LLM vs the paper's K-SVD vs CoSpaDi."""
    stages = _talk(progress)
    from cospadi.commands.demo import ITERATIONS, demo_table, run_demo

    Recipe.build(ratio=ratio)  # refuses one that is out of range before the first model is measured
    with stages.shown():
        rows = run_demo(ratio, iterations or ITERATIONS, stages)
    _show({"rows": [asdict(row) for row in rows]}, as_json, demo_table(rows))


@app.command()
def bench(
    model: AnyModel,
    against: Annotated[str | None, typer.Option(metavar="MODEL", help="the dense model it was made of")] = None,
    low_rank: Annotated[str | None, typer.Option(metavar="DIR", help="a low-rank model of equal bytes")] = None,
    prefill: Annotated[list[int] | None, typer.Option(help="prompt lengths, repeatable  [default: 128, 512]")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="sequences decoded, repeatable  [default: 1, 4, 16]")] = None,
    tokens: Annotated[int, typer.Option(help="decoding steps timed together")] = 16,
    repeats: Annotated[int, typer.Option(help="timed runs of each")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads  [default: torch's choice]")] = None,
    card: Annotated[
        bool, typer.Option("--card", help="write the figures into the model's card, DIR/README.md")
    ] = False,
    device: Device = "auto",
    runtime: RuntimeFlag = "auto",
    as_json: Json = False,
    progress: Progress = "auto",
) -> None:
    """Tokens per second and memory, side by side with the dense model; the models take turns."""
    stages = _talk(progress)
    import torch

    from cospadi.commands.bench import DECODE_BATCHES, PREFILL_TOKENS, bench_json, bench_table
    from cospadi.commands.bench import bench as measure

    if threads is not None:
        torch.set_num_threads(threads)
    if card:
        from cospadi.commands.card import check_card, speed_rows, write_measured
        from cospadi.jobs.pool import device_model
        from cospadi.model.load import pick_device

        path = check_card(model)
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
    data = bench_json(results)
    parts: list[object] = [bench_table(results)]
    if card:
        asked = {"against": against, "low-rank": low_rank, "prefill": prefill, "batch": batch, "threads": threads}
        asked |= {"repeats": repeats, "tokens": tokens, "runtime": runtime}
        where = f"{device_model(pick_device(device))}, threads: {torch.get_num_threads()}"
        write_measured(path, "bench", asked, [against, low_rank], speed_rows(data, where))
        parts.append(f"Written to {path}.")
    _show(data, as_json, *parts)


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="dense or compressed model: folder, hub name, or 'demo'")
    ] = None,
    bits: Annotated[float | None, typer.Option(help="size of the job that a dense MODEL is looked at for")] = None,
    device: Device = "auto",
    timing: Annotated[
        bool, typer.Option("--timing/--no-timing", help="run pieces of that job for some seconds to tell its time")
    ] = True,
    as_json: Json = False,
) -> None:
    """What this machine has: versions, kernels, whether they compute rightly; and what it can do with a model."""
    if bits is not None and model is None:
        raise UserError("--bits is of a job that compresses MODEL, which is not given")
    _talk("off", loads_models=model is not None)
    from cospadi.model.load import pick_device

    pick_device(device)
    from cospadi.commands.doctor import doctor_table, examine

    looked, parts, data = None, [], {}
    if model is not None:
        from cospadi.commands.prospects import BITS, prospects, prospects_table

        looked = prospects(model, BITS if bits is None else bits, device, timing)
        parts, data = ["", prospects_table(looked), *looked.notes, *looked.problems], {"model": looked.as_json()}
    found = examine()
    _show(found.as_json() | data, as_json, doctor_table(found), *found.advice, *parts)
    if not found.right:
        raise typer.Exit(1)
    if looked is not None and looked.problems:
        raise typer.Exit(2)


def main() -> None:
    """Entry point: exit code 0, 2 for the user's mistake, 1 for ours, 130 after Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):  # a shell has it ignored of what it runs behind it
        signal.signal(signal.SIGINT, _interrupt)
    _fill_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold bytes that are no characters
    if sys.argv[1:2] in (["compress"], ["compare"], ["plan"], ["demo"]):
        # OpenMP's threads then sleep while they wait. Spinning, they slow the many small products of sparse coding
        # several times as soon as anything else wants a core. Read when torch is loaded, which has not happened yet.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "show"):  # click's usage errors
            error.show()
            sys.exit(error.exit_code)
        if isinstance(error, UserError):
            _fail(_one_line(str(error)), 2)
        if isinstance(error, OSError) and _is_of_printing(error):
            _leave_output(error, None)
        if os.environ.get("COSPADI_TRACEBACK") == "1":
            raise
        if getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error):
            _fail(
                "the disk is full. Free some space and run the same command again; what a job has finished is kept", 1
            )
        if isinstance(error, MemoryError) or "not enough memory" in str(error) or "out of memory" in str(error):
            _fail("out of memory. Use a smaller --batch-size, or a machine with more memory", 1)
        if isinstance(error, OSError) and error.filename is not None and error.errno in NOT_OURS:
            _fail(_one_line(f"{error.filename}: {error.strerror}"), 2)
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        _fail(f"{type(error).__name__}: {first}\nThis is a fault of cospadi. COSPADI_TRACEBACK=1 shows where", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _interrupt(_number: int, frame: FrameType | None) -> None:
    """Ctrl-C. While torch is imported, or a part of it, an exception would leave half of it to what runs after: the
    process ends at once. What is finished of a job lies in its directory."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and str(frame.f_globals.get("__name__")).partition(".")[0] == "torch":
            os.write(2, b"Stopped.\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> NoReturn:
    with suppress(OSError):
        typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
        typer.echo(message, err=True)
    sys.exit(code)


def _one_line(message: str) -> str:
    """A message of bounded length that a terminal shows as it is, whatever the names in it, which a file may hold."""
    text = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in message)
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]} ..."


def _recipe(flags: dict[str, Any], plan: Path | None = None) -> Recipe:
    """A recipe of the flags that were given, over the recipe file or the saved plan."""
    given = _given(flags, Recipe.model_fields)
    if plan is None:
        return Recipe.build(flags["recipe"], **given)
    if flags["recipe"] is not None:
        raise UserError(f"--recipe would change the plan that {plan} holds, which has its recipe. Leave it out")
    from cospadi.budget.plan import read_plan_recipe

    return read_plan_recipe(plan, **given)


def _given(flags: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name, value in _part(flags, names).items() if value is not None}


def _part(flags: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: flags[name] for name in names}


def _runtime(name: str) -> Runtime:
    """A --runtime that is known."""
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
    from cospadi.stages.open import job_directory

    if not job_directory(output).exists():
        return f"Nothing was written to {output}. The same command starts over."
    return f"What is finished is kept in {job_directory(output)}: the same command resumes from there."


def _talk(progress: str, loads_models: bool = True) -> Stages:
    """Progress and log on stderr; for a command that loads models, transformers knows the format and keeps quiet."""
    if progress not in ("auto", "on", "off", "json"):
        raise typer.BadParameter(_one_line(f"--progress {progress} is not known. Use auto, on, off or json"))
    from rich.console import Console

    from cospadi.jobs.progress import Stages, emit_lines, log_to

    console = Console(stderr=True)
    bars = progress == "on" or (progress == "auto" and console.is_terminal)
    log_to(console, bars, events=progress == "json")
    if loads_models:
        _silence_libraries()
        importlib.import_module("cospadi.integrations.transformers")
    return Stages(console if bars else None, emit_lines if progress == "json" else None)


def _silence_libraries() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # before it is imported: bars that have no other switch
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # for when it is imported later
    logging.getLogger("datasets").setLevel(logging.CRITICAL)


def _show(data: dict[str, Any], as_json: bool, *parts: object, done: str | None = None) -> None:
    """JSON, or tables and lines, on stdout.

    Args:
        done: what is done whether it can be told or not, in a sentence; None for a command whose result is what it
            tells.
    """
    if as_json:
        _print(json.dumps(data, indent=2), done)
        return
    from rich.console import Console
    from rich.table import Table

    from cospadi.commands.tables import fitted

    text = io.StringIO()
    if sys.stdout is not None and sys.stdout.isatty():
        console = Console(file=text, width=Console().width, force_terminal=True)
    else:
        console = Console(file=text, width=160, force_terminal=False)
    for part in parts:
        for shown in fitted(part, console) if isinstance(part, Table) else [part]:
            console.print(shown, highlight=False, markup=False)
    _print(text.getvalue().removesuffix("\n"), done)


def _print(text: str, done: str | None = None, end: str = "\n") -> None:
    """A text on stdout; where that cannot be, a sentence on stderr, and exit code 1 unless something is done anyway."""
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, "it is closed")
        sys.stdout.write(f"{text}{end}")
        sys.stdout.flush()
    except OSError as error:
        _leave_output(error, done)


def _is_of_printing(error: OSError) -> bool:
    """Whether an error comes from the library of the command line, which prints help and nothing else."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).partition(".")[0] in ("click", "typer")


def _leave_output(error: OSError, done: str | None) -> NoReturn:
    """End where stdout takes nothing any more; without a word where whoever reads it has seen enough."""
    with suppress(OSError, AttributeError):  # what it still holds goes nowhere, instead of failing again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not isinstance(error, BrokenPipeError):
        told = f"standard output cannot be written: {error.strerror}"
        if done is None:
            _fail(f"{told}. The result is lost: send it somewhere else", 1)
        with suppress(OSError):
            typer.echo(f"{told}, so the report is lost. {done}", err=True)
    sys.exit(1 if done is None else 0)


def _fill_closed_streams() -> None:
    """Put the null device where the standard streams are closed, so that no file that is opened gets their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            handle = os.open(os.devnull, os.O_RDWR)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
