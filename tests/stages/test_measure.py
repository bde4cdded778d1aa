"""What groups are measured by: Gram matrices that stay until no later group reads them, whitenings that are not mixed
up, each on the dense model or on the one that is compressed so far."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs import inputs_of
from torch import Tensor

import cospadi
from cospadi.calibration.grams import IDENTITY, Whitening, accumulate_grams, whiten
from cospadi.calibration.walk import DAMPING
from cospadi.format.manifest import hash_files
from cospadi.jobs.ledger import Ledger
from cospadi.jobs.pool import Engine
from cospadi.jobs.progress import Stages
from cospadi.model import load
from cospadi.recipe import Recipe
from cospadi.stages.measure import Block, WalkedBlock, blocks_to_solve
from cospadi.stages.open import opened
from cospadi.stages.text import read_text

MIXED = {"share": "layers:2", "exclude": ["*.1.*k_proj"]}
"""Queries of blocks 0 and 1 in one group, which ends in block 1, and keys, which read the same, in block 0."""


@pytest.fixture
def recipe(text_file: Path) -> dict[str, Any]:
    """All stages of the default recipe, as short as they can be."""
    fields: dict[str, Any] = {"ratio": 0.3, "iterations": 2, "gradient_sequences": 1, "refine": 2}
    return fields | {"calibration": str(text_file), "sequences": 4, "length": 32}


@pytest.fixture
def mixed(recipe: dict[str, Any]) -> dict[str, Any]:
    return recipe | MIXED | {"refine": 0}


@pytest.fixture
def folder(make_llama: Callable[..., Path]) -> Path:
    return make_llama(num_hidden_layers=2)


Measured = list[tuple[tuple[str, ...], Whitening, Tensor]]


def measured(folder: Path, recipe: dict[str, Any], cache_bytes: int = 0) -> tuple[Measured, Tensor, Tensor | None]:
    """Inputs, whitening and weight of each group as it is measured, the dense weights side by side, and the text."""
    with opened(folder, Recipe.build(recipe), None, Stages(), Engine(), Ledger(), cache_bytes) as job:
        read_text(job)
        groups = job.uniform.groups
        found, dense = [], []
        for block in blocks_to_solve(job, groups, groups):
            assert isinstance(block, WalkedBlock if job.walks else Block)
            for some in block.sets:
                for group, whitening, weight in block.measure(some):
                    found.append((job.inputs(group), whitening, weight.double()))
                    dense.append(job.weight(group).double().flatten())
        assert len(found) == len(groups)
        return found, torch.cat(dense), job.sequences


def check_grams(folder: Path, found: Measured, sequences: Tensor) -> None:
    """Against the Gram matrices of the dense model run whole."""
    model = load.load_model(folder, torch.device("cpu"))
    for inputs, whitening, _ in found:
        grams = accumulate_grams(model, inputs, sequences, 4)
        expected = whiten(sum(grams.values(), torch.zeros(())) / len(inputs), sequences.numel(), 1e-6)
        assert isinstance(expected.factor, Tensor)
        torch.testing.assert_close(whitening.gram, expected.gram, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(whitening.factor, expected.factor, rtol=1e-4, atol=1e-4)
        assert whitening.scale == sequences.numel() ** 0.5


def test_a_gram_stays_until_no_later_group_reads_it(folder: Path, mixed: dict[str, Any]) -> None:
    found, dense, sequences = measured(folder, mixed)
    assert {len(inputs) for inputs, _, _ in found} == {1, 2}
    assert torch.equal(torch.cat([weight.flatten() for _, _, weight in found]), dense)
    assert sequences is not None
    check_grams(folder, found, sequences)


def test_a_walk_without_compensation_measures_the_dense_model(folder: Path, recipe: dict[str, Any]) -> None:
    """Refined blocks are for what comes after them; Grams and weights are those of the dense model."""
    found, dense, sequences = measured(folder, recipe)
    assert torch.equal(torch.cat([weight.flatten() for _, _, weight in found]), dense)
    assert sequences is not None
    check_grams(folder, found, sequences)


def test_with_compensation_nothing_is_corrected_before_anything_was_compressed(
    folder: Path, recipe: dict[str, Any]
) -> None:
    """Nothing was swapped in: both streams are of the dense model, and W' = W."""
    found, dense, sequences = measured(folder, recipe | {"compensate": True})
    torch.testing.assert_close(torch.cat([weight.flatten() for _, _, weight in found]), dense, rtol=1e-4, atol=1e-4)
    assert sequences is not None
    check_grams(folder, found, sequences)


@pytest.mark.parametrize("refine", [0, 2])
def test_weights_make_up_for_what_the_first_of_the_text_shows(
    make_llama: Callable[..., Path], recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, refine: int
) -> None:
    """Against least squares on the inputs that two whole models have on it. Grams are half that of this text in the
    compressed model, half that of all of it in the dense one."""
    monkeypatch.setattr("cospadi.stages.measure.PAIRED_TOKENS", 33)  # two batches of a sequence
    recipe |= {"compensate": True, "refine": refine, "batch_size": 1, "metric": "output"}
    folder = make_llama(num_hidden_layers=2)
    dense, damaged = (load.load_model(folder, torch.device("cpu")) for _ in range(2))
    with opened(folder, Recipe.build(recipe), None, Stages(), Engine(), Ledger(), 0) as job:
        read_text(job)
        assert job.sequences is not None
        for block in blocks_to_solve(job, job.uniform.groups, job.uniform.groups):
            assert isinstance(block, WalkedBlock)
            for some in block.sets:
                for group, whitening, weight in block.measure(some):
                    (reader,) = job.inputs(group)
                    x, y = (inputs_of(model, reader, job.sequences[:2]) for model in (dense, damaged))
                    pull = DAMPING * (y.T @ y).diagonal().mean()
                    rows = torch.cat([y, pull.sqrt() * torch.eye(y.shape[1])])
                    plain = job.weight(group).double()
                    wanted = torch.cat([x @ plain, pull.sqrt() * plain])
                    expected = torch.linalg.lstsq(rows, wanted).solution
                    torch.testing.assert_close(weight.double(), expected, rtol=1e-3, atol=1e-4)
                    x = inputs_of(dense, reader, job.sequences)
                    gram = (x.T @ x + y.T @ y * (len(x) / len(y))) / 2
                    torch.testing.assert_close(whitening.gram, gram, rtol=1e-4, atol=1e-4)
                for member in (member for group in some for member in group.members):
                    coarse = 0.05 * (dense.get_submodule(member.name).weight.data / 0.05).round()
                    damaged.get_submodule(member.name).weight.data.copy_(coarse)
                    block.swap_in({member.name: coarse})


def test_without_text_nothing_is_whitened(folder: Path, mixed: dict[str, Any]) -> None:
    found, _, sequences = measured(folder, mixed | {"metric": "weights"})
    assert sequences is None
    assert all(whitening is IDENTITY for _, whitening, _ in found)


def test_a_model_that_runs_whole_is_measured_the_same(
    folder: Path, mixed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_block, _, _ = measured(folder, mixed)
    monkeypatch.setattr("cospadi.stages.text.learn_calls", lambda *_: None)
    for cache_bytes in (0, 10**9):  # a pass for each block, one for all
        whole, _, sequences = measured(folder, mixed, cache_bytes)
        assert [inputs for inputs, _, _ in whole] == [inputs for inputs, _, _ in by_block]
        assert sequences is not None
        check_grams(folder, whole, sequences)


def test_groups_that_end_apart_are_compressed_wherever_states_wait(
    folder: Path, mixed: dict[str, Any], tmp_path: Path
) -> None:
    cospadi.compress(folder, mixed, tmp_path / "memory")
    cospadi.compress(folder, mixed, tmp_path / "disk", cache_bytes=0)
    assert hash_files(tmp_path / "memory") == hash_files(tmp_path / "disk")


def test_a_factor_is_made_only_for_who_asks(
    folder: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights themselves are solved from G: a Cholesky factor of each would be for nothing."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("factored")

    monkeypatch.setattr("cospadi.calibration.grams._cholesky", refuse)
    cospadi.compress(folder, recipe | {"metric": "output"})
    with pytest.raises(AssertionError, match="factored"):
        cospadi.compress(folder, recipe | {"metric": "output", "solver": "ksvd"})
