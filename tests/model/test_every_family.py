"""Every family of causal decoders goes through the main job, or is refused; the page that says so is true."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_families import FAMILIES

from scripts import ROOT, script

PAGE = ROOT / "docs" / "families.md"

REPRESENTATIVES = {
    "llama": "plain",
    "bloom": "blocks that also give what nobody reads; positions of their own",
    "falcon": "a subclass of nn.Linear, fused queries, keys and values",
    "opt": "absolute positions, a decoder inside a decoder",
    "mamba2": "a state space",
    "jamba": "attention, state space and experts; weights used outside of their modules",
    "zamba2": "blocks that share weights",
    "gemma4_text": "blocks that read from others",
    "gpt_oss": "experts stacked the other way round, with biases, interleaved",
    "nemotron_h": "experts without gates",
    "gpt_bigcode": "a class whose initialisation touches layers",
    "qwen3_5": "images beside text, linear attention",
    "mllama": "images beside text, blocks that text does not run",
    "gpt2": "refused",
}


def check(family: str, scratch: Path) -> None:
    works, note = script("families").attempt(family, scratch)
    row = f"| {family} | {'yes' if works else 'no'} | {note} |"
    assert row in PAGE.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_representatives(family: str, tmp_path: Path) -> None:
    check(family, tmp_path)


@pytest.mark.families
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - REPRESENTATIVES.keys()))
def test_every_other_family(family: str, tmp_path: Path) -> None:
    check(family, tmp_path)
