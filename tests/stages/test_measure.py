"""What groups are measured by: Gram matrices that outlive the groups before, whitenings that are not mixed up."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cospadi
from cospadi.calibration.grams import accumulate_grams, whiten
from cospadi.format.manifest import hash_files
from cospadi.jobs.ledger import JobDirectory, Ledger
from cospadi.jobs.pool import Engine
from cospadi.jobs.progress import Stages
from cospadi.model import load
from cospadi.recipe import Recipe
from cospadi.stages.measure import whitenings
from cospadi.stages.open import opened
from cospadi.stages.text import read_text

MIXED = {"share": "layers:2", "exclude": ["*.1.*k_proj"]}
"""Queries of blocks 0 and 1 in one group, which ends in block 1, and keys, which read the same, in block 0."""


@pytest.fixture
def recipe(text_file: Path) -> dict[str, Any]:
    """All stages of the default recipe, as short as they can be."""
    fields: dict[str, Any] = {"ratio": 0.3, "iterations": 2, "rho": 2.2, "gradient_sequences": 1, "budget_iterations": 1}
    return fields | MIXED | {"calibration": str(text_file), "sequences": 4, "length": 32}


@pytest.fixture
def folder(make_llama: Callable[..., Path]) -> Path:
    return make_llama(num_hidden_layers=2)


def measured(folder: Path, recipe: dict[str, Any], ledger: Ledger, cache_bytes: int, keep_grams: bool) -> list[Any]:
    """(first member, last block, L) of each group as it is measured."""
    with opened(
        folder, Recipe.build(recipe), None, Stages(), Engine(), ledger, cache_bytes, keep_grams=keep_grams
    ) as job:
        read_text(job)
        return [
            (job.inputs(group), found.whitenings[job.inputs(group)].factor, job.sequences)
            for found in whitenings(job, job.uniform.groups)
            for group in found.groups
        ]


def test_a_gram_stays_until_no_later_group_reads_it(folder: Path, recipe: dict[str, Any]) -> None:
    """Against the Gram matrices of the model run whole."""
    found = measured(folder, recipe, Ledger(), 0, False)
    assert {len(inputs) for inputs, _, _ in found} == {1, 2}
    model = load.load_model(folder, torch.device("cpu"))
    for inputs, factor, sequences in found:
        grams = accumulate_grams(model, inputs, sequences, 4)
        expected = whiten(sum(grams.values(), torch.zeros(())) / len(inputs), sequences.numel(), 1e-6)
        assert isinstance(expected.factor, Tensor)
        torch.testing.assert_close(factor, expected.factor, rtol=1e-4, atol=1e-4)


def test_kept_whitenings_are_those_of_their_own_groups(folder: Path, recipe: dict[str, Any], tmp_path: Path) -> None:
    ledger = JobDirectory(tmp_path / "kept.work")
    ledger.begin({}, {})
    first = measured(folder, recipe, ledger, 0, True)
    again = measured(folder, recipe, ledger, 0, True)
    ledger.close()
    assert all(ledger.get("whitening/" + "+".join(inputs)) for inputs, _, _ in first)
    for (inputs, factor, _), (same, kept, _) in zip(first, again, strict=True):
        assert inputs == same
        assert torch.equal(factor, kept)


def test_groups_that_end_apart_are_compressed_and_the_same_with_kept_grams(
    folder: Path, recipe: dict[str, Any], tmp_path: Path
) -> None:
    cospadi.compress(folder, recipe, tmp_path / "plain")
    cospadi.compress(folder, recipe, tmp_path / "kept", cache_bytes=0, keep_grams=True)
    assert hash_files(tmp_path / "plain") == hash_files(tmp_path / "kept")


def test_the_length_of_short_runs_is_part_of_the_job(folder: Path, recipe: dict[str, Any], tmp_path: Path) -> None:
    """Other short runs are another job, and another manifest; the usual length goes without saying."""
    usual = Recipe.build({})
    assert "budget_iterations" not in usual.model_dump(mode="json")
    assert Recipe.build(budget_iterations=3).model_dump(mode="json")["budget_iterations"] == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["cospadi.compress"], "finish", _stop)
        with pytest.raises(KeyboardInterrupt):
            cospadi.compress(folder, recipe, tmp_path / "out")
    with pytest.raises(cospadi.UserError, match="budget iterations 1, not 2"):
        cospadi.compress(folder, recipe | {"budget_iterations": 2}, tmp_path / "out")


def _stop(*_: object) -> None:
    raise KeyboardInterrupt
