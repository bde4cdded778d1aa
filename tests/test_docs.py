"""Every command of the pages is run, here on a tiny model or by a test that is named, or the page says it is not."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from conftest import Answer
from hub import Hub
from markdown_it import MarkdownIt
from markdown_it.token import Token
from questions import CHOOSE, QUESTIONS

import cospadi
from cospadi.calibration import documents
from cospadi.cli import app
from cospadi.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
KINDS = {"sh", "python", "yaml", "json", "text", "math", "{eval-rst}"}
NOT_RUN = "not run by the tests"
"""Of a command in the comment behind it, of a block in a comment on its first line."""

ELSEWHERE = {
    "cospadi bench": "commands/test_bench.py::test_what_bench_prints",
    "cospadi compare": "commands/test_compare.py::test_progress_and_json",
    "cospadi lm-eval": "commands/test_accuracy.py::test_lm_evals_own_command_gives_the_same_answers",
    "curl http://localhost:8000/v1/completions": "test_examples.py::test_quickstart_notebook",
    "from vllm import LLM": "integrations/test_vllm.py::test_every_form_gives_the_tokens_of_transformers",
    "import torch\n\nmodel.forward = torch.compile": "runtime/test_layer.py::test_a_generation_loop_compiles_whole",
    "make demo": "benchmarks/test_quality.py::test_demo_ranks_the_methods",
    "python -c import cospadi; from transformers.cli.transformers": "test_examples.py::test_quickstart_notebook",
    "VLLM_CPU_KVCACHE_SPACE=4 python -m vllm": "integrations/test_vllm.py::test_a_server_chats_streams",
    "python examples/compress.py": "test_examples.py::test_compress",
    "python examples/quickstart.py": "test_examples.py::test_quickstart_notebook",
    "python examples/train_lora.py": "test_examples.py::test_train_lora",
}
"""How a command, or a block of Python, begins -> the test that runs it in another process or environment."""

SHORT = {"sequences": 4, "length": 32}
JOB = [word for name, value in SHORT.items() for word in (f"--{name}", str(value))]
SHORTER = {
    "compress": JOB,
    "plan": JOB,
    "generate": ["--tokens", "4"],
    "chat": ["--tokens", "4"],
    "heal": ["--minutes", "0.02"],
}
"""What is added to a command so that it takes a moment."""

CHAT = "{% for message in messages %}{{ message.content }}{% endfor %}"


class Block(NamedTuple):
    """A fenced block of a page, and the line of the page that it begins on."""

    page: Path
    line: int
    kind: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_run(self) -> bool:
        first = self.text.partition("\n")[0]
        return not (first.startswith("#") and NOT_RUN in first)

    def commands(self) -> list[list[str]]:
        """The words of each command of a shell's block that is to be run."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if NOT_RUN not in line and (words := shlex.split(line, comments=True))]


def tokens(page: Path) -> list[Token]:
    return MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8"))


def blocks(page: Path) -> list[Block]:
    fences = [token for token in tokens(page) if token.type == "fence"]
    return [Block(page, (token.map or [0])[0] + 1, token.info, token.content) for token in fences]


def elsewhere(command: str) -> str | None:
    return next((test for start, test in ELSEWHERE.items() if command.startswith(start)), None)


def check_make(target: str) -> None:
    """CI makes it."""
    assert f"\n{target}:" in (ROOT / "Makefile").read_text()
    assert f"\nmake {target}\n" in (ROOT / ".ci" / "run").read_text()


def check_install(words: list[str]) -> None:
    """Extras are there, and the test environment has what else is asked for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words:
        name, _, extra = word.rstrip("]").partition("[")
        if name in (".", "cospadi"):
            assert not extra or extra in project["optional-dependencies"]
        else:
            assert word in project["optional-dependencies"]["dev"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_what_it_is(page: Path) -> None:
    """So that no command hides in a block that nothing looks at."""
    assert not [token.content for token in tokens(page) if token.type == "code_block"], "indented, not fenced"
    for block in blocks(page):
        assert block.kind in KINDS, f"{block.where} is a block of {block.kind or 'no kind'}"
        if block.kind == "text":
            assert not re.search(r"^(cospadi|python|pip|make|vllm|lm_eval) ", block.text, re.MULTILINE), block.where


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Files; that headings are there `make docs` checks."""
    children = [child for token in tokens(page) for child in token.children or []]
    for target in [str(child.attrGet("href") or child.attrGet("src") or "") for child in children]:
        if file := target.partition("#")[0]:
            assert ":" in file or (page.parent / file).exists(), f"{page.relative_to(ROOT)} links to {target}"


def named_commands(page: Path) -> list[list[str]]:
    """The words of each command of ours that a page names, those within a sentence too, as far as they are words."""
    children = [child for token in tokens(page) for child in token.children or []]
    lines = [child.content for child in children if child.type == "code_inline"]
    for block in blocks(page):
        lines += block.text.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        words = line.partition("#")[0].strip("` ").split()
        if len(words) > 1 and words[0] == "cospadi" and words[1][0].isalpha():
            found.append(words)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_that_a_page_names_are_there(page: Path) -> None:
    """Of those that run elsewhere, or not at all, too."""
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for words in named_commands(page):
        name = words[1].strip(",.:;")
        assert name in commands, f"{page.name}: {' '.join(words)}"
        if commands[name].context_settings.get("ignore_unknown_options"):
            continue  # another program's
        options = {
            option for parameter in commands[name].params for option in parameter.opts + parameter.secondary_opts
        }
        for word in words[2:]:
            if word.startswith("-") and word[1:2].isalpha() | word.startswith("--"):
                assert word.partition("=")[0].rstrip(",.])") in options | {"--help"}, f"{page.name}: {' '.join(words)}"


def test_what_runs_elsewhere_is_there() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8").replace('"', "") for page in PAGES)
    for start, test in ELSEWHERE.items():
        file, _, name = test.partition("::")
        assert f"\ndef {name}" in (ROOT / "tests" / file).read_text(encoding="utf-8"), test
        assert start in pages, f"no page says {start}"


@pytest.fixture
def stage(
    hub: Hub,
    make_model: Callable[..., Path],
    compressed_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A folder in which what the pages' commands name is there: models, texts, tasks; and the hub's."""
    folder = tmp_path / "stage"
    shutil.copytree(make_model(), folder / "MODEL")
    settings = json.loads((folder / "MODEL" / "tokenizer_config.json").read_text())
    (folder / "MODEL" / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHAT}))
    shutil.copytree(compressed_folder, folder / "llama-small")
    text = text_file.read_text(encoding="utf-8")
    (folder / "FILE").write_text(text, encoding="utf-8")
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": part}) for part in text.split(". ")))
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (folder / "my-tasks").mkdir()
    for name in ("piqa", "arc_easy", "local_piqa"):
        task = CHOOSE.format(name=name, file=folder / "questions.jsonl", before="")
        (folder / "my-tasks" / f"{name}.yaml").write_text(task)

    hub.user = "me"
    dense = {path.name: path.read_bytes() for path in (folder / "MODEL").iterdir()}
    hub.create("meta-llama/Llama-3.2-1B").commit(dense)
    hub.create("me/llama-small").commit({path.name: path.read_bytes() for path in compressed_folder.iterdir()}, "v1")

    def texts(_name: str, _recipe: Recipe) -> Any:
        return iter(text.split(". "))

    monkeypatch.setattr(documents, "_hub_documents", texts)
    job = cospadi.compress
    monkeypatch.setattr(
        cospadi, "compress", lambda model, recipe, output, **how: job(model, SHORT | recipe, output, **how)
    )
    monkeypatch.setattr("cospadi.recipe.REFINE", 1)
    monkeypatch.setattr(documents, "_builtin_text", lambda: [text])
    monkeypatch.setattr("cospadi.demo.model_path", lambda: folder / "MODEL")  # test_examples.py compresses the real one
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(block.kind in ("sh", "python") and block.is_run for block in blocks(page))],
    ids=lambda page: page.name,
)
def test_what_a_page_says_runs(
    page: Path, stage: Path, run: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block after the other, as a reader would."""
    names: dict[str, Any] = {}
    makes = re.findall(r"--output ([\w-]+)", page.read_text(encoding="utf-8"))
    for name in {"llama-small"}.intersection(makes):
        shutil.rmtree(stage / name)
    for block in blocks(page):
        if block.kind == "yaml" and (named := re.match(r"# (\S+)\n", block.text)):
            (stage / named[1]).write_text(block.text)
        if block.kind == "python" and block.is_run and not elsewhere(block.text):
            exec(compile(block.text, block.where, "exec"), names)
        if block.kind == "sh" and block.is_run:
            for words in block.commands():
                run_command(words, block.where, run, monkeypatch)


def run_command(words: list[str], where: str, run: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    if elsewhere(" ".join(words)):
        return
    match words:
        case ["pip", "install", *names]:
            check_install(names)
        case ["make", target]:
            check_make(target)
        case ["cospadi", command, *rest]:
            shutil.rmtree("DIR", ignore_errors=True)  # stands for a name of the reader's
            if "--tasks" in rest:
                use_own_tasks(monkeypatch)
            monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
            answer = run(command, *rest, *SHORTER.get(command, []))
            assert answer.code == 0, f"{where}: {shlex.join(words)}\n{answer.err}"
        case _:
            pytest.fail(f"{where}: nothing runs {shlex.join(words)}. Run it, or say in a comment: {NOT_RUN}")


def use_own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of the stage in the place of lm-eval's of these names, whose documents are at the hub."""
    pytest.importorskip("lm_eval.tasks", reason="lm-eval is not installed (extra `eval`)")
    from lm_eval.tasks import TaskManager

    from cospadi.commands import accuracy

    def manager(include_path: str | Path | None = None, **options: Any) -> Any:
        return TaskManager(include_path=str(include_path or "my-tasks"), include_defaults=False, **options)

    monkeypatch.setattr(accuracy, "TaskManager", manager)
