"""What the manifest says that errors cost in the loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import with_solver

import cospadi
from cospadi.budget.plan import free_group
from cospadi.calibration.grams import Whitening
from cospadi.format.form import Form
from cospadi.model.projections import Projection
from cospadi.recipe import Recipe
from cospadi.stages.solve import GroupProblem, dense_weights, factorize

RECIPE = Recipe.build(solver="htp", metric="two-sided", iterations=2, refine=0).settled()


@pytest.mark.parametrize("full", [False, True])
def test_the_price_of_an_error_is_half_the_gradients_squares_times_its_own(full: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 12, generator=generator, dtype=torch.float64)
    weight = torch.randn(12, 24, generator=generator)
    gradients = torch.randn(200, 24, generator=generator, dtype=torch.float64) * torch.logspace(-2, 0, 24)
    gamma = gradients.T @ gradients / 200
    blocks = [gamma[:16, :16], gamma[16:, 16:]]
    costs = tuple(block.float() if full else block.diagonal().float() for block in blocks)
    members = (Projection("a", 0, "a", 12, 16), Projection("b", 0, "b", 12, 8))
    group = free_group(members, Form("identity", "mask", "bf16"), 12, 144)
    given = GroupProblem(RECIPE, group, Whitening(x.T @ x, 50), weight, costs, torch.device("cpu"))
    packed = factorize(given, lambda *_: None)
    found = dense_weights(packed)
    for name, columns in (("a", slice(16)), ("b", slice(16, 24))):
        w, squares = weight[:, columns].double().numpy(), np.square(gradients.numpy()[:, columns]).mean(0)
        moved = x.numpy() @ (w - found[name].T.double().numpy())
        error = 0.5 * (np.square(moved).mean(0) * squares).sum()
        assert packed.losses[name]["of_error"] == pytest.approx(error, rel=1e-5)
        assert packed.losses[name]["of_all"] == pytest.approx(
            0.5 * (np.square(x.numpy() @ w).mean(0) * squares).sum(), rel=1e-5
        )
        assert 0 < packed.losses[name]["of_error"] < packed.losses[name]["of_all"]


@pytest.mark.parametrize(("solver", "metric"), [("htp", "fisher"), ("trellis", "fisher"), ("mod-htp", "fisher")])
def test_the_manifest_holds_it_where_gradients_were_taken(
    solver: str, metric: str, dense_folder: Path, default: dict[str, Any], tmp_path: Path
) -> None:
    recipe = default | with_solver(default, solver) | {"metric": metric, "refine": 0, "compensate": False}
    cospadi.compress(dense_folder, recipe, tmp_path / "out")
    projections = json.loads((tmp_path / "out" / "cospadi.json").read_text())["projections"]
    assert len(projections) == 14
    for entry in projections.values():
        assert 0 < entry["loss"]["of_error"] < entry["loss"]["of_all"]


def test_without_gradients_there_is_none(compressed_folder: Path) -> None:
    projections = json.loads((compressed_folder / "cospadi.json").read_text())["projections"]
    assert not any("loss" in entry for entry in projections.values())


def test_it_goes_with_the_weights_that_it_is_of(dense_folder: Path, default: dict[str, Any], tmp_path: Path) -> None:
    result = cospadi.compress(dense_folder, default | {"refine": 0, "allocate": "uniform"}, tmp_path / "out")
    name = "model.layers.1.mlp.down_proj"
    result.model.get_submodule(name).unpack_values()
    with torch.no_grad():
        result.model.get_submodule(name).values.mul_(2)
    result.model.save_pretrained(tmp_path / "changed")
    projections = json.loads((tmp_path / "changed" / "cospadi.json").read_text())["projections"]
    assert [one for one, entry in projections.items() if "loss" not in entry] == [name]


def test_what_no_recipe_compresses_is_told(dense_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("cospadi.stages.open.what_stays_dense", lambda *_: ["experts stay dense: model.layers.*.moe"])
    recipe = {"metric": "weights", "iterations": 1}
    result = cospadi.compress(dense_folder, recipe, tmp_path / "out")
    assert result.manifest["stays_dense"] == ["experts stay dense: model.layers.*.moe"]
