"""Gradients of the loss at outputs of projections against plain autograd, and what the model looks like afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, llama_config, randomise
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, Qwen2Config, Qwen3MoeConfig

import cospadi
from cospadi.calibration import gradients, walk
from cospadi.calibration.gradients import (
    FLOOR,
    INPUT,
    NOISE,
    conditioned,
    diagonal_of,
    gradient_grams,
    gradient_grams_by_blocks,
)
from cospadi.calibration.spill import Spill
from cospadi.errors import UserError
from cospadi.experts import unstack
from cospadi.model import load
from cospadi.model.projections import decoder_blocks, find_projections

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: llama_config(),
    "qwen2": lambda: Qwen2Config(**SIZES, num_key_value_heads=2),  # biases
    "gpt-neox": lambda: GPTNeoXConfig(**SIZES),
    "qwen3-moe": lambda: Qwen3MoeConfig(**SIZES, **EXPERTS, num_key_value_heads=2, head_dim=8),
}


def build(family: str) -> Any:
    model = AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    randomise(model)
    unstack(model)
    return model


@pytest.fixture
def sequences() -> torch.Tensor:
    return torch.randint(0, 256, (3, 10), generator=torch.Generator().manual_seed(2))


def plain_gamma(model: Any, names: list[str], sequences: torch.Tensor) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Means over tokens of g g^T and of x^2, by torch.autograd.grad with respect to kept outputs; the loss is written
    out."""
    sums: dict[str, Any] = {name: [0.0, 0.0] for name in names}
    for tokens in sequences:
        kept: list[tuple[str, torch.Tensor]] = []

        def keep(name: str, args: Any, output: Any, kept: Any = kept) -> None:
            kept.append((name, output))
            if args:
                x = args[0].detach().double().numpy()
                sums[name][1] = sums[name][1] + (x**2).reshape(-1, x.shape[-1]).sum(0)

        handles = [
            model.get_submodule(name).register_forward_hook(lambda _m, args, out, n=name: keep(n, args, out))
            for name in names
        ]
        logits = model(input_ids=tokens[None], use_cache=False).logits[0].double()
        for handle in handles:
            handle.remove()
        chances = torch.log_softmax(logits, dim=-1)
        loss = -sum(chances[i, tokens[i + 1]] for i in range(len(tokens) - 1))
        found = torch.autograd.grad(loss, [output for _, output in kept])
        for (name, _), gradient in zip(kept, found, strict=True):
            rows = gradient.double().numpy().reshape(-1, gradient.shape[-1])
            sums[name][0] = sums[name][0] + rows.T @ rows
    return {name: (gamma / sequences.numel(), x / sequences.numel()) for name, (gamma, x) in sums.items()}


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("family", CONFIGS)
def test_gamma_agrees_with_plain_autograd(family: str, full: bool, sequences: torch.Tensor) -> None:
    model = build(family)
    projections = find_projections(model)
    done: list[float] = []
    found = gradient_grams(model, projections, sequences, full, done.append)
    expected = plain_gamma(model, [p.name for p in projections], sequences)
    assert done == [1, 1, 1]
    suffixes = ("", INPUT, NOISE) if full else ("", INPUT)
    assert set(found) == {f"{p.name}{suffix}" for p in projections for suffix in suffixes}
    for p in projections:
        gamma, inputs = expected[p.name]
        assert found[p.name].shape == ((1, p.d2, p.d2) if full else (p.d2,))
        assert found[p.name].dtype == torch.float32
        wanted = gamma[None] if full else np.diagonal(gamma)
        np.testing.assert_allclose(found[p.name].numpy(), wanted, rtol=1e-3, atol=1e-5 * np.diagonal(gamma).max())
        np.testing.assert_allclose(diagonal_of(found[p.name], p.d2).numpy(), np.diagonal(gamma), rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(found[f"{p.name}{INPUT}"].numpy(), inputs, rtol=1e-4)


def test_a_wide_projection_has_blocks(sequences: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """80 outputs in 27, 27 and 26; what lies between them is left out, and the last block is filled up with zeros."""
    model = build("llama")
    projections = [p for p in find_projections(model) if p.kind in ("mlp.up_proj", "self_attn.k_proj")]
    whole = gradient_grams(model, projections, sequences, True)
    monkeypatch.setattr(gradients, "WIDEST", 30)
    found = gradient_grams(model, projections, sequences, True)
    for p in projections:
        if p.d2 <= 30:
            assert torch.equal(found[p.name], whole[p.name])
            continue
        assert found[p.name].shape == (3, 27, 27)
        assert not found[p.name][2, 26:].any()
        assert not found[p.name][2, :, 26:].any()
        for block, start in enumerate((0, 27, 54)):
            end = min(start + 27, 80)
            torch.testing.assert_close(
                found[p.name][block, : end - start, : end - start], whole[p.name][0, start:end, start:end]
            )
        assert torch.equal(diagonal_of(found[p.name], p.d2), diagonal_of(whole[p.name], p.d2))
        blocks = conditioned(found[p.name], found[f"{p.name}{NOISE}"], p.d2, 1.0)
        assert [block.shape for block in blocks] == [(27, 27), (27, 27), (26, 26)]


def test_gamma_is_what_an_error_costs_in_the_loss(sequences: torch.Tensor) -> None:
    """The gradient of the loss with respect to a bias is what `gradient_grams` multiplies, one token alone."""
    model = build("qwen2")
    tokens = sequences[:1, :2]  # only the first token's output, where it does not go through the second
    name = "model.layers.1.mlp.down_proj"
    projection = next(p for p in find_projections(model) if p.name == name)
    found = gradient_grams(model, [projection], tokens, True)[name][0] * 2
    layer, step = model.get_submodule(name), 1e-3
    shift = torch.zeros(projection.d2)
    handle = layer.register_forward_hook(lambda _module, _args, output: output + shift)
    slopes = []
    for j in range(projection.d2):
        losses = []
        for sign in (1, -1):
            shift.zero_()
            shift[j] = sign * step
            with torch.no_grad():
                logits = model(input_ids=tokens).logits[0, :1].double()
            losses.append(float(nn.functional.cross_entropy(logits, tokens[0, 1:])))
        slopes.append((losses[0] - losses[1]) / (2 * step))
    handle.remove()
    np.testing.assert_allclose(found.numpy(), np.outer(slopes, slopes), rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("widest", [2048, 30])
def test_by_blocks_it_is_that_of_the_whole_model(
    widest: int, full: bool, make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "WIDEST", widest)
    folder, tokens = make_model(llama_config(num_hidden_layers=3), torch.float32), torch.arange(24).view(2, 12)
    dense = load.load_model(folder, torch.device("cpu"))
    blocks = load.open_blocks(folder, torch.device("cpu"), tmp_path)
    projections = find_projections(dense)
    expected = gradient_grams(dense, projections, tokens, full)
    spill = Spill(1000, tmp_path / "spill")  # some in memory, some not
    calls = walk.learn_calls(blocks, [(tokens, 1)], spill)
    assert calls is not None
    done: list[float] = []
    found = list(gradient_grams_by_blocks(blocks, calls, projections, tokens, full, spill, done.append))
    assert [index for index, _ in found] == [2, 1, 0]
    assert sum(done) == pytest.approx(2)
    of_blocks = {name: gamma for _, some in found for name, gamma in some.items()}
    own = {name: of_blocks.pop(name) for name in (f"model.layers.{index}" for index in range(3))}
    assert of_blocks.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(of_blocks[name], values, rtol=1e-4, atol=1e-5 * float(values.abs().max()))
    plain = plain_gamma(dense, list(own), tokens)
    for name, gamma in own.items():
        wanted = np.diagonal(plain[name][0])
        np.testing.assert_allclose(gamma.numpy(), wanted, rtol=1e-3, atol=1e-6)
    assert spill.used == 0
    assert all(parameter.is_meta for block in blocks.modules for parameter in block.parameters())


def state(model: nn.Module) -> list[Any]:
    """What must be as it was: who needs gradients, own forwards, hooks, gradients."""
    return [
        [parameter.requires_grad for parameter in model.parameters()],
        ["forward" in block.__dict__ for block in decoder_blocks(model)[1]],
        [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        [parameter.grad is None for parameter in model.parameters()],
    ]


@pytest.mark.parametrize("fails", ["never", "forward", "progress"])
def test_gradients_leave_the_model_as_it_was(fails: str, sequences: torch.Tensor) -> None:
    model = build("llama")
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before, weights = state(model), [parameter.clone() for parameter in model.parameters()]
    with torch.no_grad():
        expected = model(input_ids=sequences).logits

    def stop(_done: float) -> None:
        raise RuntimeError("stop here")

    projections = find_projections(model)
    if fails == "never":
        gradient_grams(model, projections, sequences, True)
    elif fails == "progress":
        with pytest.raises(RuntimeError, match="stop here"):
            gradient_grams(model, projections, sequences, True, stop)
    else:
        handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: stop(0))
        with pytest.raises(UserError, match="gives no gradients: stop here"):
            gradient_grams(model, projections, sequences, True)
        handle.remove()
    assert state(model) == before
    assert all(map(torch.equal, model.parameters(), weights))
    with torch.no_grad():
        assert torch.equal(model(input_ids=sequences).logits, expected)


@torch.no_grad()
def test_gradients_work_where_gradients_are_off_and_the_model_is_frozen(sequences: torch.Tensor) -> None:
    model = build("llama").requires_grad_(False)
    projections = find_projections(model)
    found = gradient_grams(model, projections, sequences, True)
    with torch.enable_grad():
        model.requires_grad_(True)
        expected = gradient_grams(model, projections, sequences, True)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values)


@pytest.mark.parametrize("full", [True, False])
def test_no_output_is_worth_nothing_and_what_is_off_the_diagonal_counts_less(
    full: bool, sequences: torch.Tensor
) -> None:
    """Columns of down_proj that are zero make the matching outputs of up_proj mean nothing."""
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, :5] = 0
    name = "model.layers.0.mlp.up_proj"
    sums = gradient_grams(model, find_projections(model), sequences, full)
    raw, noise = sums[name], sums.get(f"{name}{NOISE}")
    before = raw.clone()
    exact, _ = plain_gamma(model, [name], sequences)[name]
    assert (np.diagonal(exact)[:5] == 0).all()
    (found,) = conditioned(raw, noise, 80, 7.0)
    assert torch.equal(raw, before)
    diagonal = np.maximum(np.diagonal(exact), FLOOR * np.diagonal(exact).mean())
    if not full:
        np.testing.assert_allclose(found.numpy(), diagonal, rtol=1e-3)
        return
    assert noise is not None
    assert 0 < float(noise) < 1
    expected = (1 - float(noise)) * exact
    np.fill_diagonal(expected, diagonal)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-5 * diagonal.max())
    assert float(torch.linalg.eigvalsh(found.double())[0]) > 0


@pytest.mark.parametrize("sequences", [4, 16, 256])
def test_noise_is_by_how_much_entries_miss_the_true_ones(sequences: int) -> None:
    """Gradients of a known covariance: on average the noise is the part of the squares that is not in the true ones,
    and what it leaves is nearer to them."""
    generator = torch.Generator().manual_seed(5)
    size, tokens = 12, 6
    scales = torch.linspace(0.2, 3, size)
    factors = torch.randn(size, 40, generator=generator)
    true = torch.corrcoef(factors) * scales * scales[:, None]
    root = torch.linalg.cholesky(true)
    noises, wanted, raw, shrunk = [], [], 0.0, 0.0
    for _ in range(60):
        gamma = gradients._Gamma.zeros(size, True, torch.device("cpu"))
        for _ in range(sequences):
            gamma.add(torch.randn(1, tokens, size, generator=generator) @ root.T, "a")
        (mean,), noise = gamma.total / tokens / sequences, gamma.noise()
        (found,) = conditioned(mean[None], noise, size, 1.0)
        scaled = [(m / scales / scales[:, None]).fill_diagonal_(0) for m in (mean, true, found)]
        noises.append(float(noise))
        wanted.append(1 - float(scaled[1].square().sum() / scaled[0].square().sum()))
        raw += float((scaled[0] - scaled[1]).square().sum())
        shrunk += float((scaled[2] - scaled[1]).square().sum())
    assert np.mean(noises) == pytest.approx(np.mean(wanted), abs=0.1)
    assert shrunk < raw


def test_noise_of_one_sequence_or_of_nothing_is_all() -> None:
    gamma = gradients._Gamma.zeros(5, True, torch.device("cpu"))
    assert gamma.noise().tolist() == [1]
    gamma.add(torch.randn(1, 9, 5, generator=torch.Generator().manual_seed(1)), "a")
    assert gamma.noise().tolist() == [1]
    gamma = gradients._Gamma.zeros(5, True, torch.device("cpu"))
    gamma.add(torch.zeros(1, 9, 5), "a")
    gamma.add(torch.zeros(1, 9, 5), "a")
    assert gamma.noise().tolist() == [1]


def test_what_no_token_reaches_is_worth_what_is_said() -> None:
    for zero, noise in ((torch.zeros(6), None), (torch.zeros(2, 3, 3), torch.ones(2))):
        (found,) = conditioned(zero, noise, 6, 2.5)
        assert torch.equal(found, torch.full((6,), 2.5))


class Experts(nn.Module):
    """A model of two blocks, each with three experts of which tokens reach the first two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 6)
        self.blocks = nn.ModuleList([self.Block(), self.Block()])
        self.head = nn.Linear(6, 20, bias=False)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
            self.other = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.tanh(self.experts[0](x)) + torch.tanh(self.experts[1](x)) + self.other(x)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return type("Output", (), {"logits": self.head(x)})


@pytest.mark.parametrize("full", [True, False])
def test_unreached_experts_have_zeros(full: bool) -> None:
    model = Experts()
    projections = find_projections(model)
    sequences = torch.randint(0, 20, (2, 7), generator=torch.Generator().manual_seed(3))
    found = gradient_grams(model, projections, sequences, full)
    reached = [f"blocks.{block}.experts.{expert}" for block in (0, 1) for expert in (0, 1)]
    plain = plain_gamma(model, reached, sequences)
    for name, (gamma, _) in plain.items():
        np.testing.assert_allclose(diagonal_of(found[name], 6).numpy(), np.diagonal(gamma), rtol=1e-3)
    for block in (0, 1):
        assert not found[f"blocks.{block}.experts.2"].any()
        assert not full or found[f"blocks.{block}.experts.2{NOISE}"].tolist() == [1]
        assert not found[f"blocks.{block}.experts.2{INPUT}"].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_a_user_error(value: float, sequences: torch.Tensor) -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = value
    before = state(model)
    with pytest.raises(UserError, match=r"gradient at the output of model\.layers\.\d\.\S+ is not finite"):
        gradient_grams(model, find_projections(model), sequences, True)
    assert state(model) == before


@pytest.mark.parametrize("metric", ["fisher", "two-sided"])
def test_a_job_whose_gradients_are_not_finite_ends_with_a_sentence(
    metric: str, make_model: Callable[..., Path], default: dict[str, Any], tokenizer: Any
) -> None:
    model = load.load_model(make_model(), torch.device("cpu"))
    with torch.no_grad():
        model.model.norm.weight[:] = 1e38  # which no projection reads
    with pytest.raises(UserError, match=r"gradient at the output of model\.layers\.\d\S* is not finite"):
        cospadi.compress(model, default | {"metric": metric, "allocate": "uniform"}, tokenizer=tokenizer)
