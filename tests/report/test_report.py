"""`cospadi report`: what the page and the summary say, and where they are put."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHARED_MODELS, Answer
from safetensors.torch import load_file, save_file

import cospadi
from cospadi.budget.plan import Plan, dense_group, outlook
from cospadi.calibration.loss import ByToken
from cospadi.commands import report as gathering
from cospadi.format import card
from cospadi.format.sizes import size
from cospadi.model import load
from cospadi.report import figures, maps, page, tokens
from cospadi.report.content import left

pytest.importorskip("matplotlib", reason="a report's figures are drawn by matplotlib (extra `report`)")
WHY_DENSE = "selected; the budget left it dense"
MEASURE = ("--length", "32")


class Page(HTMLParser):
    """A page's tables as lists of rows of texts, its words, and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.words, self.fetched, self.ids, self.tags = "", [], [], []
        self.losses: dict[str, str] = {}
        self._cell, self._skipped = False, 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.ids += [given["id"]] if given.get("id") else []
        if given.get("id") and given.get("data-loss"):
            self.losses[str(given["id"])] = str(given["data-loss"])
        self.fetched += [
            value for name, value in attrs
            if name in ("src", "href", "xlink:href", "action") and value and not value.startswith(("#", "data:"))
        ]  # fmt: skip
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True
        elif tag in ("style", "svg"):
            self._skipped += 1

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False
        elif tag in ("style", "svg"):
            self._skipped -= 1

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.words += data
            if self._cell:
                self.tables[-1][-1][-1] += data

    def table(self, head: str) -> list[list[str]]:
        """The one whose head begins so."""
        (found,) = [table for table in self.tables if " ".join(table[0]).strip().startswith(head)]
        return [[" ".join(cell.split()) for cell in row] for row in found]


@pytest.fixture(scope="session")
def sparse(dense_folder: Path, default: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default method, one kind of projection excluded."""
    output = tmp_path_factory.mktemp("report") / "small-model"
    cospadi.compress(dense_folder, default | {"exclude": ["*.o_proj"]}, output)
    return output


@pytest.fixture
def folder(sparse: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sparse, tmp_path / sparse.name))


@pytest.fixture
def measured(folder: Path, dense_folder: Path, text_file: Path, run: Callable[..., Answer]) -> Page:
    answer = run("report", folder, "--against", dense_folder, "--text", text_file, *MEASURE)
    assert answer.code == 0, answer.err
    assert answer.out.splitlines()[-1] == f"Written to {folder / 'report.html'}."
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_the_page_needs_nothing_but_itself(measured: Page) -> None:
    assert measured.fetched == []
    assert "script" not in measured.tags
    assert len(measured.ids) == len(set(measured.ids))
    assert measured.tags.count("svg") == 3


def test_sizes_are_those_of_the_files(measured: Page, folder: Path, dense_folder: Path) -> None:
    rows = {row[0]: row[1:] for row in measured.table("part before after")}
    before, after = (
        sum(tensor.nbytes for tensor in load_file(one / "model.safetensors").values()) for one in (dense_folder, folder)
    )
    percent = f"{100 * after / before:.0f} %"
    assert rows["whole checkpoint"] == [size(before), size(after), percent]
    assert rows["down_proj × 2"][0] == size(2 * 2 * 80 * 48)
    assert rows["o_proj"][:2] == [size(2 * 2 * 48 * 48)] * 2
    assert size(999) == "999 bytes"
    assert [size(n) for n in (1000, 123456, 10**6, 25 * 10**9)] == ["1.00 kB", "123.5 kB", "1.00 MB", "25.0 GB"]


def test_quality_is_that_of_eval(
    measured: Page, folder: Path, dense_folder: Path, text_file: Path, run: Callable[..., Answer]
) -> None:
    words = ["eval", folder, "--text", text_file, "--against", dense_folder, *MEASURE, "--kl", "--json"]
    told = json.loads(run(*words).out)
    rows = {row[0]: row[1:] for row in measured.table("figure this model")}
    assert rows["perplexity"] == [f"{one['perplexity']:.4f}" for one in told["models"]]
    assert rows["loss added, ln of the ratio, nats a token"][0] == f"{told['log_ratio']:+.4f}".replace("-", "−")
    assert rows["KL divergence from it, nats a token"][0] == f"{told['kl_divergence']:.5f}"
    asked = ["report", folder, "--against", dense_folder, "--text", text_file, *MEASURE, "--json"]
    found = json.loads(run(*asked).out)
    assert found["measured"]["perplexity"] == told["models"][0]["perplexity"]
    assert found["report"] == str(folder / "report.html")


def test_every_token_tells_its_loss_in_both_models(
    measured: Page, folder: Path, dense_folder: Path, text_file: Path
) -> None:
    text = text_file.read_text()
    tokenized = torch.tensor(load.load_tokenizer(dense_folder)(text)["input_ids"])
    windows = tokenized[: len(tokenized) // 32 * 32].view(-1, 32)
    losses = []
    for one in (folder, dense_folder):
        with torch.no_grad():
            model = load.load_model(one, torch.device("cpu"))
            logits = torch.cat([model(input_ids=some).logits for some in windows.split(4)])[:, :-1].double().numpy()
        top = logits.max(-1, keepdims=True)
        logs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        losses.append(-np.take_along_axis(logs, windows[:, 1:, None].numpy(), -1)[..., 0])
    shown = tokens.SHOWN // 32
    assert len(measured.losses) == shown * 31
    for name, told in measured.losses.items():
        window, at = map(int, name.removeprefix("t").split("-"))
        dense, compressed = map(float, re.findall(r"[\d.]+", told))
        assert compressed == pytest.approx(losses[0][window, at - 1], abs=0.006)
        assert dense == pytest.approx(losses[1][window, at - 1], abs=0.006)
    furthest = np.sort(np.abs(losses[0] - losses[1]).flatten())[::-1][: tokens.PARTED]
    rows = measured.table("text and token")[1:]
    assert [abs(float(row[2]) - float(row[1])) for row in rows] == pytest.approx(furthest, abs=0.011)
    assert f"shows {shown * 32:,} of the {windows.numel():,} tokens" in " ".join(measured.words.split())
    assert text[: windows.shape[1]] in measured.words


def test_maps_are_of_the_manifest_and_the_tensors(measured: Page, folder: Path) -> None:
    recorded = json.loads((folder / "cospadi.json").read_text())["projections"]
    found = {table[-1][0]: table for table in measured.tables if table[0][0] == "block"}
    assert len([table for table in measured.tables if table[0][0] == "block"]) == 6
    error, cost, price, bits, size, density = (table for table in measured.tables if table[0][0] == "block")
    assert "mean" in found
    kinds = error[0][1:]
    assert kinds == ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    for block in range(2):
        for column, kind in enumerate(kinds, 1):
            (name,) = [one for one in recorded if f".{block}." in one and one.endswith(kind)]
            entry, stored = recorded[name], sum(recorded[name]["bytes"].values())
            weights = 48 * {"k_proj": 24, "v_proj": 24, "q_proj": 48}.get(kind, 80)
            assert float(error[block + 1][column]) == pytest.approx(entry["relative_error"], abs=0.006)
            assert float(bits[block + 1][column]) == pytest.approx(8 * stored / weights, abs=0.06)
            assert float(size[block + 1][column]) == pytest.approx(stored / 1000, abs=0.006)
            masks = load_file(folder / "model.safetensors")[f"{name}.support"]
            ones = int(np.unpackbits(masks.numpy()).sum())
            assert float(density[block + 1][column]) == pytest.approx(ones / weights, abs=0.006)
            for table, figure in ((cost, entry["loss"]["of_error"]), (price, entry["loss"]["of_all"] / 100)):
                digits = float(table[block + 1][column].replace(",", ""))
                assert any(digits == pytest.approx(figure * 10**power, rel=0.06, abs=0.6) for power in (0, 3, 6, 9))
    total = sum(sum(entry["bytes"].values()) for name, entry in recorded.items() if name.endswith("up_proj"))
    assert size[-1][0] == "sum"
    assert float(size[-1][kinds.index("up_proj") + 1]) == pytest.approx(total / 1000, abs=0.006)


def test_what_was_left_dense_is_told_with_its_reason(measured: Page, folder: Path) -> None:
    rows = {row[0]: row[1:] for row in measured.table("what number size why")}
    assert rows["model.layers.*.self_attn.o_proj"] == ["2 tensors", size(4 * 48 * 48), "--exclude *.o_proj"]
    assert rows["lm_head"][2] == "outside the decoder blocks"
    assert "cospadi compress MODEL --ratio 0.3 --metric two-sided" in measured.words
    assert "--exclude '*.o_proj'" in measured.words


def test_a_block_that_was_left_dense_is_shown(dense_folder: Path, run: Callable[..., Answer], tmp_path: Path) -> None:
    flags = ["--ratio", 0.3, "--metric", "weights", "--iterations", 1, "--exclude", "*.layers.1.*", "--report"]
    assert run("compress", dense_folder, "-o", tmp_path / "out", *flags).code == 0
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    maps = [table for table in page.tables if table[0][0] == "block"]
    assert maps
    assert all(row[1:] == ["dense"] * 7 for table in maps for row in table if row[0] == "1")
    sizes = {row[0]: row[1:] for row in page.table("part before after")}
    assert sizes["down_proj, left dense"] == [size(2 * 80 * 48)] * 2 + ["100 %"]
    before = sum(tensor.nbytes for tensor in load_file(dense_folder / "model.safetensors").values())
    assert sizes["whole checkpoint"][0] == size(before)
    assert "model.layers.1.mlp.down_proj" in [row[0] for row in page.table("what number size why")]


def test_another_dense_model_than_it_was_made_of_is_told(
    folder: Path, dense_folder: Path, text_file: Path, run: Callable[..., Answer], tmp_path: Path
) -> None:
    other = Path(shutil.copytree(dense_folder, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    words = ["--text", text_file, *MEASURE]
    assert "is not, by its hash, what" in run("report", folder, "--against", other, *words).err
    assert "hash" not in run("report", folder, "--against", dense_folder, *words).err


def manifest_of(folder: Path, **changes: Any) -> dict[str, Any]:
    path = folder / "cospadi.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    return content


def test_reasons_follow_the_recipe_and_the_manifest(folder: Path) -> None:
    recipe = json.loads((folder / "cospadi.json").read_text())["recipe"]
    out = {"parts": ["model.visual"], "tensors": 3, "bytes": 500}
    manifest_of(folder, recipe=recipe | {"exclude": [], "target": ["q", "down"]}, left_out=out)
    found = {one.what: one for one in left(gathering.gather(folder))}
    assert found["model.layers.*.self_attn.o_proj"].why == "not of --target q,down"
    assert found["model.visual"][1:3] == ("3 tensors", 500)
    manifest_of(folder, recipe=recipe | {"exclude": [], "include": ["*.mlp.*"]})
    found = {one.what: one for one in left(gathering.gather(folder))}
    assert found["model.layers.*.self_attn.o_proj"].why == "not of --include *.mlp.*"
    manifest_of(folder, recipe=recipe | {"exclude": []}, stays_dense=["experts stay dense: a.*.b"])
    content = gathering.gather(folder)
    assert {one.what: one for one in left(content)}["model.layers.*.self_attn.o_proj"].why.startswith("no projection")
    assert "Experts stay dense: a.*.b." in page.render(content)


def test_a_projection_that_the_budget_left_dense(dense_folder: Path, tmp_path: Path) -> None:
    recipe, name = cospadi.Recipe.build(metric="weights", iterations=1, share="none"), "model.layers.0.self_attn.q_proj"
    groups = outlook(dense_folder, recipe.model_copy(update={"ratio": 0.4})).plan.groups
    plan = Plan(tuple(dense_group(one.members) if one.members[0].name == name else one for one in groups))
    cospadi.compress(dense_folder, recipe, tmp_path / "out", plan=plan)
    content = gathering.gather(tmp_path / "out")
    assert left(content)[0] == (name.replace(".0.", ".*."), "1 projection", 2 * 48 * 48, WHY_DENSE)
    (error, *_) = maps.heat_maps(content.projections)
    assert error.rows[0][1][0] == maps.Cell("dense", None)


def test_an_older_folder_reports_without_what_it_lacks(folder: Path) -> None:
    projections = json.loads((folder / "cospadi.json").read_text())["projections"]
    older = {name: {"layout": one["layout"], "bytes": one["bytes"]} for name, one in projections.items()}
    manifest_of(folder, projections=older)
    found = Page(page.render(gathering.gather(folder)))
    words = " ".join(found.words.split())
    assert "holds no errors of its projections" in words
    assert "What errors cost in the loss is not in the folder's manifest" in words
    assert len([table for table in found.tables if table[0][0] == "block"]) == 3
    manifest_of(folder, recipe={"method": "of old", "solver": "x", "ratio": 0.5, "calibration": None})
    assert "cospadi compress" not in Page(page.render(gathering.gather(folder))).words
    (folder / "cospadi.json").unlink()
    found = Page(page.render(gathering.gather(folder)))
    assert "The folder has no manifest that tells." in found.words
    assert page.markdown(gathering.gather(folder)).startswith("## small-model\n")


def test_equal_folders_give_equal_pages_that_name_no_path(folder: Path, sparse: Path, tmp_path: Path) -> None:
    once = page.render(gathering.gather(folder))
    assert once == page.render(gathering.gather(sparse))
    assert str(tmp_path) not in once


def test_the_folder_stays_what_it_was(
    measured: Page, folder: Path, sparse: Path, dense_folder: Path, run: Callable[..., Answer]
) -> None:
    assert run("verify", folder).code == 0
    assert run("inspect", folder).code == 0
    assert {path.name for path in folder.iterdir()} - {path.name for path in sparse.iterdir()} == {"report.html"}
    again = run("compress", dense_folder, "-o", folder, "--metric", "weights", "--iterations", "1", "--overwrite")
    assert again.code == 0, again.err


def test_names_that_are_markup_are_text(folder: Path, dense_folder: Path, text_file: Path, tmp_path: Path) -> None:
    odd = Path(shutil.copytree(folder, tmp_path / "<b>$x_{1}$&amp;"))
    recipe = json.loads((odd / "cospadi.json").read_text())["recipe"]
    manifest_of(odd, recipe=recipe | {"calibration": "<script>alert(1)</script>"})
    text = tmp_path / "<img src=x>.txt"
    text.write_text("<script>alert('hi')</script>\n& so on. " * 40)
    content = gathering.gather(odd, dense_folder, text, 32)
    rendered = page.render(content)
    found = Page(rendered)
    assert found.fetched == []
    assert not {"script", "img", "b"} & set(found.tags) - {"b"}
    assert "<b>$x_{1}$&amp;, compressed" in found.words
    assert html.escape("<script>", quote=False) in rendered
    assert "alert('hi')" in found.words.replace("↵", "")


def test_scores_are_those_of_the_card(folder: Path) -> None:
    rows = [["piqa, acc, 1,838 documents (lm-eval 0.4.13)", "70.10 ± 1.07 %"], ["odd | `name` <x>\\", "1 | 2"]]
    text = card.with_measured(
        (folder / "README.md").read_text(), "cospadi eval X --tasks piqa", card.table(["", "it"], rows)
    )
    (folder / "README.md").write_text(text)
    (score,) = gathering.scores(folder)
    assert score == ("cospadi eval X --tasks piqa", ["", "it"], rows)
    assert "70.10 ± 1.07 %" in Page(page.render(gathering.gather(folder))).words


def test_the_summary_is_for_a_card(
    folder: Path, dense_folder: Path, text_file: Path, run: Callable[..., Answer]
) -> None:
    answer = run("report", folder, "--markdown", "--against", dense_folder, "--text", text_file, *MEASURE)
    assert answer.code == 0, answer.err
    assert not (folder / "report.html").exists()
    own = (folder / "README.md").read_text()
    table = card.table(["a"], [["b"]]).splitlines()[1][:5]
    assert table in answer.out
    for line in own.partition("## Size")[2].partition("## How")[0].strip().splitlines()[2:]:
        assert line in answer.out.splitlines()  # the same sizes in the same words
    told = run("report", folder, "--against", dense_folder, "--text", text_file, *MEASURE, "--json")
    assert f"| {json.loads(told.out)['measured']['perplexity']:.4f} |" in answer.out


def test_compress_writes_it_too(dense_folder: Path, run: Callable[..., Answer], tmp_path: Path) -> None:
    words = ["compress", dense_folder, "--metric", "weights", "--iterations", "1", "-o", tmp_path / "out"]
    answer = run(*words, "--report")
    assert answer.code == 0, answer.err
    assert f"Report: {tmp_path / 'out' / 'report.html'}" in answer.out
    found = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert "Not measured here." in found.words
    assert "no text was read" in found.words
    assert run("verify", tmp_path / "out").code == 0


@pytest.mark.parametrize(
    ("words", "mentioned"),
    [
        (["--text", "TEXT"], "--text compares with the dense model. Give --against MODEL"),
        (["--length", "32"], "--text-field and --length are of --text"),
        (["--markdown", "-o", "x.html"], "Leave --output out"),
        (["-o", "FOLDER"], "is a folder. Name a file in it"),
        (["-o", "FOLDER/none/x.html"], "none is not a folder"),
        (["-o", "TEXT"], "is there, and is no report"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(
    words: list[str], mentioned: str, folder: Path, text_file: Path, run: Callable[..., Answer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("cospadi.commands.report.gather", lambda *_, **__: 1 / 0)
    before = text_file.read_bytes()
    words = [word.replace("TEXT", str(text_file)).replace("FOLDER", str(folder)) for word in words]
    answer = run("report", folder, *words)
    assert (answer.code, answer.out) == (2, "")
    assert mentioned in answer.err
    assert text_file.read_bytes() == before


def test_what_is_no_compressed_folder_is_refused(
    dense_folder: Path, run: Callable[..., Answer], tmp_path: Path
) -> None:
    assert "is not a CoSpaDi checkpoint" in run("report", dense_folder, "-o", tmp_path / "x.html").err
    assert "Of a model on the hub name the file to write: --output" in run("report", "someone/model").err
    answer = run("report", tmp_path / "none")
    assert (answer.code, "does not exist" in answer.err) == (2, True)
    assert not (tmp_path / "x.html").exists()


def test_without_the_library_the_command_that_installs_it_is_named(
    folder: Path, run: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dense_folder: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    for words in (["report", folder], ["compress", dense_folder, "-o", tmp_path / "out", "--report"]):
        answer = run(*words)
        assert answer.code == 2
        assert "pip install 'cospadi[report]'" in answer.err
    assert not (tmp_path / "out").exists()


def test_a_page_that_cannot_be_written_whole_leaves_the_old_one(
    folder: Path, run: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("report", folder).code == 0
    before = (folder / "report.html").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("cospadi.files.os.fsync", full)
        assert run("report", folder).code == 1
    assert (folder / "report.html").read_bytes() == before
    assert not [path for path in folder.iterdir() if path.name.endswith(".new")]


def test_figures_stand_what_is_not_finite_or_all_the_same() -> None:
    windows = torch.zeros(1, 4, dtype=torch.int64)
    inf = float("inf")
    for ours, dense in (([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]), ([inf, inf, 1.0], [inf, 1.0, inf])):
        found = ByToken(
            windows, torch.tensor([[ours], [dense]]), torch.zeros(1, 3), torch.zeros(2, 1, 3, dtype=torch.int64)
        )
        assert "<svg" in figures.differences_figure(found)
        assert "<svg" in figures.sureness_figure(found)
        assert sum(tokens.fractions(found)) <= 1
        assert len(tokens.parted_most(found)) == int((found.differences != 0).sum())


@pytest.mark.parametrize(
    ("difference", "mark"), [(-3.0, "better"), (-0.5, "well"), (0.0, ""), (0.3, "bad"), (1.5, "worse"), (9.0, "worst")]
)
def test_marks(difference: float, mark: str) -> None:
    assert tokens.mark_of(difference) == mark


def test_tokens_that_are_parts_of_a_character_give_it_to_the_last(dense_folder: Path) -> None:
    tokenizer = load.load_tokenizer(dense_folder)
    text = "né €5"
    assert tokens.text_of(tokenizer, tokenizer(text)["input_ids"]) == ["n", "", "é", " ", "", "", "€", "5"]


@pytest.mark.skipif(not (SHARED_MODELS / "stories260k").is_dir(), reason="stories260k is not on this machine")
def test_tokens_of_a_trained_tokenizer_join_to_the_text() -> None:
    tokenizer = load.load_tokenizer(SHARED_MODELS / "stories260k")
    text = 'Once upon a time, "Tim"\nsaid: naïve — 5!'
    found = tokens.text_of(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
    assert "".join(found).strip() == text
