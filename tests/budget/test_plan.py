"""Measured plans: never above the budget, met to the byte, and refused by name where they do not fit."""

from __future__ import annotations

import filecmp
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Answer
from test_cli import bytes_on_disk, check_mistake
from test_families import FAMILIES, check_bytes, load, logits
from transformers import PreTrainedTokenizerFast

import cospadi
from cospadi.budget.plan import Plan, dense_group, outlook, write_plan
from cospadi.calibration.text import token_sequences
from cospadi.format import safetensors, schema, verify
from cospadi.format.form import Form
from cospadi.model.load import load_tokenizer

DENSE = "model.layers.0.self_attn.o_proj"


@pytest.fixture(scope="module")
def flags(default: dict[str, Any]) -> list[str]:
    """The default recipe's fields as flags."""
    return [str(word) for name, value in default.items() for word in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture(scope="module")
def direct(
    dense_folder: Path, default: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[cospadi.Compressed, Path]:
    """The default recipe in one go; never changed."""
    output = tmp_path_factory.mktemp("direct") / "out"
    return cospadi.compress(dense_folder, default, output), output


@pytest.fixture(scope="module")
def saved(direct: tuple[cospadi.Compressed, Path], default: dict[str, Any], tmp_path_factory: Any) -> Path:
    """Its plan as a file; never changed."""
    path: Path = tmp_path_factory.mktemp("plan") / "plan.json"
    write_plan(direct[0].plan, cospadi.Recipe.build(default), path)
    return path


def resize(group: dict[str, Any], **fields: Any) -> None:
    """Other sizes for the group of q, k and v, and the bytes that follow from them."""
    group.update(fields)
    form = Form("identity", "mask", group["values"])
    d2s = [48, 24, 24] * (len(group["members"]) // 3)
    group["bytes"] = form.nbytes(48, d2s, group["k"], [group["nonzeros"]]).total


def with_dense_projection(plan: Plan) -> Plan:
    """The plan with one group left dense."""
    return Plan(tuple(dense_group(g.members) if g.members[0].name == DENSE else g for g in plan.groups))


def test_plan_then_compress_writes_the_bytes_of_one_run(
    direct: tuple[cospadi.Compressed, Path],
    dense_folder: Path,
    flags: list[str],
    run: Callable[..., Answer],
    tmp_path: Path,
) -> None:
    answer = run("plan", dense_folder, *flags, "--measure", tmp_path / "plan.json", "--json")
    assert answer.code == 0, answer.err
    measured = json.loads(answer.out)
    assert measured["final"]
    assert measured["compressed_bytes"] == direct[0].plan.bytes
    assert measured["checkpoint_bytes_after"] == direct[0].bytes_after
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    done = run("compress", dense_folder, "--plan", tmp_path / "plan.json", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    match, differing, missing = filecmp.cmpfiles(
        direct[1], tmp_path / "out", [path.name for path in direct[1].iterdir()], shallow=False
    )
    assert (differing, missing) == ([], [])
    assert "model.safetensors" in match
    stored = json.loads((tmp_path / "plan.json").read_text())
    sizes = safetensors.tensor_sizes(tmp_path / "out")
    entries = schema.read_config(tmp_path / "out")
    for group in stored["groups"]:
        if group["layout"] != "dense":
            assert group["bytes"] == sum(sizes[t] for m in group["members"] for t in entries[m].tensors(m))


def test_a_run_may_differ_from_the_one_that_measured(
    dense_folder: Path,
    saved: Path,
    direct: tuple[cospadi.Compressed, Path],
    run: Callable[..., Answer],
    tmp_path: Path,
) -> None:
    words = ["compress", dense_folder, "--plan", saved, "-o", tmp_path / "out", "--iterations", 1, "--batch-size", 2]
    done = run(*words, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["compressed_bytes"] == direct[0].plan.bytes
    assert json.loads((tmp_path / "out" / "cospadi.json").read_text())["recipe"]["iterations"] == 1


@pytest.mark.parametrize(
    "more",
    [
        *(["--ratio", "0.4"], ["--solver", "ksvd"], ["--rho", "2"], ["--include", "*.up_proj"]),
        *(["--allocate", "uniform"], ["--metric", "weights"], ["--refine", "0"], ["--recipe", "recipe.yaml"]),
    ],
    ids=" ".join,
)
def test_flags_that_would_change_the_plan_are_refused(
    more: list[str],
    dense_folder: Path,
    saved: Path,
    run: Callable[..., Answer],
    tmp_path: Path,
) -> None:
    answer = run("compress", dense_folder, "--plan", saved, "-o", tmp_path / "out", *more)
    check_mistake(answer, f"{more[0]} would change the plan", str(saved))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "mentioned"),
    [
        (lambda plan: plan["groups"][0].update(bytes=5), "do not follow from its sizes"),
        (lambda plan: plan["groups"][0].update(k=-1), "do not follow from its sizes"),
        (lambda plan: plan["groups"][0].update(values="f15"), "is not a plan"),
        (lambda plan: resize(plan["groups"][0], values="bf16", nonzeros=400), "as bf16; the recipe asks for f14"),
        (lambda plan: resize(plan["groups"][0], nonzeros=0), "do not follow from its sizes"),
        (lambda plan: plan["groups"][0]["members"].reverse(), "for another model, selection"),
        (
            lambda plan: resize(plan["groups"][0], members=plan["groups"][0]["members"] * 2),
            "for another model, selection",
        ),
        (lambda plan: plan["groups"][0].update(members=["lm_head"]), "names lm_head"),
        (lambda plan: plan["groups"][0].update(members=[[]]), "is not a plan"),
        (lambda plan: plan["groups"].pop(), "for another model, selection"),
        (lambda plan: plan["groups"].append(plan["groups"][0]), "for another model, selection"),
        (lambda plan: plan["recipe"].update(colour="red"), "unknown field 'colour'"),
        (lambda plan: plan["recipe"].update(solver="ksvd", metric="fisher"), "not for solver ksvd"),
        (lambda plan: plan["recipe"].update(solver="svd-llm", metric="fisher"), "not for solver svd-llm"),
        (lambda plan: plan.pop("cospadi_plan"), "is not a plan"),
    ],
)
def test_damaged_plan_is_refused(
    change: Callable[[dict[str, Any]], None],
    mentioned: str,
    dense_folder: Path,
    saved: Path,
    run: Callable[..., Answer],
    tmp_path: Path,
) -> None:
    content = json.loads(saved.read_text())
    change(content)
    (tmp_path / "plan.json").write_text(json.dumps(content))
    answer = run("compress", dense_folder, "--plan", tmp_path / "plan.json", "-o", tmp_path / "out")
    check_mistake(answer, mentioned)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_plan_that_cannot_be_read_or_written_is_a_sentence(
    dense_folder: Path,
    make_llama: Callable[..., Path],
    saved: Path,
    run: Callable[..., Answer],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    check_mistake(run("compress", dense_folder, "--plan", tmp_path / "none.json", "-o", out), "does not exist")
    check_mistake(run("plan", dense_folder, "--measure", tmp_path), "is a folder")
    check_mistake(run("plan", dense_folder, "--measure", tmp_path / "no" / "plan.json"), "does not exist")
    other = make_llama(num_hidden_layers=1)
    check_mistake(run("compress", other, "--plan", saved, "-o", out), "which is not among the model's")
    assert not list(tmp_path.iterdir())


def test_measurement_that_was_stopped_goes_on(
    dense_folder: Path,
    flags: list[str],
    run: Callable[..., Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    command = ["plan", dense_folder, *flags, "--measure"]
    assert run(*command, tmp_path / "reference.json").code == 0
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["cospadi.compress"], "allocate", interrupt)
        answer = run(*command, tmp_path / "plan.json")
    assert answer.code == 130
    assert f"What is finished is kept in {tmp_path / 'plan.json.work'}" in answer.err
    assert not (tmp_path / "plan.json").exists()
    assert "resuming the unfinished job" in run(*command, tmp_path / "plan.json").err
    assert (tmp_path / "plan.json").read_bytes() == (tmp_path / "reference.json").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "reference.json"}


def test_unmeasured_plan_says_what_is_not_final(dense_folder: Path, run: Callable[..., Answer]) -> None:
    assert "Under --allocate pooled only the groups" in " ".join(run("plan", dense_folder).out.split())
    assert "--measure" not in run("plan", dense_folder, "--allocate", "uniform").out
    assert "--measure" not in run("plan", dense_folder, "--metric", "weights").out
    assert not json.loads(run("plan", dense_folder, "--json").out)["final"]


def test_projection_left_dense_is_counted_everywhere(
    make_model: Callable[..., Path],
    default: dict[str, Any],
    prompt: torch.Tensor,
    run: Callable[..., Answer],
    tmp_path: Path,
) -> None:
    """The source is float32, where a dense projection takes 4 bytes a weight on disk and counts 2."""
    dense, output = make_model(dtype=torch.float32), tmp_path / "out"
    recipe = cospadi.Recipe.build(default | {"allocate": "uniform", "ratio": 0.2})
    plan = with_dense_projection(outlook(dense, recipe.model_copy(update={"ratio": 0.4})).plan)
    write_plan(plan, recipe, tmp_path / "plan.json")
    result = cospadi.compress(dense, None, output, plan=tmp_path / "plan.json")
    assert result.plan == plan
    assert [projection.name for projection in plan.left_dense] == [DENSE]
    assert outlook(dense, recipe, plan).after == result.bytes_after
    assert plan.bytes == bytes_on_disk(output) + 2 * 48 * 48
    data = json.loads(run("inspect", output, "--json").out)
    assert (data["compressed_bytes"], data["dense_bytes"]) == (plan.bytes, plan.dense_bytes)
    row = data["projections"][DENSE]
    assert (row["layout"], row["d1"], row["d2"], row["bytes"]) == ("dense", 48, 48, 2 * 48 * 48)
    assert f"{plan.bytes:,}" in run("inspect", output).out
    assert "projections left dense by the budget | 1 |" in (output / "README.md").read_text()
    loaded = load(output)
    assert torch.equal(loaded.get_submodule(DENSE).weight, load(dense).get_submodule(DENSE).weight)
    assert torch.equal(logits(loaded, prompt), logits(result.model, prompt))
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "cospadi.json").read_bytes() == (output / "cospadi.json").read_bytes()

    manifest = json.loads((output / "cospadi.json").read_text())
    for wrong in ({DENSE: 5}, {DENSE: "many"}, {"lm_head2": 4608}, {"model.layers.0.mlp.up_proj": 0}, []):
        (output / "cospadi.json").write_text(json.dumps(manifest | {"dense": wrong}))
        with pytest.raises(cospadi.CheckpointError, match=r"cospadi\.json"):
            verify.read_checkpoint(output)


@pytest.mark.parametrize("accounting", ["eq10", "eq11"])
def test_the_papers_sizes_are_those_of_a_stored_dictionary(
    accounting: str, dense_folder: Path, run: Callable[..., Answer]
) -> None:
    check_mistake(run("plan", dense_folder, "--accounting", accounting), f"accounting {accounting}", "htp stores none")
    assert run("plan", dense_folder, "--accounting", accounting, "--method", "paper").code == 0


def test_plan_that_leaves_all_dense_is_refused(dense_folder: Path, default: dict[str, Any], tmp_path: Path) -> None:
    plan = outlook(dense_folder, cospadi.Recipe.build(default)).plan
    plan = Plan(tuple(dense_group(group.members) for group in plan.groups))
    with pytest.raises(cospadi.UserError, match="more than ratio"):
        cospadi.compress(dense_folder, default, tmp_path / "out", plan=plan)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("solver", "share", "metric"),
    [
        ("htp", "none", "two-sided"),
        ("htp", "input,layers:2", "fisher"),
        ("mod-htp", "layers:2", "output"),
        ("ksvd", "input", "output"),
        ("procrustes", "input", "fisher"),
        ("eigen", "layers:2", "fisher"),
        ("svd-llm", "input", "fisher"),
        ("wanda", "input", "output"),
    ],
)
def test_no_allocation_exceeds_the_budget(
    solver: str,
    share: str,
    metric: str,
    make_model: Callable[..., Path],
    default: dict[str, Any],
    prompt: torch.Tensor,
    tmp_path: Path,
) -> None:
    """Sizes that no four divides."""
    config = FAMILIES["llama"]()
    config.intermediate_size = 75
    recipe = default | {"solver": solver, "share": share, "metric": metric, "iterations": 2}
    if "layers" in share:
        del recipe["refine"]
    result = cospadi.compress(make_model(config), recipe, tmp_path / "out")
    check_bytes(result, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out"), prompt), logits(result.model, prompt))


def test_bytes_go_where_weights_are_worth_more(dense_folder: Path, default: dict[str, Any]) -> None:
    """Half way from one density to one threshold on w_ij^2 E[x_i^2] E[g_j^2] for the whole model; the same bytes."""
    recipe = cospadi.Recipe.build(default | {"share": "none"})
    uniform, plan = outlook(dense_folder, recipe).plan, cospadi.measure_plan(dense_folder, recipe)
    assert sum(group.nonzeros for group in plan.groups) == sum(group.nonzeros for group in uniform.groups)
    assert recipe.ratio <= plan.ratio <= uniform.ratio + 1e-3
    model = load(dense_folder)
    tokens = token_sequences(load_tokenizer(dense_folder), recipe, 64, 260)[: recipe.gradient_sequences]
    names = [projection.name for projection in plan.projections]
    inputs, gradients = {name: [] for name in names}, {name: [] for name in names}

    def watch(name: str) -> Any:
        def hook(_module: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            inputs[name].append(args[0].detach().float().square().mean((0, 1)))
            output.register_hook(lambda gradient: gradients[name].append(gradient.float().square().mean((0, 1))))

        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(watch(name))
    for row in tokens:
        predicted = model(input_ids=row[None], use_cache=False).logits[0, :-1].float()
        torch.nn.functional.cross_entropy(predicted, row[1:], reduction="sum").backward()
    worth = [
        model.get_submodule(name).weight.float().square()
        * torch.stack(gradients[name]).mean(0)[:, None]
        * torch.stack(inputs[name]).mean(0)
        for name in names
    ]
    total = sum(group.nonzeros for group in uniform.groups)
    threshold = torch.cat([one.flatten() for one in worth]).topk(total).values[-1]
    for one, group, even in zip(worth, plan.groups, uniform.groups, strict=True):
        assert group.nonzeros == pytest.approx((even.nonzeros + int((one >= threshold).sum())) / 2, rel=0.02)
    densities = [group.nonzeros / (group.d1 * sum(group.d2s)) for group in plan.groups]
    assert max(densities) > min(densities) + 0.02


def test_measuring_leaves_a_loaded_model_as_it_was(
    dense_folder: Path,
    default: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    direct: tuple[cospadi.Compressed, Path],
) -> None:
    model = load(dense_folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert cospadi.measure_plan(model, default, tokenizer=tokenizer) == direct[0].plan
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("solver", "most"), [("htp", 0.2002), ("mod-htp", 0.2002), ("eigen", 0.2035), ("svd-llm", 0.2055)]
)
def test_budgets_meet_the_ratio_from_below_on_a_trained_model(
    solver: str, most: float, shared_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Where every column has the same number of values, or there is only a rank, one more a group would be too many."""
    folder = shared_model("stories260k")
    text = folder.parent.parent / "data" / "stories_calibration.jsonl"
    recipe = {"ratio": 0.2, "calibration": str(text), "sequences": 16, "gradient_sequences": 2, "iterations": 4}
    recipe |= {"refine": 2}
    result = cospadi.compress(folder, recipe | {"solver": solver}, tmp_path / "out")
    assert 0.2 <= result.plan.ratio <= most
    check_bytes(result, tmp_path / "out")
