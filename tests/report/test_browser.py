"""The page in a real browser: nothing is fetched or complained of, nothing overflows, everybody can read it.

Needs Chromium (Debian's package, or what COSPADI_CHROMIUM names). Contrast and names are looked at by axe-core, whose
axe.min.js COSPADI_AXE names, or which `npm install axe-core` has put into the repository or beside it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
from conftest import SHARED_MODELS

import cospadi
from cospadi.commands import report
from cospadi.report.page import render

pytest.importorskip("matplotlib", reason="a report's figures are drawn by matplotlib (extra `report`)")

ROOT = Path(__file__).resolve().parents[2]
AXE = [
    *filter(None, [os.environ.get("COSPADI_AXE")]),
    *(str(one / "node_modules" / "axe-core" / "axe.min.js") for one in (ROOT, ROOT.parent, ROOT / "tests")),
]

WIDER = """
[...document.querySelectorAll("body *")].filter(one => {
  const box = one.getBoundingClientRect();
  return box.right > innerWidth + 1 && box.width > 0 && !one.closest(".box, pre, .text, svg");
}).map(one => one.outerHTML.slice(0, 200))
"""

FIGURES = """
[...document.querySelectorAll("figure svg")].map(one => {
  const box = one.getBoundingClientRect(), text = one.querySelector("text");
  const cut = [...one.querySelectorAll("text")].map(word => word.getBoundingClientRect())
    .filter(word => word.left < box.left - 1 || word.right > box.right + 1 || word.bottom > box.bottom + 1).length;
  return {width: box.width, height: box.height, name: one.getAttribute("aria-label"),
          shapes: one.querySelectorAll("path").length,
          size: parseFloat(getComputedStyle(text).fontSize) * box.width / one.viewBox.baseVal.width,
          ink: getComputedStyle(text).fill, cut};
})
"""

RULES = """
axe.run({exclude: ["svg text"]}, {runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]})
  .then(found => JSON.stringify([found.violations, found.incomplete].map(all => all.flatMap(
    rule => rule.nodes.map(node => [rule.id, node.html.slice(0, 200), node.failureSummary])))))
"""
"""Of a figure's text the other test looks at the colour: axe does not see what is behind it."""

OPENED = """
document.querySelectorAll("details").forEach(one => { one.open = true });
const sheet = document.createElement("style");
sheet.textContent = ".box, .text, pre { overflow: visible; max-height: none } figure svg { visibility: hidden } "
  + "pre, pre code { white-space: pre-wrap; overflow-wrap: anywhere } .token, mark { display: inline-block }";
document.head.append(sheet);
"""
"""Whatever is hidden or may cover something is out of the way, so that axe sees all colours."""

NO_TEXT = ("too short", "non-text characters")
"""What axe says of single characters; longer texts stand in each of their colours, too."""

PLACE = """(one => one === document.body ? ""
  : `${one.tagName} ${one.getAttribute("href") || one.getAttribute("aria-label") || ""}`)"""
REACHABLE = f"""
[...document.querySelectorAll("a[href], summary, [tabindex]:not([tabindex='-1'])")]
  .filter(one => one.checkVisibility()).map({PLACE})
"""
SCROLLS_FOR_THE_MOUSE_ALONE = """
[...document.querySelectorAll("body *")].filter(one => one.scrollWidth > one.clientWidth + 1 && one.tabIndex < 0
  && ["auto", "scroll"].includes(getComputedStyle(one).overflowX)).map(one => one.outerHTML.slice(0, 200))
"""

SCREENS = [(375, False), (375, True), (1440, False), (1440, True)]


def measured_page(dense: Path, text: Path, recipe: dict[str, Any], folder: Path, length: int | None) -> Path:
    cospadi.compress(dense, recipe, folder / "small-model")
    path = folder / "report.html"
    path.write_text(render(report.gather(folder / "small-model", dense, text, length)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pages(
    dense_folder: Path,
    compressed_folder: Path,
    text_file: Path,
    default: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """A page with all that there is, one without measurements, and one of a trained model where there is one."""
    folder = tmp_path_factory.mktemp("pages")
    plain = folder / "plain.html"
    plain.write_text(render(report.gather(compressed_folder)), encoding="utf-8")
    words = folder / "words.txt"
    words.write_text(text_file.read_text()[:1500])
    found = {"measured": measured_page(dense_folder, words, default, folder, 32), "plain": plain}
    stories = SHARED_MODELS / "stories260k"
    if stories.is_dir():
        text = folder / "stories.txt"
        text.write_text((SHARED_MODELS.parent / "data" / "stories_heldout.txt").read_text()[:4000])
        recipe = {"ratio": 0.5, "metric": "weights", "iterations": 1}
        (folder / "trained").mkdir()
        found["trained"] = measured_page(stories, text, recipe, folder / "trained", None)
    return found


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    if browser.program() is None:
        pytest.skip("Chromium is not on this machine: apt-get install chromium, or name one by COSPADI_CHROMIUM")
    with browser.opened(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def axe() -> str:
    path = next((Path(one) for one in AXE if Path(one).is_file()), None)
    if path is None:
        pytest.skip(
            "axe-core is not on this machine: npm install axe-core in the repository, or name it by COSPADI_AXE"
        )
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize(("width", "dark"), SCREENS)
def test_it_is_quiet_whole_and_in_its_width(
    width: int, dark: bool, pages: dict[str, Path], chromium: browser.Browser
) -> None:
    for name, path in pages.items():
        chromium.open(path, width, dark)
        asked = [
            one["params"]["request"]["url"] for one in chromium.events if one["method"] == "Network.requestWillBeSent"
        ]
        assert asked == [path.resolve().as_uri()], name
        said = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        assert not [one for one in chromium.events if one["method"] in said], name
        assert chromium.run("document.documentElement.scrollWidth") == width, name
        assert chromium.run(WIDER) == [], name
        paper, ink = chromium.run(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        assert (sum(numbers(paper)) < sum(numbers(ink))) == dark
        figures = chromium.run(FIGURES)
        assert len(figures) == (1 if name == "plain" else 3)
        for figure in figures:
            assert figure["ink"] == ink
            assert figure["width"] > 300
            assert figure["height"] > 90
            assert figure["shapes"] > 5
            assert figure["cut"] == 0
            assert figure["size"] >= 9.5
            assert figure["name"]
        if name != "plain":
            assert chromium.run("document.querySelectorAll('.map').length") >= 4


def numbers(colour: str) -> list[int]:
    return [int(word) for word in colour.removeprefix("rgb(").removesuffix(")").split(",")]


@pytest.mark.parametrize(("width", "dark"), SCREENS)
def test_everybody_can_read_it(
    width: int, dark: bool, pages: dict[str, Path], chromium: browser.Browser, axe: str
) -> None:
    for name, path in pages.items():
        chromium.open(path, width, dark)
        chromium.run(OPENED)
        chromium.run(f"{axe}; 1")
        violations, unsure = json.loads(chromium.run(RULES))
        assert violations == [], name
        if width > 1000:  # of what lies beside the window axe is unsure; the colours are the same there
            assert [node for node in unsure if not any(word in node[2] for word in NO_TEXT)] == [], name


def test_axe_sees_what_is_wrong(tmp_path: Path, chromium: browser.Browser, axe: str) -> None:
    wrong = tmp_path / "wrong.html"
    wrong.write_text(
        "<!DOCTYPE html><html><body><p style='color:#ccc;background:#fff'>pale</p><svg role='img'></svg></body>"
    )
    chromium.open(wrong, 375, False)
    chromium.run(f"{axe}; 1")
    assert {"color-contrast", "svg-img-alt", "html-has-lang"} <= {
        rule for rule, *_ in json.loads(chromium.run(RULES))[0]
    }


def test_the_keyboard_reaches_every_link_and_every_box(pages: dict[str, Path], chromium: browser.Browser) -> None:
    chromium.open(pages["measured"], 375, False)
    reached = []
    for _ in range(200):
        chromium.press("Tab", 9)
        now = chromium.run(f"{PLACE}(document.activeElement)")
        if not now:
            break
        reached.append(now)
        assert chromium.run("getComputedStyle(document.activeElement).outlineStyle") != "none"
    assert reached == chromium.run(REACHABLE)
    assert len(reached) > 15
    assert chromium.run(SCROLLS_FOR_THE_MOUSE_ALONE) == []


def test_a_quoted_token_leads_to_its_place(pages: dict[str, Path], chromium: browser.Browser) -> None:
    chromium.open(pages["measured"], 1440, False)
    links = chromium.run("[...document.querySelectorAll('.quote a')].map(one => [one.hash, one.textContent])")
    assert links
    for place, text in links:
        target = chromium.run(f"document.getElementById({place[1:]!r}).textContent")
        assert text in (target.replace("\n", ""), "␣" * len(target))


TOLD = "getComputedStyle(document.getElementById({place!r}), '::after').content"


def test_losses_of_a_token_are_told_without_a_mouse(pages: dict[str, Path], chromium: browser.Browser) -> None:
    chromium.open(pages["measured"], 375, False)
    place = chromium.run("(one => (one.focus(), one.click(), one.hash))(document.querySelector('.quote a'))")[1:]
    assert re.fullmatch(r'"dense [\d.]+, compressed [\d.]+ nats"', chromium.run(TOLD.format(place=place)))
    other = chromium.run("[...document.querySelectorAll('.token[data-loss]:not(:target)')].at(-1).id")
    assert chromium.run(TOLD.format(place=other)) == "none"
    left, top = chromium.run(
        f"(one => (one.scrollIntoView(), (box => [box.x + box.width / 2, box.y + box.height / 2])"
        f"(one.getClientRects()[0])))(document.getElementById({other!r}))"
    )
    chromium.call("Emulation.setTouchEmulationEnabled", enabled=True)
    for kind, points in (("touchStart", [{"x": left, "y": top}]), ("touchEnd", [])):
        chromium.call("Input.dispatchTouchEvent", type=kind, touchPoints=points)
    after = chromium.run(f"new Promise(done => setTimeout(() => done({TOLD.format(place=other)}), 300))")
    assert after.startswith('"dense ')
    assert chromium.run("document.documentElement.scrollWidth") == 375


def test_it_prints_on_white_with_all_of_its_text(pages: dict[str, Path], chromium: browser.Browser) -> None:
    chromium.open(pages["measured"], 1440, True)
    chromium.call(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    assert numbers(chromium.run("getComputedStyle(document.body).backgroundColor")) == [255, 255, 255]
    high, inside = chromium.run("(one => [one.clientHeight, one.scrollHeight])(document.querySelector('.text'))")
    assert inside <= high + 1
    assert chromium.printed().startswith(b"%PDF")
