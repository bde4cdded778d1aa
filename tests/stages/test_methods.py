"""Named recipes: each from its name to a checkpoint that loads, at equal bytes; and fields that rule each other out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Answer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import cospadi
from cospadi.calibration.loss import mean_loss
from cospadi.commands import evaluate
from cospadi.format import schema, verify
from cospadi.recipe import METHODS, Recipe
from cospadi.runtime.layer import CompressedLinear
from cospadi.solvers import SOLVERS, find_solver


@pytest.fixture
def text(text_file: Path) -> dict[str, Any]:
    """A short job of any method."""
    fields: dict[str, Any] = {"ratio": 0.3, "iterations": 2, "gradient_sequences": 1}
    return fields | {"calibration": str(text_file), "sequences": 4, "length": 32}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_from_its_name_to_a_model_that_loads(
    method: str, dense_folder: Path, text: dict[str, Any], prompt: Tensor, tmp_path: Path
) -> None:
    some: dict[str, dict[str, Any]] = {"sparse": {"refine": 2}, "coded": {"ratio": 0.7}}
    some |= {name: {"ratio": 0.46} for name in ("rtn", "gptq")}  # eight bits, the most that they have
    short = some.get(method, {})
    result = cospadi.compress(dense_folder, text | short | {"method": method}, tmp_path / "out")
    assert verify.verify(tmp_path / "out") > 0
    asked = short.get("ratio", 0.3)
    assert asked <= result.plan.ratio < asked + 0.05
    model = cospadi.load(tmp_path / "out", "cpu")
    with torch.no_grad():
        found = model(input_ids=prompt).logits
    assert torch.isfinite(found).all()
    assert torch.equal(found, result.model(input_ids=prompt).logits)
    assert result.manifest["recipe"]["method"] == method
    told = result.manifest["recipe"] | {"calibration": text["calibration"]}
    assert Recipe.build(told) == Recipe.build(text | short | {"method": method})
    solver = find_solver(Recipe.build(method=method).solver)
    entries = schema.read_config(tmp_path / "out")
    assert {entry.dictionary for entry in entries.values()} == {solver.dictionary}
    assert {entry.support for entry in entries.values()} == {solver.support}
    assert set(result.seconds) >= {"solve", "write"}
    assert ("refine" in result.seconds) == (method == "sparse")
    assert ("gradients" in result.seconds) == (method in ("sparse", "coded", "mod-htp"))


def test_what_a_method_sets_gives_way_to_what_is_asked_for() -> None:
    recipe = Recipe.build(method="paper", iterations=5, metric="fisher")
    assert (recipe.solver, recipe.metric, recipe.share) == ("ksvd", "fisher", "none")
    assert (recipe.iterations, recipe.refine, recipe.compensate) == (5, 0, False)
    other = Recipe.build(recipe, method="wanda")
    assert (other.solver, other.metric, other.iterations) == ("wanda", "fisher", 5)
    assert Recipe.build(Recipe.build(method="paper"), method="sparse") == Recipe.build(method="sparse")
    assert Recipe.build(Recipe.build(method="paper"), ratio=0.4).solver == "ksvd"


@pytest.mark.parametrize("method", METHODS)
def test_a_method_survives_a_file_and_being_settled(method: str, tmp_path: Path) -> None:
    recipe = Recipe.build(method=method)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.build(tmp_path / "recipe.yaml") == recipe
    settled = recipe.settled()
    assert settled.settled() == settled
    assert None not in (settled.metric, settled.allocate, settled.iterations, settled.refine, settled.compensate)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ("fisher", "pooled", False, 128, 12)),
        ({"refine": 0}, ("two-sided", "pooled", True, 0, 12)),
        ({"compensate": True}, ("fisher", "pooled", True, 128, 12)),
        ({"metric": "output"}, ("output", "uniform", False, 128, 12)),
        ({"metric": "fisher"}, ("fisher", "pooled", False, 128, 12)),
        ({"metric": "weights"}, ("weights", "uniform", False, 0, 12)),
        ({"share": "layers:2"}, ("two-sided", "pooled", False, 0, 12)),
        ({"solver": "mod-htp"}, ("fisher", "uniform", False, 128, 60)),
        ({"solver": "ksvd", "accounting": "eq10"}, ("fisher", "uniform", False, 128, 60)),
        ({"solver": "svd"}, ("weights", "uniform", False, 0, 60)),
        ({"solver": "alps"}, ("output", "uniform", False, 128, 300)),
        ({"method": "compot"}, ("output", "uniform", False, 0, 20)),
        ({"method": "gptq"}, ("output", "uniform", False, 0, 1)),
        ({"method": "gptq", "compensate": True}, ("output", "uniform", True, 0, 1)),
        ({"method": "rtn"}, ("weights", "uniform", False, 0, 1)),
        ({"solver": "gptq"}, ("output", "uniform", True, 0, 1)),
    ],
    ids=str,
)
def test_what_an_unset_field_becomes(fields: dict[str, Any], expected: tuple[object, ...]) -> None:
    settled = Recipe.build(fields).settled()
    found = (settled.metric, settled.allocate, settled.compensate, settled.refine, settled.iterations)
    assert found == expected


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"method": "magic"}, r"method magic is not known. Use one of sparse, coded, paper, mod-htp, compot, rocket"),
        (
            {"solver": "svd", "metric": "output"},
            "solver svd does not measure errors in metric output. Use --metric wei",
        ),
        ({"solver": "mod-htp", "metric": "two-sided"}, "in metric two-sided. Use --metric fisher or output or weights"),
        ({"solver": "wanda", "metric": "weights"}, "does not measure errors in metric weights. Use --metric output"),
        ({"solver": "mod-htp", "allocate": "pooled"}, "pooled is not possible: solver mod-htp stores D"),
        ({"metric": "output", "allocate": "pooled"}, "pooled is not possible: metric output takes no gradients"),
        ({"solver": "ksvd", "accounting": "eq10", "allocate": "pooled"}, "allocate pooled spreads real bytes"),
        ({"metric": "weights", "refine": 3}, "refine is not possible: there is no text. Use --refine 0"),
        ({"method": "gptq", "refine": 3}, "refine is not possible: levels stay as they were solved. Use --refine 0"),
        ({"method": "gptq", "allocate": "pooled"}, "pooled is not possible: metric output takes no gradients"),
        ({"method": "rtn", "metric": "output"}, "does not measure errors in metric output. Use --metric weights"),
        ({"share": "layers:2", "refine": 3}, "refine is not possible: groups span several blocks"),
        ({"metric": "weights", "compensate": True}, "compensate is not possible: there is no text"),
        ({"refine": -1}, "refine"),
        ({"metric": "cosine"}, "metric"),
        ({"allocate": "knapsack"}, "allocate"),
        *[({name: True}, f"unknown field '{name}'") for name in ("data_free", "weight_columns", "budget_iterations")],
        *[({"accounting": name}, "solver htp stores none") for name in ("eq10", "eq11")],
    ],
    ids=str,
)
def test_fields_that_rule_each_other_out(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(cospadi.UserError, match=sentence):
        Recipe.build(fields).settled()


def test_a_method_on_the_command_line(dense_folder: Path, run: Callable[..., Answer], tmp_path: Path) -> None:
    answer = run("compress", dense_folder, "-o", tmp_path / "out", "--method", "magnitude", "--ratio", "0.3")
    assert answer.code == 0, answer.err
    dense, entries = load_file(dense_folder / "model.safetensors"), schema.read_config(tmp_path / "out")
    model = cospadi.load(tmp_path / "out", "cpu")
    for name, entry in entries.items():  # the largest magnitudes of each projection, rounded to 14 bits
        weight, kept = dense[f"{name}.weight"].float(), model.get_submodule(name).dense_weight()
        assert int((kept != 0).sum()) == entry.nnz
        assert float(weight[kept == 0].abs().max()) <= float(weight[kept != 0].abs().min())
        torch.testing.assert_close(kept[kept != 0], weight[kept != 0], rtol=2**-5, atol=0)


@pytest.fixture(scope="module")
def stories() -> dict[str, Any]:
    return {"ratio": 0.3, "sequences": 16, "length": 256, "gradient_sequences": 4, "iterations": 8, "refine": 8}


def test_stories260k_without_dictionaries(
    shared_model: Callable[[str], Path], stories: dict[str, Any], tmp_path: Path
) -> None:
    """From text to tokens: equal to a dense model with the decoded weights put in, and better than the rules."""
    folder = shared_model("stories260k")
    data = folder.parent.parent / "data"
    text = {"calibration": str(data / "stories_calibration.jsonl")}
    result = cospadi.compress(folder, stories | text, tmp_path / "out")
    assert 0.3 <= result.plan.ratio < 0.301
    assert verify.verify(tmp_path / "out") > 0
    entries = schema.read_config(tmp_path / "out")
    assert {(entry.dictionary, entry.support, entry.values) for entry in entries.values()} == {
        ("identity", "mask", "f14")
    }
    assert not any(name.endswith("dictionary") for name in load_file(tmp_path / "out" / "model.safetensors"))

    model: Any = cospadi.load(tmp_path / "out", "cpu")
    plain: Any = AutoModelForCausalLM.from_pretrained(folder)
    for name, layer in model.named_modules():
        if isinstance(layer, CompressedLinear):
            weight = layer.dense_weight()
            assert int((weight != 0).sum()) <= entries[name].nnz < weight.numel()
            plain.get_submodule(name).weight.data = weight.to(plain.dtype)
    tokens = torch.randint(3, plain.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, rtol=1e-3, atol=1e-3)
    ids = tokens[:1, :6]
    found = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(found, plain.generate(ids, max_new_tokens=12, do_sample=False))

    from transformers import AutoTokenizer

    held_out = evaluate.text_windows(
        AutoTokenizer.from_pretrained(folder), [(data / "stories_heldout.txt").read_text()], 512
    )[:12]
    losses = {
        "ours": mean_loss(model, held_out),
        "dense": mean_loss(AutoModelForCausalLM.from_pretrained(folder), held_out),
    }
    for method in ("magnitude", "wanda"):
        rule = {"method": method, "ratio": 0.3, "sequences": 16, "length": 256} | text
        losses[method] = mean_loss(cospadi.compress(folder, rule, tmp_path / method).model, held_out)
    assert losses["dense"] < losses["ours"] < min(losses["magnitude"], losses["wanda"])
    assert losses["ours"] - losses["dense"] < 0.5 * (min(losses["magnitude"], losses["wanda"]) - losses["dense"])


def test_every_solver_has_a_name_of_a_method() -> None:
    assert {method.fields.get("solver", "htp") for method in METHODS.values()} == set(SOLVERS)
