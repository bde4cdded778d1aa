"""`cospadi eval --tasks`: lm-eval's harness on our models, on tasks that these tests write and on the shared ones."""

from __future__ import annotations

import importlib
import json
import math
import re
import signal
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHARED_MODELS, Answer
from questions import CHOOSE, QUESTIONS

import cospadi
from cospadi.commands import comparison
from cospadi.model import load

TASKS = SHARED_MODELS.parent / "tasks"


@pytest.fixture(scope="module")
def accuracy() -> Iterator[Any]:
    lm_eval = pytest.importorskip("lm_eval.tasks", reason="lm-eval is not installed (extra `eval`)")
    from cospadi.commands import accuracy as module

    # Without the thousands of files of its own tasks, which take seconds to read.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TaskManager", partial(lm_eval.TaskManager, include_defaults=False))
        yield module


@pytest.fixture(scope="module")
def tasks(accuracy: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of task files: `sums`, `halves` (longer than 64 tokens), a group of both; two that cannot be used."""
    folder = tmp_path_factory.mktemp("tasks")
    file = folder / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    (folder / "sums.yaml").write_text(CHOOSE.format(name="sums", file=file, before=""))
    (folder / "halves.yaml").write_text(CHOOSE.format(name="halves", file=file, before="7 halved is 3.5. " * 5))
    (folder / "group.yaml").write_text("group: both\ntask: [sums, halves]\n")
    (folder / "lost.yaml").write_text(CHOOSE.format(name="lost", file=folder / "nowhere.jsonl", before=""))
    rolling = CHOOSE.replace("multiple_choice", "loglikelihood_rolling").partition("metric_list")[0]
    rolling = rolling.replace("doc_to_target: gold", 'doc_to_target: "{{{{query}}}}"').replace(
        "doc_to_choice: choices\n", ""
    )
    rolling += "metric_list: [{{metric: word_perplexity}}]\n"
    (folder / "rolling.yaml").write_text(rolling.format(name="rolling", file=file, before=""))
    return folder


@pytest.fixture(scope="module")
def measured(accuracy: Any, tasks: Path, dense_folder: Path, compressed_folder: Path) -> list[tuple[str, Any]]:
    """The compressed and the dense model on `sums` and on the group of `sums` and `halves`."""
    suite = accuracy.open_suite(["sums", "both"], tasks)
    return accuracy.measure_accuracies([compressed_folder, dense_folder], suite, batch_size=2)


def log_likelihoods(folder: Path, query: str, choices: list[str]) -> list[float]:
    """Of each answer after the query, by plain forward passes."""
    model, tokenizer = load.load(folder, "cpu"), load.load_tokenizer(folder)
    context = tokenizer(query)["input_ids"]
    found = []
    for choice in choices:
        whole = tokenizer(f"{query} {choice}")["input_ids"]
        with torch.no_grad():
            scores = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
        found.append(sum(float(scores[place - 1, whole[place]]) for place in range(len(context), len(whole))))
    return found


def test_answers_are_those_of_plain_forward_passes(
    measured: list[tuple[str, Any]], dense_folder: Path, compressed_folder: Path
) -> None:
    for (name, found), folder in zip(measured, (compressed_folder, dense_folder), strict=True):
        assert name == str(folder)
        expected: dict[str, list[float]] = {"acc": [], "acc_norm": []}
        for document in QUESTIONS:
            scores = log_likelihoods(folder, document["query"], document["choices"])
            lengths = [len(choice) for choice in document["choices"]]
            expected["acc"].append(float(np.argmax(scores) == document["gold"]))
            expected["acc_norm"].append(float(np.argmax(np.divide(scores, lengths)) == document["gold"]))
        assert found["sums"] == expected


def test_a_group_is_the_documents_of_its_tasks(measured: list[tuple[str, Any]]) -> None:
    for _, found in measured:
        assert len(found["both"]["acc"]) == 2 * len(QUESTIONS)
        assert found["both"]["acc"][: len(QUESTIONS)] == found["sums"]["acc"]


def test_measured_again_it_is_the_same(accuracy: Any, tasks: Path, dense_folder: Path, measured: Any) -> None:
    suite = accuracy.open_suite(["both", "sums"], tasks)
    for _ in range(2):  # the second time with tasks that were used
        assert accuracy.measure_accuracies([dense_folder], suite, batch_size=5)[0][1] == measured[1][1]


def test_limit_takes_the_first_documents_of_each_task(
    accuracy: Any, tasks: Path, dense_folder: Path, measured: Any
) -> None:
    ((_, found),) = accuracy.measure_accuracies([dense_folder], accuracy.open_suite(["both"], tasks), limit=2)
    whole = measured[1][1]["both"]["acc"]
    assert found["both"]["acc"] == whole[:2] + whole[len(QUESTIONS) : len(QUESTIONS) + 2]


def test_standard_errors_are_paired(accuracy: Any) -> None:
    generator = np.random.default_rng(0)
    first, second = (
        {name: {"acc": list(generator.integers(0, 2, size).astype(float))} for name, size in (("a", 40), ("b", 25))}
        for _ in range(2)
    )
    told = accuracy.accuracy_json([("one", first), ("other", second)])
    deltas = {name: np.subtract(first[name]["acc"], second[name]["acc"]) for name in first}
    errors = {name: delta.std(ddof=1) / math.sqrt(len(delta)) for name, delta in deltas.items()}
    for name, delta in deltas.items():
        figures = told["difference"]["tasks"][name]["acc"]
        assert figures == pytest.approx({"value": delta.mean(), "stderr": errors[name]})
    assert told["difference"]["average"] == pytest.approx(
        {"value": np.mean([delta.mean() for delta in deltas.values()]), "stderr": math.hypot(*errors.values()) / 2}
    )
    assert told["models"][1]["average"]["value"] == pytest.approx(np.mean([np.mean(second[n]["acc"]) for n in second]))


def test_one_document_has_no_standard_error(accuracy: Any) -> None:
    told = accuracy.accuracy_json([("one", {"a": {"acc": [1.0]}})])
    assert told["models"][0]["average"] == {"value": 1.0, "stderr": None}


def test_the_command_compares_two_models(
    accuracy: Any,
    tasks: Path,
    dense_folder: Path,
    compressed_folder: Path,
    text_file: Path,
    measured: list[tuple[str, Any]],
    run: Callable[..., Answer],
) -> None:
    words = ["eval", compressed_folder, "--against", dense_folder, "--tasks", "sums,both", "--include-path", tasks]
    answer = run(*words)
    assert answer.code == 0, answer.err
    mine, dense = (np.mean(found["sums"]["acc"]) for _, found in measured)
    (line,) = [line for line in answer.out.splitlines() if re.match("sums +acc ", line)]
    shown = [float(figure) for figure in re.findall(r"([+-]?[\d.]+) ±", line)]
    assert shown == pytest.approx([100 * mine, 100 * dense, 100 * (mine - dense)], abs=0.005)
    assert "average" in answer.out
    assert answer.err.count("15 of 30 requests are longer than the model's 64 positions") == 2  # once a model

    told = json.loads(run(*words, "--text", text_file, "--length", "32", "--json").out)
    assert {"models", "log_ratio", "tasks"} <= told.keys()
    assert told["tasks"] == json.loads(json.dumps(accuracy.accuracy_json(measured)))


def test_shared_tasks_on_a_trained_model(accuracy: Any, shared_model: Callable[[str], Path]) -> None:
    folder = shared_model("stories260k")
    if not TASKS.is_dir():
        pytest.skip(f"the shared tasks are not on this machine ({TASKS})")
    suite = accuracy.open_suite(["local_copa", "local_winogrande", "local_lambada_openai"], TASKS)
    ((_, found),) = accuracy.measure_accuracies([folder], suite, limit=6)
    assert {name: set(metrics) for name, metrics in found.items()} == {
        "local_copa": {"acc", "acc_norm"},
        "local_winogrande": {"acc"},
        "local_lambada_openai": {"acc"},
    }
    documents = [json.loads(line) for line in (TASKS / "data" / "copa.jsonl").read_text().splitlines()[:6]]
    scores = [log_likelihoods(folder, document["query"], document["choices"]) for document in documents]
    right = [float(np.argmax(each) == document["gold"]) for each, document in zip(scores, documents, strict=True)]
    assert found["local_copa"]["acc"] == right


def results_of(folder: Path) -> dict[tuple[str, str], list[float]]:
    """Task and metric -> 1 or 0 a document, as lm-eval has logged them."""
    found: dict[tuple[str, str], list[float]] = {}
    for path in folder.rglob("samples_*.jsonl"):
        task = path.name.removeprefix("samples_").rpartition("_")[0]
        for document in sorted(map(json.loads, path.read_text().splitlines()), key=lambda line: int(line["doc_id"])):
            for metric in {"acc", "acc_norm"} & document.keys():
                found.setdefault((task, metric), []).append(document[metric])
    return found


@pytest.fixture
def lm_eval_alone(accuracy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own command without its own tasks."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", accuracy.TaskManager)


@pytest.mark.usefixtures("lm_eval_alone")
def test_lm_evals_own_command_gives_the_same_answers(
    tasks: Path, compressed_folder: Path, measured: list[tuple[str, Any]], run: Callable[..., Answer], tmp_path: Path
) -> None:
    words = ["--model_args", f"pretrained={compressed_folder}", "--tasks", "sums,halves", "--include_path", tasks]
    told = run("lm-eval", "--model", "cospadi", *words, "--batch_size", 4, "--output_path", tmp_path, "--log_samples")
    assert told.code == 0, told.err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # or processes of lm-eval's would not end
    found, (_, mine) = results_of(tmp_path), measured[0]
    for metric in ("acc", "acc_norm"):
        assert found["sums", metric] == mine["sums"][metric]
        assert found["sums", metric] + found["halves", metric] == mine["both"][metric]
    assert re.search(r"\|sums +\|.*\|acc +\|", told.out)


@pytest.mark.usefixtures("lm_eval_alone")
def test_lm_evals_own_command_on_the_shared_tasks(
    accuracy: Any, shared_model: Callable[[str], Path], run: Callable[..., Answer], tmp_path: Path
) -> None:
    folder = shared_model("stories260k")
    if not TASKS.is_dir():
        pytest.skip(f"the shared tasks are not on this machine ({TASKS})")
    names = sorted(path.stem for path in TASKS.glob("local_*.yaml"))
    ((_, mine),) = accuracy.measure_accuracies([folder], accuracy.open_suite(names, TASKS), limit=2)
    words = ["--model_args", f"pretrained={folder}", "--tasks", ",".join(names), "--include_path", TASKS]
    words += ["--limit", 2, "--batch_size", 4, "--output_path", tmp_path, "--log_samples"]
    assert run("lm-eval", "--model", "cospadi", *words).code == 0
    found = results_of(tmp_path)
    assert found == {(name, metric): values for name in names for metric, values in mine[name].items()}
    assert len(names) == 7


@pytest.mark.usefixtures("lm_eval_alone")
def test_lm_evals_own_mistakes_are_sentences(tasks: Path, dense_folder: Path, run: Callable[..., Answer]) -> None:
    words = ["--tasks", "sums", "--include_path", tasks, "--model_args"]
    answer = run("lm-eval", "--model", "cospadi", *words, f"pretrained={dense_folder}x")
    assert answer.code == 2
    assert answer.err.splitlines()[-1] == f"error: model folder {dense_folder}x does not exist"
    answer = run("lm-eval", "--model", "nothing", *words, f"pretrained={dense_folder}")
    assert answer.code == 2
    assert "error: lm-eval stops with ValueError: Attempted to load model 'nothing'" in answer.err.splitlines()[-1]


def test_the_entry_point_names_the_model_type(accuracy: Any) -> None:
    from lm_eval.api.registry import get_model

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lm_eval.models"]["cospadi"].partition(":")
    assert getattr(importlib.import_module(module), name) is get_model("cospadi")


@pytest.mark.parametrize(
    ("names", "mentioned"),
    [
        ("sumz", ["sumz is not known", "Did you mean", "sums"]),
        ("sums,lost", ["task lost cannot be opened", "nowhere.jsonl", "--include-path"]),
        ("rolling", ["task rolling has no accuracy", "word_perplexity"]),
    ],
)
def test_tasks_that_cannot_be_used(
    names: str, mentioned: list[str], tasks: Path, dense_folder: Path, run: Callable[..., Answer]
) -> None:
    answer = run("eval", dense_folder, "--tasks", names, "--include-path", tasks)
    assert answer.code == 2
    assert all(words in answer.err for words in mentioned), answer.err


def test_an_include_path_that_is_no_folder(accuracy: Any, dense_folder: Path, run: Callable[..., Answer]) -> None:
    answer = run("eval", dense_folder, "--tasks", "sums", "--include-path", dense_folder / "absent")
    assert answer.code == 2
    assert "absent is not a folder" in answer.err


def test_the_papers_tasks_are_lm_evals(accuracy: Any) -> None:
    from lm_eval import tasks

    folders = ("piqa", "hellaswag", "lambada", "arc", "sciq", "race", "mmlu")
    manager = accuracy.TaskManager(include_path=[Path(tasks.__file__).parent / folder for folder in folders])
    assert set(accuracy.PAPER) <= set(manager.all_tasks)


def test_without_lm_eval_the_extra_is_named(
    dense_folder: Path, run: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "cospadi.commands.accuracy", raising=False)
    monkeypatch.delattr("cospadi.commands.accuracy", raising=False)
    answer = run("eval", dense_folder, "--tasks", "piqa")
    assert answer.code == 2
    assert "pip install 'cospadi[eval]'" in answer.err


@pytest.mark.parametrize(
    "words", [[], ["--limit", 3, "--text", "file"], ["--include-path", "folder", "--text", "file"]]
)
def test_flags_that_go_together(words: list[Any], dense_folder: Path, run: Callable[..., Answer]) -> None:
    answer = run("eval", dense_folder, *words)
    assert answer.code == 2
    assert "--tasks" in answer.err


def test_rows_of_a_comparison_have_the_accuracies_of_eval(
    accuracy: Any, tasks: Path, dense_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"methods": ["magnitude"], "ratios": [0.5], "tasks": ["sums", "both"], "limit": 4}
    rows = cospadi.compare(dense_folder, text_file, tmp_path / "out", **asked, include_path=tasks, keep_models=True)
    models = [dense_folder, tmp_path / "out" / "models" / "magnitude-0.5"]
    found = accuracy.measure_accuracies(models, accuracy.open_suite(["sums", "both"], tasks), limit=4)
    for row, (_, figures) in zip(rows, found, strict=True):
        right = {task: "".join(f"{one:.0f}" for one in metrics["acc"]) for task, metrics in figures.items()}
        assert row["right"] == right
        assert row["documents"] == {"sums": 4, "both": 8}
    told = accuracy.accuracy_json(list(reversed(found)))
    dense, other = told["models"][1]["average"], told["models"][0]["average"]
    assert comparison.average(rows[1]) == pytest.approx(100 * other["value"])
    assert comparison.standard_error(rows[0]) == pytest.approx(100 * dense["stderr"])
    assert comparison.paired_error(*reversed(rows)) == pytest.approx(100 * told["difference"]["average"]["stderr"])
    (line,) = [line for line in (tmp_path / "out" / "compare.md").read_text().splitlines() if "| magnitude |" in line]
    gain = f"{100 * (other['value'] - dense['value']):+.2f} ± {100 * told['difference']['average']['stderr']:.2f}"
    assert line.endswith(f"| {gain} |")
    header, *_ = (tmp_path / "out" / "compare.csv").read_text().splitlines()
    assert header.endswith(",both,sums")
    with pytest.raises(cospadi.UserError, match="another comparison, with limit 4, not 3"):
        cospadi.compare(dense_folder, text_file, tmp_path / "out", **asked | {"limit": 3}, include_path=tasks)
