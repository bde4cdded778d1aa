"""The model card: what it takes over from the source's, what it says of the job, what is measured later."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Answer
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

import cospadi
from cospadi.format import card
from cospadi.format.card import PLACE

FREE: dict[str, Any] = {"metric": "weights", "iterations": 1, "ratio": 0.3}
TOLD = {
    "license": "other",
    "license_name": "llama3.2",
    "license_link": "LICENSE",
    "language": ["en", "zh"],
    "datasets": ["bob/text"],
    "pipeline_tag": "image-text-to-text",
}


@pytest.fixture
def compressed(dense_folder: Path, tmp_path: Path) -> Callable[..., str]:
    """The card that compressing a model with some README gives."""

    def compress(readme: str | bytes, **more: Any) -> str:
        source = Path(shutil.copytree(dense_folder, tmp_path / "source", dirs_exist_ok=True))
        (source / "README.md").write_bytes(readme if isinstance(readme, bytes) else readme.encode())
        cospadi.compress(source, FREE | more, tmp_path / "out", overwrite=True)
        return (tmp_path / "out" / "README.md").read_text(encoding="utf-8")

    return compress


@pytest.fixture
def copied(compressed_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compressed_folder, tmp_path / "copied"))


def test_what_the_source_says_of_licence_and_language_is_taken_over(compressed: Callable[..., str]) -> None:
    said = TOLD | {"tags": ["chat", "cospadi"], "base_model": ["bob/base", "/home/bob/other"], "model-index": 5}
    data = ModelCard(compressed(f"---\n{yaml.safe_dump(said)}---\n# Anything\n")).data.to_dict()
    assert {name: data[name] for name in TOLD} == TOLD
    assert data["tags"] == ["chat", "cospadi", "compressed", "arxiv:2509.22075"]
    assert (data["base_model"], data["base_model_relation"]) == ("bob/base", "quantized")
    assert data["library_name"] == "transformers"


@pytest.mark.parametrize(
    "readme",
    [
        "---\nlicense: [mit\n---\n# Broken",
        "---\n- a\n- list\n---\n",
        b"---\nlicense: caf\xe9\n---\n",
        "---\n1: 2\n---\n",
    ],
)
def test_metadata_that_cannot_be_read_is_told_of_and_stops_nothing(
    readme: str | bytes, compressed: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    data = ModelCard(compressed(readme)).data.to_dict()
    assert "license" not in data
    assert data["pipeline_tag"] == "text-generation"
    assert "README.md: its metadata cannot be read, and no licence is taken over" in caplog.text


def test_metadata_of_other_kinds_than_text_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "README.md").write_text(
        "---\nlanguage: [en, no]\nlicense: {a: b}\ndatasets: x\nbase_model: ./here\n---\n"
    )
    assert card.metadata(tmp_path / "README.md") == {"datasets": "x"}
    assert "its language is no text" in caplog.text
    assert "its license is no text" in caplog.text
    (tmp_path / "README.md").write_text("No metadata.\n---\n")
    assert card.metadata(tmp_path / "README.md") == {}


def test_it_says_how_it_was_made_without_a_path_of_this_machine(
    compressed: Callable[..., str], text_file: Path, tmp_path: Path, default: dict[str, Any]
) -> None:
    odd = tmp_path / "wörds `a|b`\n\udcff.txt"
    odd.write_bytes(text_file.read_bytes())
    asked = default | {"calibration": str(odd), "exclude": ["*.k_proj"], "iterations": None}
    text = compressed("# No metadata\n", **asked)
    assert str(tmp_path) not in text
    (command,) = [line for line in text.splitlines() if line.startswith("cospadi compress ")]
    assert command.startswith("cospadi compress MODEL --ratio 0.3 --metric two-sided")
    assert "--exclude '*.k_proj' --calibration 'wörds `a|b`\\n\\udcff.txt' --sequences 8" in command
    assert "wörds \\`a\\|b\\`\\\\n\\\\udcff.txt, 8 sequences of 32 tokens" in text
    parts = [
        line.split(" | ")[0] for line in text.partition("## Size")[2].splitlines() if re.search(r"(B|bytes) \|$", line)
    ]
    assert parts[:2] == ["| q_proj, 2 projections", "| v_proj, 2 projections"]
    assert {"| these projections together", "| embed_tokens", "| lm_head"} <= set(parts)
    assert parts[-1] == "| whole checkpoint"


def test_what_is_measured_is_written_beside_its_command(
    copied: Path, dense_folder: Path, text_file: Path, run: Callable[..., Answer], tmp_path: Path
) -> None:
    before = (copied / "README.md").read_text()
    odd = tmp_path / "held|out.txt"
    odd.write_bytes(text_file.read_bytes()[:400])
    words = ["eval", copied, "--text", odd, "--length", "32", "--card"]
    told = json.loads(run(*words, "--against", dense_folder, "--kl", "--json").out)
    assert run(*words).code == 0
    once = (copied / "README.md").read_text()
    answer = run(*words)
    assert answer.code == 0, answer.err
    assert f"Written to {copied / 'README.md'}." in answer.out
    text = (copied / "README.md").read_text()
    assert text == once
    assert text.startswith(before.rstrip())
    assert text.count("\n## Measured\n") == 1
    assert f"cospadi eval {PLACE} --text 'held|out.txt' --against {dense_folder.name} --kl --length 32\n" in text
    assert f"cospadi eval {PLACE} --text 'held|out.txt' --length 32\n" in text
    mine, dense = (one["perplexity"] for one in told["models"])
    assert f"windows of 32 tokens | {mine:.4f} | {dense:.4f} |" in text
    assert f"{told['kl_divergence']:.5f}" in text
    assert str(tmp_path) not in text
    assert card.without_measured(text) == before.rstrip() + "\n"


def test_what_was_measured_goes_with_the_weights_and_leaves_with_them(copied: Path, tmp_path: Path) -> None:
    measured = card.with_measured((copied / "README.md").read_text(), "cospadi eval X", "| a | 1 |")
    (copied / "README.md").write_text(measured)
    model = AutoModelForCausalLM.from_pretrained(copied)
    model.save_pretrained(tmp_path / "same")
    assert (tmp_path / "same" / "README.md").read_text() == measured
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    for name in ("changed", "same"):
        model.save_pretrained(tmp_path / name)
        assert (tmp_path / name / "README.md").read_text() == card.without_measured(measured)
    (tmp_path / "changed" / "README.md").write_text("My own card.")
    model.save_pretrained(tmp_path / "changed")
    assert (tmp_path / "changed" / "README.md").read_text() == "My own card."


def test_measurements_stand_in_their_section_whatever_is_around_it() -> None:
    def asked(name: str) -> list[str]:
        return ["```", f"cospadi eval {name}", "```"]

    text = "# A\n\n## Measured\n\nBy me:\n\n```\ncospadi eval a\n```\n\n| 1 |\n\n## More\n\nwords\n"
    for name, found in (("cospadi eval b", "| 2 |"), ("cospadi eval a", "| 3 |"), ("cospadi eval b", "| 4 |")):
        text = card.with_measured(text, name, found)
    sections = text.split("## ")
    assert [part.partition("\n")[0] for part in sections[1:]] == ["Measured", "More"]
    assert re.findall("^[|`c].*", sections[1], re.M) == [*asked("a"), "| 3 |", *asked("b"), "| 4 |"]
    assert card.with_measured("", "cospadi eval c", "| 1 |").startswith("## Measured\n\n```\ncospadi eval c\n")


def test_a_card_that_cannot_be_written_is_told_before_anything_is_measured(
    copied: Path, text_file: Path, run: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cospadi.commands.evaluate.evaluate_models", lambda *_, **__: 1 / 0)
    (copied / "README.md").unlink()
    answer = run("eval", copied, "--text", text_file, "--card")
    assert answer.code == 2
    assert f"{copied} has no card that `cospadi compress` wrote (README.md beside cospadi.json)" in answer.err
    assert "--card writes into a folder's README.md" in run("eval", "demo", "--text", text_file, "--card").err
