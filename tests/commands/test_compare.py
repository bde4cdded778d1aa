"""`cospadi compare`: every row is what `compress` and `eval` give alone; rows are computed once, whatever happens."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Answer
from killed import hashes

import cospadi
from cospadi.commands import compare, comparison, evaluate
from cospadi.recipe import METHODS, Recipe

QUICK = "sparse+refine=1+iterations=1"
COMMON = {"sequences": 4, "length": 32, "batch_size": 2, "gradient_sequences": 1}
METHODS_ASKED = [QUICK, "wanda", "coded"]
FILES = {"rows", "compare.csv", "compare.json", "compare.md", "compare.svg", "compare.png"}


@pytest.fixture(scope="module")
def asked(dense_folder: Path, text_file: Path) -> dict[str, Any]:
    """A comparison of a few moments: two methods at a ratio, one at two sizes in bits, and the dense model."""
    recipe = COMMON | {"calibration": str(text_file)}
    asked: dict[str, Any] = {"model": dense_folder, "text": text_file, "recipe": recipe, "ratios": [0.3]}
    return asked | {"bits": [8, 4.5], "methods": METHODS_ASKED}


@pytest.fixture(scope="module")
def compared(asked: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder and its rows, the models kept; never changed."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `report`)")
    output = tmp_path_factory.mktemp("compared") / "out"
    return output, cospadi.compare(**asked, output=output, keep_models=True)


@pytest.fixture
def again(compared: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy of that folder, without models."""
    shutil.copytree(compared[0], tmp_path / "again", ignore=shutil.ignore_patterns("models"))
    return tmp_path / "again"


def stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


# What rows say


def test_a_row_is_what_compress_and_eval_give_alone(
    compared: tuple[Path, list[dict[str, Any]]], asked: dict[str, Any], tmp_path: Path
) -> None:
    output, rows = compared
    dense, *others = rows
    (_, expected), *_ = evaluate.evaluate_models([asked["model"]], asked["text"])
    assert (dense["method"], dense["perplexity"], dense["windows"]) == ("dense", expected.value, expected.windows)
    assert [(row["method"], row["ratio_asked"], row["bits_asked"]) for row in others[2:]] == [
        ("coded", 0.5, 8.0),
        ("coded", 0.71875, 4.5),
    ]
    assert {row["method"] for row in others[:2]} == {QUICK, "wanda"}
    assert others[0]["perplexity"] <= others[1]["perplexity"]
    recipes = {
        "sparse+refine=1+iterations=1-0.3": {"ratio": 0.3, "refine": 1, "iterations": 1},
        "wanda-0.3": {"ratio": 0.3, "method": "wanda"},
        "coded-8-bits": {"bits": 8},
        "coded-4.5-bits": {"bits": 4.5},
    }
    assert {path.name for path in (output / "models").iterdir()} == set(recipes)
    for name, fields in recipes.items():
        result = cospadi.compress(asked["model"], asked["recipe"] | fields, tmp_path / name)
        assert hashes(output / "models" / name) == hashes(tmp_path / name)
        row = json.loads((output / "rows" / f"{name}.json").read_text())
        assert row in rows
        assert (row["bytes"], row["dense_bytes"]) == (result.plan.bytes, result.plan.dense_bytes)
        assert (row["checkpoint_bytes"], row["relative_errors"]) == (result.bytes_after, result.errors)
        both = evaluate.compare_models(tmp_path / name, asked["model"], asked["text"], batch_size=2)
        assert (row["perplexity"], row["kl"]) == (both.results[0][1].value, both.divergence)


def test_table_and_figure_hold_every_row(compared: tuple[Path, list[dict[str, Any]]]) -> None:
    output, rows = compared
    assert {path.name for path in output.iterdir()} == FILES | {"models"}
    dense = rows[0]
    told = json.loads((output / "compare.json").read_text())["rows"]
    lines = list(csv.DictReader((output / "compare.csv").open()))
    page = (output / "compare.md").read_text()
    for row, one, line in zip(rows, told, lines, strict=True):
        assert one["method"] == line["method"] == row["method"]
        assert one["log_ratio"] == float(line["log_ratio"]) == math.log(row["perplexity"] / dense["perplexity"])
        assert int(line["bytes"]) == one["bytes"] == (rows[1]["dense_bytes"] if row is dense else row["bytes"])
        assert f"| {row['method']} |" in page
        assert f"| {one['bytes']:,} |" in page
    assert "| coded | 4.5 bits |" in page
    svg = ElementTree.parse(output / "compare.svg").getroot()
    assert svg.tag.endswith("svg")
    assert (output / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "compare.svg").read_bytes() == comparison.draw(rows)["svg"]


def test_no_point_of_the_figure_vanishes() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `report`)")
    losses = {"a": [0.5, 0.01], "b": [0.0, -0.2], "c": [1e-9, None]}
    rows: list[dict[str, Any]] = [{"method": "dense", "model": "m", "text": "t", "perplexity": 2.0}]
    for name, some in losses.items():
        for place, value in enumerate(some):
            perplexity = None if value is None else 2 * math.exp(value)
            row = {"method": name, "bytes": 10**6 * (3 + place), "dense_bytes": 4 * 10**6, "perplexity": perplexity}
            rows.append(row | {"ratio_asked": 0.3, "bits_asked": None})
    (axis, *_) = comparison.figure(rows).axes
    low, high = axis.get_ylim()
    foot = 0.01 / 2
    expected = {"a": [(3, 0.5), (4, 0.01)], "b": [(3, foot), (4, foot)], "c": [(3, foot)]}
    points: dict[str, list[tuple[float, float]]] = {}
    for line in axis.lines:
        if line.get_marker() == "o":
            hollow = line.get_markerfacecolor() == "white"
            points.setdefault("hollow" if hollow else line.get_label(), []).extend(line.get_xydata().tolist())
    assert points.pop("hollow") == [pytest.approx(point) for name in "bc" for point in expected[name]]
    assert points == {name: [pytest.approx(point) for point in some] for name, some in expected.items()}
    assert all(low < y < high for some in points.values() for _, y in some)
    assert comparison.notes(rows) == ["c at ratio 0.3: its perplexity is beyond a float."]


def test_without_matplotlib_the_tables_come_all_the_same(
    again: Path, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (again / "compare.csv").unlink()
    with caplog.at_level(logging.WARNING, "cospadi"):
        cospadi.compare(**asked, output=again)
    assert "pip install 'cospadi[report]'" in caplog.text
    assert {path.name for path in again.iterdir()} == FILES - {"compare.svg", "compare.png"}
    assert "svg" not in (again / "compare.md").read_text()


def test_a_size_that_is_too_small_is_told_and_the_others_come(asked: dict[str, Any], tmp_path: Path) -> None:
    some = asked | {"bits": [1], "methods": ["wanda", "coded"]}
    rows = cospadi.compare(**some, output=tmp_path / "out")
    *_, row = rows
    assert row["method"] == "coded"
    assert "is too small for 1 bit a weight" in row["why_not"]
    assert f"- coded at 1 bit: {row['why_not']}" in (tmp_path / "out" / "compare.md").read_text()
    with pytest.raises(cospadi.UserError, match="is too small for 1 bit a weight"):
        cospadi.compare(**some | {"methods": ["coded"]}, output=tmp_path / "none")


# Once, whatever happens


def test_finished_rows_stay_and_others_are_added(
    again: Path, compared: tuple[Path, Any], asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = hashes(again / "rows")
    done: list[str] = []
    whole = compare.compress

    def noted(model: Any, recipe: Recipe, *args: Any, **more: Any) -> Any:
        done.append(recipe.method)
        return whole(model, recipe, *args, **more)

    monkeypatch.setattr(compare, "compress", noted)
    assert cospadi.compare(**asked, output=again) == compared[1]
    assert done == []
    rows = cospadi.compare(**asked | {"methods": ["magnitude"], "bits": []}, output=again)
    assert done == ["magnitude"]
    assert len(rows) == len(compared[1]) + 1
    assert {name: digest for name, digest in hashes(again / "rows").items() if "magnitude" not in name} == before
    assert "| magnitude |" in (again / "compare.md").read_text()


@pytest.mark.parametrize("moment", ["solving", "measuring"])
def test_a_stopped_row_resumes(
    moment: str, compared: tuple[Path, Any], asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, some = tmp_path / "out", asked | {"methods": [QUICK], "bits": []}
    job = sys.modules["cospadi.compress"]
    with monkeypatch.context() as patch:
        module, name = (job, "finish") if moment == "solving" else (evaluate, "compare_models")
        patch.setattr(module, name, stop)
        with pytest.raises(KeyboardInterrupt):
            cospadi.compare(**some, output=output)
    assert [path.name for path in (output / "rows").iterdir()] == ["dense.json"]
    with monkeypatch.context() as patch:
        patch.setattr(job, "factorize", stop)  # what was solved is not solved again
        if moment == "measuring":
            patch.setattr(compare, "compress", stop)
        rows = cospadi.compare(**some, output=output)
    same = {"perplexity", "kl", "bytes", "relative_errors"}
    expected = next(row for row in compared[1] if row["method"] == QUICK)
    assert {name: rows[1][name] for name in same} == {name: expected[name] for name in same}
    assert [row.get("resumed") for row in rows] == [None, True]
    assert {path.name for path in output.iterdir()} == FILES


def test_killed_it_resumes(compared: tuple[Path, Any], asked: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = [sys.executable, "-c", "from cospadi_cli import main; main()", "compare", asked["model"], "-o", output]
    words += ["--text", asked["text"], "--calibration", asked["text"], "--ratios", "0.3", "--bits", "8,4.5"]
    words += ["--methods", ",".join(METHODS_ASKED)]
    words += [word for name, value in COMMON.items() for word in (f"--{name.replace('_', '-')}", value)]
    with (tmp_path / "log").open("w") as log:
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as many as here, for it is the same job
        process = subprocess.Popen(list(map(str, words)), stdout=log, stderr=log, env=one_thread)
        deadline = time.monotonic() + 120
        while len(list((output / "rows").glob("*.json"))) < 2 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    before = hashes(output / "rows")
    assert not (output / "compare.md").exists()
    rows = cospadi.compare(**asked, output=output)
    assert {name: hashes(output / "rows")[name] for name in before} == before
    for row, expected in zip(rows, compared[1], strict=True):
        assert (row["method"], row["perplexity"]) == (expected["method"], expected["perplexity"])
    assert {path.name for path in output.iterdir()} == FILES


def test_what_failed_leaves_the_folder_free_for_another_text(asked: dict[str, Any], tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Short.")
    asked = asked | {"methods": ["wanda"], "bits": []}
    with pytest.raises(cospadi.UserError, match="tokens"):
        cospadi.compare(**asked | {"text": short}, output=tmp_path / "out")
    dense, row = cospadi.compare(**asked, output=tmp_path / "out")
    assert dense["text"] == row["text"] == asked["text"].name


def test_no_resume_begins_unfinished_rows_anew(
    asked: dict[str, Any], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, some = tmp_path / "out", asked | {"methods": ["wanda"], "bits": []}
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "compare_models", stop)
        with pytest.raises(KeyboardInterrupt):
            cospadi.compare(**some, output=output)
    other = some | {"recipe": some["recipe"] | {"sequences": 3}}
    with pytest.raises(cospadi.UserError, match=r"another comparison, with sequences 4, not 3"):
        cospadi.compare(**other, output=output)
    (output / "rows" / "dense.json").unlink()
    assert cospadi.compare(**other, output=output, resume=False)[1]["sequences"] == 3


# What is refused


def test_rows_of_another_are_refused(
    again: Path, asked: dict[str, Any], make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    text = tmp_path / "other.txt"
    text.write_text(asked["text"].read_text().replace("squared", "doubled"))
    before = hashes(again / "rows")
    for change, named in (
        ({"text": text}, "text"),
        ({"model": make_llama(num_hidden_layers=1)}, "model"),
        ({"recipe": asked["recipe"] | {"calibration": str(text)}}, "calibration"),
        ({"recipe": asked["recipe"] | {"exclude": "*.q_proj"}}, "exclude"),
    ):
        with pytest.raises(
            cospadi.UserError, match=rf"rows/.*json is a row of another comparison, with {named} .*, not"
        ):
            cospadi.compare(**asked | change, output=again)
    (again / "rows" / "mine.json").write_text("{}")
    with pytest.raises(cospadi.UserError, match=r"mine\.json is no row of a comparison"):
        cospadi.compare(**asked, output=again)
    (again / "rows" / "mine.json").unlink()
    assert hashes(again / "rows") == before
    assert {path.name for path in again.iterdir()} == FILES


@pytest.mark.parametrize(
    ("words", "mentioned"),
    [
        ([], "there is no size to compare at. Give --ratios R,R, --bits B,B or both"),
        (["--ratios", "0.2,x"], "--ratios 0.2,x is no list of numbers"),
        (["--ratios", "1.5"], "ratio: Input should be less than 1"),
        (["--bits", "17"], "bits: Input should be less than 16"),
        (["--ratios", "0.3", "--methods", ","], "the name of a method is empty"),
        (["--ratios", "0,3"], "--ratios 0,3 has a size of nothing. Write numbers with a point"),
        (["--ratios", "0.3", "--methods", "nobody"], "method nobody is not known. Use one of sparse, coded"),
        (["--ratios", "0.3", "--methods", "coded"], "method coded has no size: it is told bits, and only --ratios"),
        (["--bits", "3", "--methods", "coded,wanda"], "method wanda has no size: it is told ratios, and only --bits"),
        (["--ratios", "0.3", "--methods", "sparse+refine"], "refine changes no field. Write METHOD+FIELD=VALUE"),
        (["--ratios", "0.3", "--methods", "sparse+ratio=0.2"], "ratio=0.2 changes no field"),
        (["--ratios", "0.3", "--methods", "sparse+sequences=2"], "sequences is of all rows"),
        (["--ratios", "0.3", "--methods", "sparse+colour=2"], "method sparse+colour=2: unknown field 'colour'"),
        (["--ratios", "0.3", "--methods", "svd+metric=output"], "method svd+metric=output: solver svd does not"),
        (["--ratios", "0.3", "--limit", "3"], "--include-path and --limit are of --tasks"),
    ],
)
def test_mistakes_are_sentences(
    words: list[str], mentioned: str, run: Callable[..., Answer], dense_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    answer = run("compare", dense_folder, "--text", text_file, "-o", tmp_path / "out", *words)
    assert answer.code == 2
    assert answer.out == ""
    assert mentioned in answer.err
    assert not (tmp_path / "out").exists()


def test_places_that_are_not_for_it(
    run: Callable[..., Answer], dense_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    for output, why in (
        (tmp_path / "mine", "holds letter.txt, which is no part of a comparison"),
        (text_file, "the text"),
        (dense_folder, "the model"),
    ):
        answer = run("compare", dense_folder, "--text", text_file, "--ratios", "0.3", "-o", output)
        assert answer.code == 2
        assert why in answer.err
    answer = run("compare", dense_folder, "--text", tmp_path / "none", "--ratios", "0.3", "-o", tmp_path / "out")
    assert answer.code == 2
    assert f"text file {tmp_path / 'none'} does not exist" in answer.err
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


# What is asked for, and what is told


def test_every_method_has_sizes_of_its_kind() -> None:
    common = Recipe.build(calibration="builtin")
    cases = compare.cases_of(None, [0.2, 0.3], [3], common)
    levels = {"coded", "gptq", "rtn"}
    assert [str(case) for case in cases if case.method in levels] == [
        f"{name} at 3 bits" for name in METHODS if name in levels
    ]
    others = [case for case in cases if case.method not in levels]
    assert {case.method for case in others} == set(METHODS) - levels
    assert len(others) == 2 * len(set(METHODS) - levels)
    assert all(case.recipe.calibration == "builtin" for case in cases)
    (case,) = compare.cases_of(["gptq+compensate=true"], [], [3], common)
    assert case.recipe == Recipe.build(method="gptq", compensate=True, bits=3, calibration="builtin")
    assert len(compare.cases_of(["sparse", "sparse"], [0.3, 0.3], [], common)) == 1


def test_time_left_is_that_of_like_rows() -> None:
    done: list[dict[str, Any]] = [{"method": "dense", "perplexity": 2.0, "seconds": 1000}]
    dense, *missing = [
        compare.Case(name, Recipe.build(method=name, ratio=0.3)) if name != "dense" else compare.Case(name, Recipe())
        for name in ("dense", "wanda", "wanda", "paper")
    ]
    assert compare.seconds_left(done, missing) is None
    done += [{"method": "wanda", "perplexity": 2.0, "seconds": seconds} for seconds in (10, 20)]
    assert compare.seconds_left(done, [dense, *missing]) == 15 + 15 + 15
    done += [{"method": "paper", "perplexity": 2.0, "seconds": 900}, {"method": "paper", "why_not": "", "seconds": 0}]
    assert compare.seconds_left(done, missing) == 15 + 15 + 900


def test_progress_and_json(
    again: Path, asked: dict[str, Any], run: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    (again / "rows" / "wanda-0.3.json").unlink()
    words = [word for name, value in COMMON.items() for word in (f"--{name.replace('_', '-')}", value)]
    words += ["--ratios", "0.3", "--methods", "wanda", "--text", asked["text"], "--calibration", asked["text"]]
    answer = run("compare", asked["model"], *words, "-o", again, "--json")
    assert answer.code == 0, answer.err
    assert "1 of 2 rows are there already\n" in answer.err
    (line,) = [line for line in answer.err.splitlines() if line.startswith("row ")]
    assert line.startswith("row 2 of 2: wanda at ratio 0.3, ")
    assert line.endswith(" left")
    assert json.loads(answer.out) == json.loads((again / "compare.json").read_text())
    with monkeypatch.context() as patch:
        (again / "rows" / "wanda-0.3.json").unlink()
        patch.setattr(evaluate, "compare_models", stop)
        answer = run("compare", asked["model"], *words, "-o", again)
        assert answer.code == 130
        assert f"What is finished is kept in {again}: the same command resumes from there." in answer.err
        assert answer.out == ""
    assert run("compare", asked["model"], *words, "-o", again).code == 0
    answer = run("compare", asked["model"], *words, "-o", again)
    assert f"Written to {again}." in answer.out
    assert "2 of 2 rows are there already" in answer.err


@pytest.mark.parametrize("place", ["work/thesis.txt", "rows/notes.txt", "notes.txt", "models/mine.txt"])
def test_nothing_of_somebody_elses_is_touched(place: str, asked: dict[str, Any], tmp_path: Path) -> None:
    mine = tmp_path / "mine" / place
    for folder in ("work", "rows", "models"):
        (tmp_path / "mine" / folder).mkdir(parents=True)
    mine.write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(cospadi.UserError, match=r"which is no part of a comparison|was not made by a comparison"):
        cospadi.compare(asked["model"], asked["text"], tmp_path / "mine", ratios=[0.3], methods=["wanda"])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_calibration_text_is_looked_at_first(asked: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(cospadi.UserError, match="is empty"):
        cospadi.compare(
            asked["model"], asked["text"], tmp_path / "out", ratios=[0.3], methods=["wanda"],
            recipe={"calibration": str(tmp_path / "empty.txt")},
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
