"""Every method at equal bytes: a row a (method, size), a file a row, one table and one figure of all.

What follows from the dense model and the text alone is calibrated once, for all rows. A row that has its file is never
computed again, one under way resumes where it was stopped. All lies in one folder:

    rows/      a JSON file a finished row
    work/      rows under way, and what they share; gone at the end
    models/    the compressed models, if they are to be kept
    compare.*  the rows as a table (md, csv), for machines (json), as a figure (svg, png)
"""

from __future__ import annotations

import logging
import platform
import shutil
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
import transformers
import yaml

from cospadi import __about__, files
from cospadi.calibration.documents import file_documents
from cospadi.commands import evaluate, tables
from cospadi.commands.comparison import DENSE, json_text, size_asked, sorted_rows, write_reports
from cospadi.compress import compress
from cospadi.errors import SizeError, UserError
from cospadi.format.manifest import weights_digest
from cospadi.jobs.ledger import JobDirectory, difference
from cospadi.jobs.pool import Engine, device_model
from cospadi.jobs.progress import Stages
from cospadi.model import hub, load
from cospadi.recipe import CACHE_BYTES, CALIBRATED, METHODS, Recipe
from cospadi.runtime.layer import Runtime
from cospadi.solvers import find_solver
from cospadi.stages.open import check_place, inputs_of

log = logging.getLogger("cospadi")

ROWS, WORK, MODELS, SHARED = "rows", "work", "models", "calibration"
"""Folders in that of a comparison; SHARED lies in WORK."""

MARK = "comparison"
"""A file in WORK which says that this command made that folder, and may delete it."""

FIGURES = {"bytes", "perplexity", "why_not"}
"""Of which a row has one as soon as something is known."""

NEEDED = {"of", "method", "ratio_asked", "bits_asked", "seconds"}
"""What every row has from its beginning."""


@dataclass(frozen=True)
class Case:
    """What a row is of: a method as it was asked for, and the recipe that this is at a size."""

    method: str
    recipe: Recipe

    @property
    def file(self) -> str:
        """A name of a file."""
        if self.method == DENSE:
            return DENSE
        return quote(f"{self.method}-{self.size.removeprefix('ratio ')}".replace(" ", "-"), safe="+=")

    def __str__(self) -> str:
        return self.method if self.method == DENSE else f"{self.method} at {self.size}"

    @property
    def size(self) -> str:
        """The size that was asked."""
        return size_asked(self.recipe.ratio, self.recipe.bits)


@dataclass(frozen=True)
class Comparison:
    """What all rows have in common.

    Attributes:
        model: as it was named. folder: where that is.
        common: the recipe of no method.
        suite: lm-eval's tasks, or None; limit: documents of each.
        keep: whether compressed models stay.
        of: what a row belongs to beside its recipe, as JSON has it.
        job: engine, cache_bytes and resume of `compress`.
    """

    model: str | Path
    folder: Path
    text: Path
    text_field: str | None
    common: Recipe
    suite: Any
    limit: int | None
    output: Path
    keep: bool
    runtime: Runtime
    of: Mapping[str, Any]
    job: Mapping[str, Any]
    stages: Stages


def compare(
    model: str | Path,
    text: str | Path,
    output: str | Path,
    *,
    ratios: Sequence[float] = (),
    bits: Sequence[float] = (),
    methods: Sequence[str] | None = None,
    recipe: Mapping[str, Any] | None = None,
    text_field: str | None = None,
    tasks: Sequence[str] | None = None,
    include_path: Path | None = None,
    limit: int | None = None,
    keep_models: bool = False,
    runtime: Runtime = "auto",
    resume: bool | None = None,
    engine: Engine | None = None,
    cache_bytes: int = CACHE_BYTES,
    stages: Stages | None = None,
) -> list[dict[str, Any]]:
    """Compress a model by every method at every size, and measure each result beside the dense model.

    Args:
        text: file that perplexity and divergence are measured on.
        output: folder; the same call resumes in it what was stopped, and another one adds its rows.
        ratios: sizes of methods that leave weights out, or are of low rank. bits: of those that store levels.
        methods: names of `cospadi methods`, `METHOD+FIELD=VALUE` with fields changed; None is all that have a size.
        recipe: fields of `recipe.CALIBRATED`, for all rows.
        text_field: of a text of rows.
        tasks, include_path, limit: of lm-eval, as for `accuracy.open_suite` and `measure_accuracies`.
        keep_models: leave the compressed models in the folder.
        runtime: of the compressed models, when they are measured.
        resume, engine, cache_bytes, stages: as of `compress`; rows that are finished stay whatever `resume` is.

    Returns:
        The rows of the folder as their files have them, dense first.

    Raises:
        UserError: a request that cannot be met, or a folder with rows of another model, text or recipe.
    """
    stages, output = stages or Stages(), Path(output)
    common = _common(recipe or {})
    cases = [Case(DENSE, common), *cases_of(methods, ratios, bits, common)]
    text = files.local_path(text, "text file")
    file_documents(text, text_field)
    if common.calibration and (Path(common.calibration).exists() or hub.is_path(common.calibration)):
        file_documents(files.local_path(common.calibration, "calibration file"), common.calibration_field)
    suite = None
    if tasks:
        from cospadi.commands import accuracy  # needs lm-eval

        suite = accuracy.open_suite(tasks, include_path)
    check_place(output, inputs_of(model, calibration=common.calibration, text=text))
    _check_folder(output)
    with stages.stage("load", 1):
        folder = load.resolve(model, common.revision)
        load.load_config(folder)
        of = _belongs_to(folder, text, text_field, common, tasks, limit)
    job = {"resume": resume, "engine": engine, "cache_bytes": cache_bytes}
    comparison = Comparison(
        model, folder, text, text_field, common, suite, limit, output, keep_models, runtime, of, job, stages
    )
    with closing(JobDirectory(output / WORK / SHARED, resume)) as shared:
        if resume is False:
            _clear(output / WORK, but=(SHARED, MARK))
        _compute(comparison, cases, shared)
        shared.remove()
    shutil.rmtree(output / WORK, ignore_errors=True)
    rows = read_rows(comparison, ROWS)
    write_reports(rows, output)
    return rows


# What is asked for.


def method_fields(name: str) -> dict[str, Any]:
    """The recipe fields that a method's name stands for: those of `sparse+refine=0` are method and refine.

    Raises:
        UserError: no such form.
    """
    method, *changes = name.split("+")
    fields: dict[str, Any] = {"method": method}
    for change in changes:
        field, equals, value = change.partition("=")
        if not equals or field in ("method", "ratio", "bits"):
            raise UserError(f"method {name}: {change} changes no field. Write METHOD+FIELD=VALUE, as sparse+refine=0")
        if field in CALIBRATED:
            raise UserError(
                f"method {name}: {field} is of all rows, which share what they calibrate. "
                f"Give --{field.replace('_', '-')}"
            )
        try:
            fields[field] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"method {name}: {value} is no value of a field") from None
    return fields


def cases_of(
    methods: Sequence[str] | None, ratios: Sequence[float], bits: Sequence[float], common: Recipe
) -> list[Case]:
    """Every method at every size of its kind: levels take bits, all else takes ratios.

    Raises:
        UserError: no size, no such method, or one without a size of its kind.
    """
    if not ratios and not bits:
        raise UserError("there is no size to compare at. Give --ratios R,R, --bits B,B or both")
    if methods is not None and not methods:
        raise UserError("there is no method to compare. Name some, or leave methods out")
    if methods is not None and "" in methods:
        raise UserError("the name of a method is empty. Write names with commas between: sparse,wanda")
    cases: dict[str, Case] = {}
    of_bits = {name: _has_levels(name, common) for name in dict.fromkeys(METHODS if methods is None else methods)}
    for name, has_levels in of_bits.items():
        if methods is not None and not (bits if has_levels else ratios):
            kind, other = ("--bits", "--ratios") if has_levels else ("--ratios", "--bits")
            raise UserError(
                f"method {name} has no size: it is told {kind[2:]}, and only {other} is given. Give {kind}, too, or "
                "leave it out"
            )
    for size in [*({"ratio": ratio} for ratio in ratios), *({"bits": bit} for bit in bits)]:
        for name, has_levels in of_bits.items():
            if has_levels == ("bits" in size):
                case = _case(name, size, common)
                cases.setdefault(case.file, case)
    return list(cases.values())


def _has_levels(name: str, common: Recipe) -> bool:
    return find_solver(_case(name, {}, common).recipe.solver).levels


def _case(name: str, size: Mapping[str, float], common: Recipe) -> Case:
    """A method at a size, whose recipe can be settled."""
    fields = method_fields(name)
    try:
        recipe = Recipe.build({**common.model_dump(exclude_unset=True), **fields, **size})
        recipe.settled()
    except UserError as error:
        raise UserError(f"method {name}: {error}" if len(fields) > 1 else str(error)) from None
    return Case(name, recipe)


def parse_sizes(listed: str | None, flag: str) -> list[float]:
    """Numbers with commas between.

    Raises:
        UserError: something else.
    """
    try:
        sizes = [float(word) for word in listed.split(",")] if listed is not None else []
    except ValueError:
        raise UserError(f"{flag} {listed} is no list of numbers. Write them with commas between: 0.2,0.3") from None
    if not all(size > 0 for size in sizes):
        raise UserError(f"{flag} {listed} has a size of nothing. Write numbers with a point, commas between: 0.2,0.3")
    return sizes


def _common(fields: Mapping[str, Any]) -> Recipe:
    """The recipe of no method."""
    if strange := sorted(set(fields) - set(CALIBRATED)):
        raise UserError(f"field {strange[0]} is of a method. Change it there, as METHOD+{strange[0]}=VALUE")
    return Recipe.build(dict(fields))


def _check_folder(output: Path) -> None:
    """Refuse a folder of somebody's own."""
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file. Name a folder")
    held = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    strange = [name for name in held if name not in (ROWS, WORK, MODELS) and not name.startswith("compare.")]
    if strange or (held and not {ROWS, WORK} & set(held)):
        name = (strange or held)[0]
        raise UserError(f"output folder {output} holds {name}, which is no part of a comparison. Name another")
    for folder, mine in ((ROWS, lambda path: path.suffix == ".json"), (MODELS, Path.is_dir)):
        for path in sorted((output / folder).iterdir()) if (output / folder).exists() else ():
            if not mine(path):
                raise UserError(f"output folder {output} holds {path}, which is no part of a comparison. Name another")
    if (output / WORK).exists() and not (output / WORK / MARK).is_file():
        raise UserError(f"{output / WORK} was not made by a comparison. Name another output folder")


def _belongs_to(
    folder: Path, text: Path, text_field: str | None, common: Recipe, tasks: Sequence[str] | None, limit: int | None
) -> dict[str, Any]:
    """What a row is of, beside its recipe, which says the rest."""
    calibration = files.local_path(common.calibration, "calibration file") if common.calibration else None
    return {
        "model": weights_digest(folder),
        "text": files.file_digest(text),
        "text_field": text_field,
        "calibration": files.file_digest(calibration) if calibration and calibration.is_file() else None,  # or by name
        "tasks": None if tasks is None else list(tasks),
        "limit": limit,
    }


def _clear(folder: Path, but: Collection[str]) -> None:
    for path in folder.iterdir():
        if path.name not in but:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


# Rows.


def read_rows(comparison: Comparison, place: str) -> list[dict[str, Any]]:
    """The rows in a folder of a comparison, finished or under way: dense first, then by size, the best first. One that
    another comparison has begun and got no figure for is removed.

    Raises:
        UserError: one of them is of another model, text or recipe.
    """
    rows = []
    for path in sorted((comparison.output / place).glob("*.json")):
        row = files.read_json(path)
        if not row.keys() >= NEEDED or not isinstance(row["of"], dict):
            raise UserError(f"{path} is no row of a comparison. Name another --output, or take that file away")
        for name, here in _of(comparison, _case_of(row, comparison.common)).items():
            if (there := row["of"].get(name)) != here and place == WORK and not FIGURES & row.keys():
                path.unlink()  # of another comparison, which has come to nothing
                break
            if there != here:
                raise UserError(
                    f"{path} is a row of another comparison, with {difference(name, there, here)}. Name another "
                    "--output, or take that file away"
                )
        else:
            rows.append(row)
    return sorted_rows(rows)


def _case_of(row: Mapping[str, Any], common: Recipe) -> Case:
    """What a row says that it is of."""
    if row["method"] == DENSE:
        return Case(DENSE, common)
    size = {"ratio": row["ratio_asked"]} if row["bits_asked"] is None else {"bits": row["bits_asked"]}
    return _case(row["method"], size, common)


def _of(comparison: Comparison, case: Case) -> dict[str, Any]:
    """What a row belongs to: all that its figures follow from but versions and the machine."""
    elsewhere = {"device", "batch_size"} | ({"calibration"} if comparison.of["calibration"] else set())
    return {**comparison.of, "recipe": case.recipe.model_dump(mode="json", exclude=elsewhere)}


def _compute(comparison: Comparison, cases: Sequence[Case], shared: JobDirectory) -> None:
    """Compute the rows that are missing."""
    stages, folder = comparison.stages, comparison.output / ROWS
    folder.mkdir(exist_ok=True)
    done = read_rows(comparison, ROWS)
    read_rows(comparison, WORK)
    (comparison.output / WORK / MARK).touch()
    there = [case for case in cases if (folder / f"{case.file}.json").exists()]
    if there:
        log.info("%d of %d rows are there already", len(there), len(cases))
    with stages.stage("rows", len(cases)) as progress:
        for number, case in enumerate(cases):
            if case in there:
                continue
            left = seconds_left(done, [case, *(later for later in cases[number + 1 :] if later not in there)])
            note = f"row {number + 1} of {len(cases)}: {case}"
            log.info("%s%s", note, f", {tables.duration(left)} left" if left else "")
            progress.reach(number, note, left)
            done.append(_row(comparison, case, shared))
    if all("why_not" in row for row in done if row["method"] != DENSE):
        raise UserError(next(str(row["why_not"]) for row in done if "why_not" in row))


def seconds_left(done: Sequence[Mapping[str, Any]], missing: Sequence[Case]) -> float | None:
    """For each missing row the mean time of its method's rows, or of all rows of methods; None as long as there is
    none."""
    took: dict[str, list[float]] = {}
    for row in done:
        if "perplexity" in row and row["method"] != DENSE:
            took.setdefault(row["method"], []).append(row["seconds"])
    every = [seconds for some in took.values() for seconds in some]
    if not every:
        return None
    return sum(statistics.fmean(took.get(case.method, every)) for case in missing if case.method != DENSE)


def _row(comparison: Comparison, case: Case, shared: JobDirectory) -> dict[str, Any]:
    """Compute a row, keeping each step of it, and put it among the finished ones."""
    part = comparison.output / WORK / f"{case.file}.json"
    where = comparison.output / (MODELS if comparison.keep else WORK) / case.file
    row: dict[str, Any] = files.read_json(part) | {"resumed": True} if part.exists() else _head(comparison, case)
    begun = time.perf_counter() - row["seconds"]

    def keep(found: Mapping[str, Any]) -> None:
        row.update(found, seconds=round(time.perf_counter() - begun, 3))
        files.write_whole(part, json_text(row))

    keep({})
    if case.method == DENSE:
        where = comparison.folder
    elif "why_not" not in row and not ("bytes" in row and where.exists()):
        try:
            keep(_compressed(comparison, case, where, shared))
        except SizeError as error:
            keep({"why_not": str(error)})
    if "why_not" not in row:
        how = (case.recipe.batch_size, case.recipe.device, comparison.stages, comparison.runtime)
        if "perplexity" not in row:
            keep(measured(where, comparison.folder, comparison.text, *how, comparison.text_field))
        if comparison.suite is not None and "accuracy" not in row:
            keep(_scored(where, comparison.suite, comparison.limit, *how))
    files.write_whole(comparison.output / ROWS / part.name, json_text(row))
    part.unlink()
    if where.parent == part.parent:
        shutil.rmtree(where, ignore_errors=True)
    return row


def _head(comparison: Comparison, case: Case) -> dict[str, Any]:
    """What is known of a row before anything is computed."""
    dense = case.method == DENSE
    return {
        "model": _shown_name(comparison.model),
        "text": comparison.text.name,
        "method": case.method,
        "ratio_asked": 0.0 if dense else case.recipe.ratio,
        "bits_asked": None if dense else case.recipe.bits,
        "of": _of(comparison, case),
        "seconds": 0.0,
    } | surroundings(case.recipe.device)


def surroundings(device: str) -> dict[str, Any]:
    """What a row says of where it was computed."""
    versions = {module.__name__: module.__version__ for module in (torch, transformers)}
    return {
        "device": device_model(load.pick_device(device)),
        "threads": torch.get_num_threads(),
        "versions": versions | {"cospadi": __about__.__version__, "python": platform.python_version()},
    }


def _shown_name(model: str | Path) -> str:
    """A model's name without a path of this machine."""
    return Path(model).resolve().name if Path(model).exists() else str(model)


def _compressed(comparison: Comparison, case: Case, where: Path, shared: JobDirectory) -> dict[str, Any]:
    """What a row says of compressing; seconds are those of this run."""
    before = dict(comparison.stages.seconds)
    result = compress(
        comparison.model, case.recipe, where, overwrite=True, shared=shared, stages=comparison.stages, **comparison.job
    )
    spent = {stage: seconds - before.get(stage, 0.0) for stage, seconds in result.seconds.items()}
    seconds = {stage: round(some, 1) for stage, some in spent.items() if some}
    return {
        "ratio_reached": result.plan.ratio,
        "bits": result.plan.bits,
        "bytes": result.plan.bytes,
        "dense_bytes": result.plan.dense_bytes,
        "checkpoint_bytes_before": result.bytes_before,
        "checkpoint_bytes": result.bytes_after,
        "mean_relative_error": statistics.fmean(result.errors.values()),
        "relative_errors": result.errors,
        "iterations": case.recipe.settled().iterations,
        "seconds_stages": seconds,
        "seconds_solve": seconds.get("solve", 0.0),
        "seconds_compress": round(sum(seconds.values()), 1),
        "pass_seconds": result.pass_seconds,
        "calibration": result.manifest["recipe"]["calibration"],
        "sequences": result.manifest.get("calibration", {}).get("sequences"),
    }


def measured(
    model: Path,
    dense: Path,
    text: Path,
    batch_size: int,
    device: str,
    stages: Stages,
    runtime: Runtime = "auto",
    text_field: str | None = None,
) -> dict[str, Any]:
    """What a row says of a text: perplexity, None where it is beyond a float, and of another model than the dense one
    the divergence from that."""
    how: Any = (text, None, batch_size, device, stages, runtime, text_field)
    if model == dense:
        told = evaluate.perplexity_json(evaluate.evaluate_models([dense], *how))
    else:
        both = evaluate.compare_models(model, dense, *how)
        told = evaluate.perplexity_json(both.results, both.divergence)
    figures = {name: told["models"][0][name] for name in ("perplexity", "windows", "length")}
    return figures if model == dense else figures | {"kl": told["kl_divergence"]}


def _scored(
    model: Path, suite: Any, limit: int | None, batch_size: int, device: str, stages: Stages, runtime: Runtime
) -> dict[str, Any]:
    """What a row says of tasks: which documents were right, a digit each, how many, and what part."""
    from cospadi.commands import accuracy

    ((_, found),) = accuracy.measure_accuracies([model], suite, limit, batch_size, device, stages, runtime)
    right = {task: metrics["acc"] for task, metrics in found.items()}
    return {
        "right": {task: "".join(f"{one:.0f}" for one in each) for task, each in right.items()},
        "accuracy": {task: statistics.fmean(each) for task, each in right.items()},
        "documents": {task: len(each) for task, each in right.items()},
    }
