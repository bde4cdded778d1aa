"""The main job on every supported kind of model: dense folder in, checkpoint out, loaded with from_pretrained."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import with_solver
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

import cospadi
from cospadi.budget.plan import outlook
from cospadi.format import schema
from cospadi.runtime.layer import CompressedLinear
from cospadi.solvers import SOLVERS, Factorization, Problem, Solver, SolverOptions

OF_EACH_FORM = list({(of.dictionary, of.support, of.coded, of.integers): name for name, of in SOLVERS.items()}.values())
"""A solver for each way in which a projection is stored."""

SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 48,
    "intermediate_size": 76,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES, num_key_value_heads=2),
    "mistral": lambda: MistralConfig(**SIZES, num_key_value_heads=2),
    "qwen2": lambda: Qwen2Config(**SIZES, num_key_value_heads=2),
    "qwen3": lambda: Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16),
    "gemma": lambda: GemmaConfig(**SIZES, num_key_value_heads=1, head_dim=16),
    "phi3": lambda: Phi3Config(**SIZES, num_key_value_heads=2),
    "gpt-neox": lambda: GPTNeoXConfig(**SIZES),
}
PROJECTIONS_A_BLOCK = {"phi3": 4, "gpt-neox": 4}
WITH_BIAS = {
    "qwen2": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
    "gpt-neox": {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
}


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


def compressed_layers(model: nn.Module) -> dict[str, CompressedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, CompressedLinear)}


def kind(name: str) -> str:
    return name.split(".layers.")[1].partition(".")[2]


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def check_equals_dense_stand_in(dense: Path, output: Path, prompt: Tensor) -> None:
    """In float32, the compressed model is the dense one with each weight replaced by (D S)^T."""
    loaded, stand_in = load(output, dtype=torch.float32), load(dense, dtype=torch.float32)
    for name, layer in compressed_layers(loaded).items():
        stand_in.get_submodule(name).weight.data.copy_(layer.dense_weight())
    torch.testing.assert_close(logits(loaded, prompt), logits(stand_in, prompt), rtol=1e-4, atol=1e-4)


def check_bytes(result: cospadi.Compressed, output: Path) -> None:
    """Every group takes on disk exactly the planned bytes, and together no more than the ratio allows; each alone
    does so too where the budget is uniform. What stays dense is counted at 16 bits a weight."""
    tensors, entries = stored(output), schema.read_config(output)
    recipe = cospadi.Recipe.build(result.manifest["recipe"])
    ratio = Fraction(str(recipe.ratio))
    for group in result.plan.groups:
        if group.layout == "dense":
            on_disk = sum(2 * tensors[f"{m.name}.weight"].numel() for m in group.members)
            assert not any(m.name in entries for m in group.members)
        else:
            on_disk = sum(nbytes(tensors[t]) for m in group.members for t in entries[m.name].tensors(m.name))
        assert on_disk == group.parts.total
        if recipe.settled().allocate == "uniform":
            assert on_disk <= (1 - ratio) * 2 * group.d1 * sum(group.d2s)
    assert result.plan.bytes <= (1 - ratio) * result.plan.dense_bytes
    assert result.bytes_after == sum(map(nbytes, tensors.values()))


def check_foretold(dense: Path, result: cospadi.Compressed) -> None:
    """`cospadi plan` knows the groups and bytes of a uniform budget without weights."""
    found = outlook(dense, cospadi.Recipe.build(result.manifest["recipe"]))
    if any(group.stored.codec.coded for group in result.plan.compressed):  # as many bytes, or a few less
        assert 0.98 * found.plan.bytes < result.plan.bytes <= found.plan.bytes
        return
    assert found.plan == result.plan
    assert found.after == result.bytes_after


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_round_trips_through_disk(
    family: str, make_model: Callable[..., Path], default: dict[str, Any], prompt: Tensor, tmp_path: Path
) -> None:
    dense, output = make_model(FAMILIES[family]()), tmp_path / "out"
    result = cospadi.compress(dense, default, output)
    loaded = load(output)

    layers = compressed_layers(loaded)
    assert len(layers) + len(result.plan.left_dense) == 2 * PROJECTIONS_A_BLOCK.get(family, 7)
    assert all(layer.form.layout == "identity mask" for layer in layers.values())
    assert torch.equal(logits(loaded, prompt), logits(result.model, prompt))
    check_equals_dense_stand_in(dense, output, prompt)
    check_bytes(result, output)
    planned = outlook(dense, cospadi.Recipe.build(default)).plan
    names = [[member.name for member in group.members] for group in result.plan.groups]
    assert names == [[member.name for member in group.members] for group in planned.groups]
    assert outlook(dense, cospadi.Recipe.build(default), result.plan).after == result.bytes_after
    shared = {tuple(m.kind.rpartition(".")[2] for m in g.members) for g in result.plan.groups if len(g.members) > 1}
    fused = family in ("phi3", "gpt-neox")
    assert shared == (set() if fused else {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")})

    before = stored(dense)
    with_bias = {kind(name) for name, layer in layers.items() if layer.bias is not None}
    assert with_bias == WITH_BIAS.get(family, set()) & {kind(name) for name in layers}
    for name, layer in layers.items():
        assert (layer.bias is None) == (f"{name}.bias" not in before)
        if layer.bias is not None:
            assert layer.bias.abs().max() > 0
            assert torch.equal(layer.bias, before[f"{name}.bias"])


def test_everything_that_was_not_selected_is_stored_unchanged(
    make_model: Callable[..., Path], quick: dict[str, Any], tmp_path: Path
) -> None:
    dense = make_model(FAMILIES["qwen3"]())
    cospadi.compress(dense, quick | {"target": ["up"]}, tmp_path / "out")
    before, after = stored(dense), stored(tmp_path / "out")
    replaced = {name for name in before if name.endswith("up_proj.weight")}
    assert len(replaced) == 2
    for name in set(before) - replaced:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name])


@pytest.mark.parametrize("family", ["gemma", "llama"])
def test_tied_embeddings_stay_tied_and_are_stored_once(
    family: str, make_model: Callable[..., Path], quick: dict[str, Any], tmp_path: Path
) -> None:
    config = FAMILIES[family]()
    config.tie_word_embeddings = True
    dense = make_model(config)
    cospadi.compress(dense, quick, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert "lm_head.weight" not in stored(tmp_path / "out")


def test_sharded_weights_give_the_same_checkpoint_as_one_file(
    make_model: Callable[..., Path], quick: dict[str, Any], tmp_path: Path
) -> None:
    whole, sharded = make_model(), make_model(max_shard_size="50KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    for folder, name in ((whole, "whole"), (sharded, "sharded")):
        cospadi.compress(folder, quick, tmp_path / name)
    for file in ("model.safetensors", "cospadi.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "sharded" / file).read_bytes()
    assert not list((tmp_path / "sharded").glob("*.index.json"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("solver", OF_EACH_FORM)
def test_source_dtype_is_kept_and_factors_are_bf16(
    dtype: torch.dtype,
    solver: str,
    make_model: Callable[..., Path],
    quick: dict[str, Any],
    prompt: Tensor,
    tmp_path: Path,
) -> None:
    dense, output = make_model(FAMILIES["qwen2"](), dtype=dtype), tmp_path / "out"
    result = cospadi.compress(dense, with_solver(quick, solver), output)
    loaded = load(output)
    assert loaded.dtype == dtype
    assert logits(loaded, prompt).dtype == dtype
    assert torch.equal(logits(loaded, prompt), logits(result.model, prompt))
    check_equals_dense_stand_in(dense, output, prompt)
    check_bytes(result, output)
    tensors = stored(output)
    for name, entry in schema.read_config(output).items():
        for tensor, (stored_as, shape) in entry.tensors(name).items():
            assert list(tensors[tensor].shape) == shape
            assert tensors[tensor].dtype == {"BF16": torch.bfloat16, "U8": torch.uint8}[stored_as]
    assert tensors["model.norm.weight"].dtype == dtype
    assert tensors["model.layers.0.self_attn.q_proj.bias"].dtype == dtype


@pytest.mark.parametrize("solver", [name for name, of in SOLVERS.items() if of.support == "mask" and not of.identity])
def test_a_wide_projection_may_get_more_atoms_than_inputs(
    solver: str, make_llama: Callable[..., Path], quick: dict[str, Any], prompt: Tensor, tmp_path: Path
) -> None:
    dense, output = make_llama(hidden_size=24, intermediate_size=200), tmp_path / "out"
    result = cospadi.compress(dense, quick | {"solver": solver, "ratio": 0.1, "target": ["up"]}, output)
    assert all(group.k > group.d1 for group in result.plan.groups)
    assert torch.equal(logits(load(output), prompt), logits(result.model, prompt))
    check_bytes(result, output)


def test_solvers_are_told_how_to_undo_the_whitening(
    dense_folder: Path, quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    problems: list[Problem] = []

    def spy(problem: Problem, k: int, s: int, options: SolverOptions) -> Factorization:
        problems.append(problem)
        return SOLVERS["eigen"].solve(problem, k, s, options)

    monkeypatch.setitem(SOLVERS, "spy", Solver(spy, SOLVERS["mod-htp"].flops))
    weight = stored(dense_folder)["model.layers.0.mlp.up_proj.weight"].double().T
    recipe = quick | {"solver": "spy", "include": ["*.0.mlp.up_proj"]}
    cospadi.compress(dense_folder, recipe)
    cospadi.compress(dense_folder, recipe | {"metric": "weights"})
    whitened, plain = problems
    assert whitened.unwhiten is not None
    undone = whitened.unwhiten(whitened.target)
    torch.testing.assert_close(undone / undone.norm(), weight / weight.norm(), rtol=1e-3, atol=1e-4)
    assert plain.unwhiten is None


@pytest.mark.parametrize("value_bits", [14, 16])
@pytest.mark.parametrize("solver", ["htp", "mod-htp"])
def test_stored_errors_are_those_of_the_stored_factors(
    solver: str, value_bits: int, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    dense, output = make_model(dtype=torch.float32), tmp_path / "out"
    recipe = {"ratio": 0.3, "iterations": 2, "metric": "weights", "value_bits": value_bits, "solver": solver}
    result = cospadi.compress(dense, recipe, output)
    before = stored(dense)
    for name, layer in compressed_layers(load(output)).items():
        weight = before[f"{name}.weight"].double()
        error = (weight - layer.dense_weight(torch.float64)).norm() / weight.norm()
        assert result.errors[name] == pytest.approx(float(error), rel=1e-6)
        assert result.manifest["projections"][name]["relative_error"] == result.errors[name]
        assert 0 < result.errors[name] < 1


QKV, OUT, GATE_UP, DOWN = ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]
SHARES: dict[str, list[list[str]]] = {
    "none": [[f"{b}.{kind}"] for b in range(3) for kind in QKV + OUT + GATE_UP + DOWN],
    "input": [[f"{b}.{kind}" for kind in kinds] for b in range(3) for kinds in (QKV, OUT, GATE_UP, DOWN)],
    "layers:2": [[f"{b}.{kind}" for b in bs] for bs in ((0, 1), (2,)) for kind in QKV + OUT + GATE_UP + DOWN],
    "input,layers:2": [
        [f"{b}.{kind}" for b in bs for kind in kinds] for bs in ((0, 1), (2,)) for kinds in (QKV, OUT, GATE_UP, DOWN)
    ],
}


@pytest.mark.parametrize(
    ("share", "solver"),
    [
        (share, solver)
        for solver, of in SOLVERS.items()
        for share in SHARES
        if not of.identity or solver in OF_EACH_FORM or share == "none"  # the others share nothing in the same way
    ],
)
def test_projections_of_a_group_share_one_stored_dictionary(
    share: str,
    solver: str,
    make_llama: Callable[..., Path],
    quick: dict[str, Any],
    prompt: Tensor,
    tmp_path: Path,
) -> None:
    dense, output = make_llama(num_hidden_layers=3), tmp_path / "out"
    result = cospadi.compress(dense, with_solver(quick, solver) | {"share": share}, output)
    groups = [[m.name for m in group.members] for group in result.plan.groups]
    assert [[f"{n.split('.')[2]}.{n.rpartition('.')[2]}" for n in names] for names in groups] == SHARES[share]
    loaded = load(output)
    assert torch.equal(logits(loaded, prompt), logits(result.model, prompt))
    check_equals_dense_stand_in(dense, output, prompt)
    check_bytes(result, output)
    shared = "left" if SOLVERS[solver].support == "full" else "dictionary"
    check_foretold(dense, result)
    tensors, layers = stored(output), compressed_layers(loaded)
    if SOLVERS[solver].identity:
        assert not any(name.endswith(("dictionary", "left")) for name in tensors)
        return
    for names in groups:
        assert [f"{name}.{shared}" in tensors for name in names] == [True] + [False] * (len(names) - 1)
        assert len({id(getattr(layers[name], shared)) for name in names}) == 1
    assert len({id(getattr(layer, shared)) for layer in layers.values()}) == len(groups)


def test_group_has_the_error_of_one_problem_in_the_inputs_own_gram(
    make_llama: Callable[..., Path], quick: dict[str, Any], tmp_path: Path
) -> None:
    """gate and up read one tensor, so what they share is the best low-rank factor of both, to rounding."""
    dense = load(make_llama(), dtype=torch.float32)
    weight = (
        torch.cat([dense.model.layers[0].mlp.gate_proj.weight, dense.model.layers[0].mlp.up_proj.weight])
        .detach()
        .double()
    )
    recipe = quick | {"solver": "svd", "target": ["gate", "up"], "include": ["*.0.*"]}
    result = cospadi.compress(dense, recipe | {"metric": "weights"})
    (group,) = result.plan.groups
    best = torch.linalg.svdvals(weight)[group.k :].norm()
    layers = compressed_layers(result.model).values()
    found = (weight - torch.cat([layer.dense_weight(torch.float64) for layer in layers])).norm()
    assert float(best) <= float(found) <= 1.01 * float(best)


def test_group_members_may_sit_where_a_pattern_leaves_a_gap(
    make_llama: Callable[..., Path], quick: dict[str, Any], prompt: Tensor, tmp_path: Path
) -> None:
    dense = make_llama(num_hidden_layers=3)
    recipe = quick | {"share": "layers:3", "exclude": ["model.layers.1.*"]}
    result = cospadi.compress(dense, recipe, tmp_path / "out")
    assert [[m.block for m in group.members] for group in result.plan.groups] == [[0, 2]] * 7
    assert torch.equal(logits(load(tmp_path / "out"), prompt), logits(result.model, prompt))


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({"include": ["*.0.self_attn.*"]}, {f"0.self_attn.{p}_proj" for p in "qkvo"}),
        ({"exclude": ["*.mlp.*", "*.q_proj"]}, {f"{b}.self_attn.{p}_proj" for b in (0, 1) for p in "kvo"}),
        ({"target": ["up", "gate"]}, {f"{b}.mlp.{p}_proj" for b in (0, 1) for p in ("up", "gate")}),
        ({"include": ["*.1.*"], "exclude": ["*_proj"], "target": []}, None),
        ({"include": ["*.1.*"], "exclude": ["*.mlp.*"], "target": ["down_proj", "o"]}, {"1.self_attn.o_proj"}),
    ],
)
def test_selection_compresses_exactly_what_was_asked(
    selection: dict[str, list[str]], expected: set[str] | None, dense_folder: Path
) -> None:
    recipe = {"ratio": 0.3, "iterations": 1, "metric": "weights"} | selection
    if expected is None:
        with pytest.raises(cospadi.UserError, match="leaves nothing to compress"):
            cospadi.compress(dense_folder, recipe)
        return
    result = cospadi.compress(dense_folder, recipe)
    assert {name.removeprefix("model.layers.") for name in compressed_layers(result.model)} == expected


@pytest.mark.parametrize(
    ("selection", "sentence"),
    [
        ({"include": ["*.nothing"]}, r"--include \*\.nothing matches no projection; there are self_attn\.q_proj, "),
        ({"exclude": ["lm_head"]}, r"--exclude lm_head matches no projection; there are self_attn\.q_proj, "),
        ({"target": ["upp"]}, r"--target upp matches no projection; there are self_attn\.q_proj, "),
    ],
)
def test_pattern_that_matches_nothing_is_refused_with_what_there_is(
    selection: dict[str, list[str]], sentence: str, dense_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(cospadi.UserError, match=sentence):
        cospadi.compress(dense_folder, {"metric": "weights"} | selection, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_projection_too_small_for_the_ratio_is_named(dense_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(cospadi.UserError, match=r"model\.layers\.0\.self_attn\.q_proj: .* too small for ratio 0\.99"):
        cospadi.compress(dense_folder, {"metric": "weights", "ratio": 0.99}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_quantized_model_is_refused(make_model: Callable[..., Path], quick: dict[str, Any], tmp_path: Path) -> None:
    dense = make_model()
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (dense / "config.json").write_text(json.dumps(config))
    with pytest.raises(cospadi.UserError, match=r"already quantized \(gptq\)"):
        cospadi.compress(dense, quick, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_compressed_model_is_not_compressed_again(dense_folder: Path, quick: dict[str, Any], tmp_path: Path) -> None:
    cospadi.compress(dense_folder, {"metric": "weights", "iterations": 1, "target": ["up"]}, tmp_path / "once")
    with pytest.raises(cospadi.UserError, match=r"already quantized \(cospadi\)"):
        cospadi.compress(tmp_path / "once", quick, tmp_path / "twice")


def test_pickled_weights_are_refused(make_model: Callable[..., Path], quick: dict[str, Any], tmp_path: Path) -> None:
    dense = make_model()
    torch.save(load_file(dense / "model.safetensors"), dense / "pytorch_model.bin")
    (dense / "model.safetensors").unlink()
    with pytest.raises(
        cospadi.UserError, match=r"no safetensors files, only pytorch_model.bin\. Pickled weights are never loaded"
    ):
        cospadi.compress(dense, quick, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_refused_by_name(make_model: Callable[..., Path], tmp_path: Path) -> None:
    dense = make_model()
    model = load(dense)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(cospadi.UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        cospadi.compress(model, {"metric": "weights", "iterations": 1}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_model_in_memory_gives_the_same_factors_as_its_folder(
    dense_folder: Path, quick: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    cospadi.compress(dense_folder, quick, tmp_path / "folder")
    cospadi.compress(load(dense_folder), quick, tmp_path / "memory", tokenizer=tokenizer)
    folder, memory = stored(tmp_path / "folder"), stored(tmp_path / "memory")
    assert folder.keys() == memory.keys()
    assert all(torch.equal(folder[name], memory[name]) for name in folder)
    with pytest.raises(cospadi.UserError, match="tokenizer"):
        cospadi.compress(load(dense_folder), quick)


def test_trained_model_with_odd_sizes_round_trips(
    shared_model: Callable[[str], Path], prompt: Tensor, tmp_path: Path
) -> None:
    dense, output = shared_model("stories260k"), tmp_path / "out"
    result = cospadi.compress(dense, {"ratio": 0.3, "iterations": 1, "metric": "weights"}, output)
    assert torch.equal(logits(load(output), prompt), logits(result.model, prompt))
    check_equals_dense_stand_in(dense, output, prompt)
    check_bytes(result, output)


@pytest.mark.parametrize("solver", OF_EACH_FORM)
def test_whole_model_compiles_exports_and_trains(
    dense_folder: Path, quick: dict[str, Any], prompt: Tensor, solver: str, tmp_path: Path
) -> None:
    cospadi.compress(dense_folder, with_solver(quick, solver), tmp_path / "out")
    model = load(tmp_path / "out", dtype=torch.float32)
    expected = logits(model, prompt)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=prompt, use_cache=False).logits, expected)
    exported = torch.export.export(model, (), {"input_ids": prompt, "use_cache": False}, strict=False)
    torch.testing.assert_close(exported.module()(input_ids=prompt, use_cache=False).logits, expected)

    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    if SOLVERS[solver].levels:  # they stay as they are; what is around them learns
        factor = model.get_input_embeddings().weight
    else:
        factor = layer.unpack_values() if SOLVERS[solver].identity else layer.atoms
    model(input_ids=prompt, labels=prompt).loss.backward()
    assert factor.grad.abs().max() > 0


def test_plan_of_a_sharded_hub_model_needs_no_weights(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The download without weights brings the index of the shards but none of them."""
    dense = make_model(None, torch.bfloat16, max_shard_size="30KB")
    for name in ("config.json", "model.safetensors.index.json"):
        shutil.copyfile(dense / name, tmp_path / name)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", lambda *_, **__: 1 / 0)
    found = outlook("someone/model", cospadi.Recipe(ratio=0.3))
    assert found.plan.bytes == outlook(dense, cospadi.Recipe(ratio=0.3)).plan.bytes
    assert found.before is None


def test_plan_without_a_forward_pass_says_that_it_shares_nothing(
    dense_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cospadi.budget.plan.shared_inputs", lambda *_: 1 / 0)
    with caplog.at_level(logging.WARNING, "cospadi"):
        found = outlook(dense_folder, cospadi.Recipe(ratio=0.3))
    assert found.plan == outlook(dense_folder, cospadi.Recipe(ratio=0.3, share="none")).plan
    assert "once the weights are there" in caplog.text


@pytest.mark.parametrize(
    ("share", "canonical", "shares_input", "layers"),
    [
        ("none", "none", False, 1),
        ("input", "input", True, 1),
        ("layers:3", "layers:3", False, 3),
        ("layers:12, input", "input,layers:12", True, 12),
    ],
)
def test_share_is_read(share: str, canonical: str, shares_input: bool, layers: int) -> None:
    recipe = cospadi.Recipe.build({"share": share})
    assert (recipe.share, recipe.shares_input, recipe.layers_shared) == (canonical, shares_input, layers)


@pytest.mark.parametrize(
    "share",
    [
        "",
        "all",
        "layers",
        "layers:",
        "layers:1",
        "layers:-2",
        "layers:2.5",
        "none,input",
        "input,input",
        "layers:2,layers:3",
    ],
)
def test_share_that_means_nothing_is_refused(share: str) -> None:
    with pytest.raises(cospadi.UserError, match="share: use none, input, layers:N or input,layers:N"):
        cospadi.Recipe.build({"share": share})


def test_recipe_lists_may_be_one_string() -> None:
    assert cospadi.Recipe.build({"target": "up, gate", "exclude": "*.0.*"}).target == ("up", "gate")
