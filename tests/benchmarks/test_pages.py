"""The long tables of docs/ are what the benchmarks' commands write from the committed raw results."""

from __future__ import annotations

import pytest
import torch

from cospadi.calibration.grams import Whitening
from scripts import ROOT, script


@pytest.mark.parametrize(("name", "page"), [("linear", "projections"), ("solve", "solvers")])
def test_pages_of_performance(name: str, page: str) -> None:
    assert script(name).page() == (ROOT / "docs" / "performance" / f"{page}.md").read_text(encoding="utf-8")


def test_pages_and_summary_of_results() -> None:
    quality = script("quality")
    assert quality.pages() == {
        page.stem: page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "results").glob("*.md")
    }
    summary = "\n".join(quality.summary_lines())
    assert summary in (ROOT / "README.md").read_text(encoding="utf-8")
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert summary in results
    assert "\n".join(quality.divergence_lines()) in results
    assert "\n".join(quality.bits_lines()) in results
    assert "\n".join(quality.integer_lines()) in results


def test_page_and_summary_of_a_real_model() -> None:
    zeroshot = script("zeroshot")
    assert zeroshot.page() == (ROOT / "docs" / "smollm2.md").read_text(encoding="utf-8")
    assert "\n".join(zeroshot.summary_lines()) in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["svd-llm-gptq", "paper-gptq"])
def test_factors_in_few_bits_take_what_they_are_given_and_say_their_error(name: str) -> None:
    quality, generator = script("quality"), torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 64, generator=generator, dtype=torch.float64) @ torch.randn(64, 64, dtype=torch.float64)
    weight, whitening = torch.randn(64, 96, generator=generator), Whitening(inputs.T @ inputs, 300)
    errors = []
    for nbytes in (2500, 4500):
        found = quality.FORMLESS[name](weight, whitening, nbytes)
        assert 0.85 * nbytes < found.nbytes <= nbytes
        missed = inputs @ (weight.double() - found.weight.double())
        expected = float(missed.norm() / (inputs @ weight.double()).norm())
        assert found.error == pytest.approx(expected, rel=1e-6)
        errors.append(found.error)
    assert errors[1] < errors[0] < 1


def test_page_of_healing() -> None:
    heal = script("heal")
    assert heal.page_of(heal.rows()) == (ROOT / "docs" / "healing-rows.md").read_text(encoding="utf-8")
