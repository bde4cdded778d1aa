"""What a model is worth on tasks: accuracy, document by document, as lm-evaluation-harness measures it.

Nobody but `cospadi eval --tasks` imports this, since lm-eval is an extra.
"""

from __future__ import annotations

import difflib
import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor, nn

from cospadi.calibration.text import check_token
from cospadi.commands import tables
from cospadi.commands.evaluate import open_model
from cospadi.errors import UserError, first_line
from cospadi.jobs.progress import Stages
from cospadi.model import load
from cospadi.runtime.layer import Runtime

try:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError:
    raise UserError("--tasks needs lm-eval, which is not installed: pip install 'cospadi[eval]'") from None

log = logging.getLogger("cospadi")
logging.getLogger("lm_eval").setLevel(logging.ERROR)

PAPER = ("piqa", "hellaswag", "lambada_openai", "arc_easy", "arc_challenge", "sciq", "race", "mmlu")
"""What `paper` stands for: the tasks of the paper's tables, by lm-eval's names."""

METRICS = ("acc", "acc_norm")
"""Right answers; and, beside them where a task has it, those by log-likelihood a byte."""

HOW_TO_READ = """\
Per cent ± standard error over documents, in a difference the paired one. The average is of acc, each task counting
once. acc_norm chooses answers by log-likelihood a byte."""

FEWSHOT_SEED = 1234
"""lm-eval's own, for tasks that show examples first."""

Suite = dict[str, list[Any]]
"""Name as it was asked for -> lm-eval's tasks: one, or all of a group's or a tag's."""

Accuracies = dict[str, dict[str, list[float]]]
"""Of one model: name as it was asked for -> metric -> 1 or 0 a document; a group's tasks one after another."""


def open_suite(names: Sequence[str], include_path: Path | None = None) -> Suite:
    """Tasks with their documents, from the hub or from where a task's file says.

    Args:
        names: tasks, groups and tags of lm-eval, or `paper`.
        include_path: a folder with more task files (YAML), which may hold Python that runs.

    Raises:
        UserError: an unknown name, no such folder, documents that cannot be had, a task that has no accuracy.
    """
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path {include_path} is not a folder. Give the one with the tasks' YAML files")
    manager = TaskManager(include_path=include_path and str(include_path))
    asked = dict.fromkeys(task for name in names for task in (PAPER if name == "paper" else (name,)))
    for name in asked:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            meant = f"Did you mean {' or '.join(near)}?" if near else "lm-eval's `lm-eval ls tasks` lists them"
            raise UserError(f"task {name} is not known to lm-eval {lm_eval.__version__}. {meant}")
    return {name: _open_task(manager, name) for name in asked}


def _open_task(manager: Any, name: str) -> list[Any]:
    try:
        tasks = list(manager.load([name])["tasks"].values())
    except Exception as error:  # many kinds: no network, no such data set, a file that is no task's
        raise UserError(
            f"task {name} cannot be opened: {first_line(error)}. Its documents come from the hub unless its file "
            "says otherwise: without a network give local tasks by --include-path"
        ) from None
    for task in tasks:
        if "acc" not in task.aggregation():
            measured = ", ".join(task.aggregation())
            raise UserError(f"task {task.task_name} has no accuracy (acc), only {measured}. Leave it out")
        task.set_fewshot_seed(FEWSHOT_SEED)
    return tasks


def measure_accuracies(
    models: Sequence[str | Path],
    suite: Suite,
    limit: int | None = None,
    batch_size: int = 4,
    device: str = "auto",
    stages: Stages | None = None,
    runtime: Runtime = "auto",
) -> list[tuple[str, Accuracies]]:
    """Name and accuracies of each model on the same documents, each with its own tokenizer.

    Log-likelihoods are summed from a log-softmax in float32, so that choices of a bf16 model do not come out equal.

    Args:
        limit: the first so many documents of each task (of each of a group's); None is all.
        batch_size: requests in a forward pass.

    Raises:
        UserError: a model that cannot be read, or whose tokenizer has tokens that it has not.
    """
    where, stages = load.pick_device(device), stages or Stages()
    leaves = {task.task_name: task for tasks in suite.values() for task in tasks}
    results: list[tuple[str, Accuracies]] = []
    for name in models:
        harness = _Harness(*open_model(name, where, runtime, stages), batch_size, stages)
        samples = lm_eval.evaluate(harness, {"tasks": leaves}, limit=limit, bootstrap_iters=0)["samples"]
        results.append((str(name), {asked: _pooled(tasks, samples) for asked, tasks in suite.items()}))
        del harness  # and its model, before the next one is loaded
    return results


def _pooled(tasks: Sequence[Any], samples: dict[str, list[dict[str, Any]]]) -> dict[str, list[float]]:
    """Metric -> documents of all tasks, by the first of each task's ways of reading an answer."""
    documents = [
        document
        for task in tasks
        for document in samples[task.task_name]
        if document["filter"] == samples[task.task_name][0]["filter"]
    ]
    return {
        metric: [float(document[metric]) for document in documents]
        for metric in METRICS
        if all(metric in document for document in documents)
    }


class _Harness(HFLM):
    """lm-eval's view of a loaded model, whose progress goes where ours goes."""

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int, stages: Stages) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
        self._stages = stages

    def loglikelihood(self, requests: Any, **_: Any) -> Any:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, **options: Any) -> Any:
        check_token(max(max(context + answer) for _, context, answer in requests), load.vocabulary(self.model))
        longer = sum(len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests)
        if longer:
            told = "%d of %d requests are longer than the model's %d positions: their beginnings are cut off"
            log.warning(told, longer, len(requests), self.max_length)
        with self._stages.stage("tasks", len(requests)) as self._progress:
            return super()._loglikelihood_tokens(requests, **options)

    def _model_call(self, inps: Tensor, **options: Any) -> Any:
        self._progress.advance(len(inps))
        return super()._model_call(inps, **options)


@dataclass(frozen=True)
class Mean:
    """A mean over documents, or over the means of tasks, and its standard error (NaN for less than two documents)."""

    value: float
    error: float


def mean(documents: Sequence[float]) -> Mean:
    """Of one task's documents."""
    error = statistics.stdev(documents) / math.sqrt(len(documents)) if len(documents) > 1 else math.nan
    return Mean(statistics.fmean(documents), error)


def average(accuracies: Accuracies) -> Mean:
    """Of the tasks' accuracies (acc), each counting the same."""
    means = [mean(metrics["acc"]) for metrics in accuracies.values()]
    error = math.sqrt(sum(one.error**2 for one in means)) / len(means)
    return Mean(statistics.fmean(one.value for one in means), error)


def difference(first: Accuracies, second: Accuracies) -> Accuracies:
    """First less second, document by document: a mean of it has the paired standard error."""
    return {
        task: {
            metric: [one - other for one, other in zip(documents, second[task][metric], strict=True)]
            for metric, documents in metrics.items()
        }
        for task, metrics in first.items()
    }


def accuracy_json(results: Sequence[tuple[str, Accuracies]]) -> dict[str, Any]:
    """Average and accuracies of each model, as fractions; of two, also their difference, first less second."""
    data: dict[str, Any] = {"lm_eval": lm_eval.__version__}
    data["models"] = [{"model": name, **_figures(accuracies)} for name, accuracies in results]
    if len(results) == 2:
        data["difference"] = _figures(difference(results[0][1], results[1][1]))
    return data


def _figures(accuracies: Accuracies) -> dict[str, Any]:
    def figure(found: Mean) -> dict[str, float | None]:
        return {"value": found.value, "stderr": found.error if math.isfinite(found.error) else None}

    tasks = {
        task: {"documents": len(metrics["acc"]), **{metric: figure(mean(each)) for metric, each in metrics.items()}}
        for task, metrics in accuracies.items()
    }
    return {"average": figure(average(accuracies)), "tasks": tasks}


def accuracy_table(results: Sequence[tuple[str, Accuracies]]) -> Table:
    """A line a task and metric, in per cent; a column a model, of two also their difference."""
    columns = [(name, accuracies, "{:.2f} ± {:.2f}") for name, accuracies in results]
    if len(results) == 2:
        columns.append(("difference", difference(results[0][1], results[1][1]), "{:+.2f} ± {:.2f}"))
    table = tables.new_table("task", "metric", "documents", *(name for name, _, _ in columns))

    def shown(form: str, found: Mean) -> str:
        return form.format(100 * found.value, 100 * found.error)

    for task, metrics in results[0][1].items():
        for metric, documents in metrics.items():
            cells = [shown(form, mean(accuracies[task][metric])) for _, accuracies, form in columns]
            table.add_row(task, metric, f"{len(documents):,}", *cells)
    table.add_section()
    table.add_row("average", "acc", "", *(shown(form, average(accuracies)) for _, accuracies, form in columns))
    return table
