"""Refined blocks: never worse on what was set aside, supports and dictionaries as they were, the same bytes again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from killed import hashes
from safetensors.torch import load_file
from torch import Tensor, nn

import cospadi
from cospadi.budget.plan import size_group
from cospadi.calibration.grams import IDENTITY
from cospadi.calibration.loss import mean_loss
from cospadi.calibration.spill import Spill
from cospadi.calibration.walk import Calls, Flow, call, replaced_weights
from cospadi.commands import evaluate
from cospadi.format import schema, verify
from cospadi.model.projections import Projection
from cospadi.recipe import Recipe
from cospadi.stages import refine
from cospadi.stages.refine import refine_block, weighed_square
from cospadi.stages.solve import GroupProblem, Packed, dense_weights, factorize

CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "twelve bits": {"value_bits": 12},
    "fisher": {"metric": "fisher"},
    "output": {"metric": "output"},
    "compensated": {"compensate": True},
    "mod-htp": {"solver": "mod-htp"},
    "ksvd": {"solver": "ksvd", "share": "none"},
    "svd-llm": {"method": "svd-llm"},
}


@pytest.fixture
def recipe(text_file: Path) -> dict[str, Any]:
    """Enough text that some is set aside, and as many steps as change something."""
    fields: dict[str, Any] = {"ratio": 0.3, "iterations": 2, "gradient_sequences": 1, "refine": 40, "batch_size": 2}
    return fields | {"calibration": str(text_file), "sequences": 16, "length": 32}


def held_out_error(
    name: str, block: nn.Module, index: int, calls: Calls, inputs: Flow, wanted: Flow, packed: list[Packed], costs: Any
) -> float:
    """sum c_j e_j^2 over the last eighth of the batches in that of an output of zeros, in float64, with the stored
    factors in the block."""
    weights = {
        layer.removeprefix(f"{name}."): weight.to(next(block.parameters()).dtype)
        for group in packed
        for layer, weight in dense_weights(group).items()
    }
    gamma = None if costs is None else costs.diag().double()
    error = whole = 0.0
    with torch.no_grad(), replaced_weights(block, weights):
        for batch in range(len(inputs) - max(1, len(inputs) // 8), len(inputs)):
            target = wanted[batch].double().flatten(0, -2)
            missed = call(block, index, calls, inputs[batch]).double().flatten(0, -2) - target
            for rows, sign in ((missed, "error"), (target, "whole")):
                value = float(((rows if gamma is None else rows @ gamma) * rows).sum())
                error, whole = (error + value, whole) if sign == "error" else (error, whole + value)
    return error / whole


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_never_gets_worse_on_what_was_set_aside(
    kind: str, make_model: Callable[..., Path], recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every kind of factors, as they are stored; in most it gets better."""
    seen: list[tuple[float, float, tuple[float, float]]] = []

    def spy(*args: Any) -> Any:
        name, block, index, calls, inputs, wanted, packed, costs = args[:8]
        before = held_out_error(name, block, index, calls, inputs, wanted, packed, costs)
        result = refine_block(*args)
        after = held_out_error(name, block, index, calls, inputs, wanted, result[0], costs)
        seen.append((before, after, result[1]))
        return result

    monkeypatch.setattr(refine, "refine_block", spy)
    folder, output = make_model(dtype=torch.float32), tmp_path / "out"
    cospadi.compress(folder, recipe | KINDS[kind], output)
    assert len(seen) == 2
    for before, after, told in seen:
        assert after <= before * (1 + 1e-5)
        assert told == pytest.approx((before, after), rel=1e-3)
    if kind in ("default", "twelve bits", "mod-htp", "ksvd", "svd-llm"):  # so many steps are enough
        assert seen[0][1] < 0.98 * seen[0][0]
    verify.verify(output)


@pytest.mark.parametrize("kind", ["default", "mod-htp", "svd-llm"])
def test_only_values_change(
    kind: str, dense_folder: Path, recipe: dict[str, Any], prompt: Tensor, tmp_path: Path
) -> None:
    fields = recipe | KINDS[kind] | {"compensate": False}
    fields |= {"metric": Recipe.build(fields).settled().metric}
    cospadi.compress(dense_folder, fields | {"refine": 0}, tmp_path / "plain")
    result = cospadi.compress(dense_folder, fields, tmp_path / "refined")
    plain, refined = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "refined"))
    entries = schema.read_config(tmp_path / "refined")
    assert entries == schema.read_config(tmp_path / "plain")
    values = {f"{name}.{entry.form.names.values}" for name, entry in entries.items()}
    assert plain.keys() == refined.keys()
    for name in plain.keys() - values:
        assert torch.equal(plain[name], refined[name]), name
    assert sum(not torch.equal(plain[name], refined[name]) for name in values) >= len(values) / 2  # of a block, or both
    model = cospadi.load(tmp_path / "refined", "cpu")
    with torch.no_grad():
        assert torch.equal(model(input_ids=prompt).logits, result.model(input_ids=prompt).logits)


@pytest.mark.parametrize("kind", ["default", "svd-llm"])
def test_a_stopped_run_goes_on_and_gives_the_bytes_of_another(
    kind: str, dense_folder: Path, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped within the second block: the first is not refined again."""
    fields = recipe | KINDS[kind]
    cospadi.compress(dense_folder, fields, tmp_path / "one")
    refined: list[int] = []

    def interrupted(*args: Any) -> Any:
        *rest, on_step = args

        def step(done: float) -> None:
            on_step(done)
            if len(refined) == 2 and stops:
                raise KeyboardInterrupt

        refined.append(args[2])
        return refine_block(*rest, step)

    monkeypatch.setattr(refine, "refine_block", interrupted)
    stops = True
    with pytest.raises(KeyboardInterrupt):
        cospadi.compress(dense_folder, fields, tmp_path / "out")
    assert refined == [0, 1]
    stops = False
    cospadi.compress(dense_folder, fields, tmp_path / "out")
    assert refined == [0, 1, 1]
    assert hashes(tmp_path / "out") == hashes(tmp_path / "one")


def test_steps_that_lead_nowhere_leave_all_as_it_was(
    dense_folder: Path, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("LEARNING_RATE", "FASTEST"):
        monkeypatch.setattr(refine, limit, 1e3)
    fields = recipe | {"compensate": False, "metric": "fisher"}
    cospadi.compress(dense_folder, fields, tmp_path / "wild")
    cospadi.compress(dense_folder, fields | {"refine": 0}, tmp_path / "plain")
    wild, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("wild", "plain"))
    assert all(torch.equal(wild[name], plain[name]) for name in plain)


def test_a_loaded_model_gets_the_same_values_as_its_folder(
    dense_folder: Path, recipe: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    cospadi.compress(dense_folder, recipe, tmp_path / "folder")
    model = cospadi.model.load.load_model(dense_folder, CPU)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    cospadi.compress(model, recipe, tmp_path / "memory", tokenizer=tokenizer)
    folder, memory = (load_file(tmp_path / name / "model.safetensors") for name in ("folder", "memory"))
    assert all(torch.equal(folder[name], memory[name]) for name in folder)
    assert all(wanted)
    kept = [p for n, p in model.named_parameters() if "_proj" not in n]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in kept)


def test_refinement_lowers_the_loss_of_a_hard_compressed_model(shared_model: Callable[[str], Path]) -> None:
    folder = shared_model("stories260k")
    data = folder.parent.parent / "data"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = evaluate.text_windows(tokenizer, [(data / "stories_heldout.txt").read_text()], 512)[:12]
    losses = {}
    for steps in (0, 30):
        recipe = {"ratio": 0.5, "calibration": str(data / "stories_calibration.jsonl"), "sequences": 16}
        recipe |= {"gradient_sequences": 4, "iterations": 5, "refine": steps, "length": 256, "compensate": False}
        model = AutoModelForCausalLM.from_pretrained(folder)
        losses[steps] = mean_loss(cospadi.compress(model, recipe, tokenizer=tokenizer).model, windows)
    assert losses[30] < losses[0] - 0.05


# By hand


@pytest.mark.parametrize("weighed", [False, True])
def test_an_error_is_weighed_by_what_outputs_cost(weighed: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    error = torch.randn(2, 3, 6, generator=generator)
    costs = torch.rand(6, generator=generator) if weighed else None
    rows, square = error.flatten(0, 1).double().numpy(), np.ones(6) if costs is None else costs.double().numpy()
    found = float(weighed_square(error, costs))
    assert found == pytest.approx(float(np.einsum("ti,i,ti->", rows, square, rows)), rel=1e-5)


class Toy(nn.Module):
    """A block of three projections, one of which nothing runs through."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.idle = nn.Linear(6, 8), nn.Linear(8, 6, bias=False), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = x + self.b(torch.tanh(self.a(x)))
        return hidden


def toy(names: list[str], batches: int, method: str = "magnitude") -> SimpleNamespace:
    """A toy block with some of its projections solved, and text before it and behind it."""
    block = Toy()
    recipe = Recipe.build(method=method, ratio=0.5, value_bits=16).settled()
    packed = []
    for name in names:
        weight = block.get_submodule(name).weight.detach()
        group = size_group((Projection(f"toy.{name}", 0, name, *weight.T.shape),), 0.5, 2.0, recipe)
        assert group is not None
        packed.append(factorize(GroupProblem(recipe, group, IDENTITY, weight.T, None, CPU), lambda *_: None))
    calls, spill = Calls({1: [((), {})], 2: [((), {})]}, [None]), Spill(10**6)
    generator = torch.Generator().manual_seed(2)
    before = [torch.randn(2, 5, 6, generator=generator) for _ in range(batches)]
    with torch.no_grad():
        behind = [block(x) for x in before]
    inputs, wanted = (Flow(spill, CPU, [spill.put(x) for x in some]) for some in (before, behind))
    return SimpleNamespace(block=block, calls=calls, packed=packed, inputs=inputs, wanted=wanted)


def refined(toy: SimpleNamespace, steps: int, costs: Any = None) -> tuple[list[Packed], tuple[float, float]]:
    return refine_block(
        "toy", toy.block, 0, toy.calls, toy.inputs, toy.wanted, toy.packed, costs, steps, 0, lambda _: None
    )


def digest(packed: list[Packed]) -> str:
    tensors = [tensor for group in packed for _, tensor in sorted(group.tensors.items())]
    return hashlib.sha256(b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in tensors)).hexdigest()


@pytest.mark.parametrize("batches", [1, 2, 3, 17])
@pytest.mark.parametrize("weighed", [False, True])
def test_a_block_by_hand_gets_better(weighed: bool, batches: int) -> None:
    costs = torch.logspace(-1, 1, 6) if weighed else None
    given = toy(["a", "b"], batches)
    weights = [parameter.clone() for parameter in given.block.parameters()]
    found, (before, after) = refined(given, 60, costs)
    assert after < 0.7 * before
    assert all(map(torch.equal, given.block.parameters(), weights))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in given.block.parameters())
    assert digest(found) == digest(refined(given, 60, costs)[0])
    assert digest(found) != digest(given.packed)


def test_values_that_can_be_met_exactly_are_found() -> None:
    """All of S is stored, of a rank that W has, and was wrong by a tenth: what is left is its rounding to bf16."""
    given = toy(["b"], 16, method="svd")
    (packed,) = given.packed
    exact = dense_weights(packed)["toy.b"]
    with torch.no_grad():
        given.block.b.weight.copy_(exact)
        for batch in range(len(given.inputs)):
            given.wanted[batch] = given.block(given.inputs[batch])
    name = "toy.b.right"
    noise = torch.randn(packed.tensors[name].shape, generator=torch.Generator().manual_seed(1))
    packed.tensors[name] = (packed.tensors[name].float() * (1 + 0.1 * noise)).bfloat16()
    found, (before, after) = refined(given, 300)
    assert after < 2e-2 * before
    assert (dense_weights(found[0])["toy.b"] - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize("names", [["idle"], ["a", "idle"]])
def test_projections_that_nothing_runs_through_stay_as_they_are(names: list[str]) -> None:
    """Experts that no token reaches, alone in a block or not."""
    given = toy(names, 4)
    found, (before, after) = refined(given, 10)
    assert after <= before
    assert digest(found[-1:]) == digest(given.packed[-1:])


def test_no_steps_change_nothing() -> None:
    given = toy(["a", "b"], 4)
    found, (before, after) = refined(given, 0)
    assert before == after
    assert digest(found) == digest(given.packed)
