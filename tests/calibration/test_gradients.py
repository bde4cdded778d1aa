"""The loss's gradient at projections' outputs against plain autograd, and what the model looks like afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, llama_config, randomise
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, Qwen2Config, Qwen3MoeConfig

from cospadi.calibration.fisher import FLOOR, output_fisher
from cospadi.errors import UserError
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
    return model


@pytest.fixture
def sequences() -> torch.Tensor:
    return torch.randint(0, 256, (3, 10), generator=torch.Generator().manual_seed(2))


def plain_fisher(model: Any, names: list[str], sequences: torch.Tensor) -> dict[str, np.ndarray]:
    """By torch.autograd.grad with respect to kept outputs; the loss is written out."""
    sums: dict[str, Any] = dict.fromkeys(names, 0.0)
    for tokens in sequences:
        kept: list[tuple[str, torch.Tensor]] = []
        handles = [
            model.get_submodule(name).register_forward_hook(lambda _m, _a, out, n=name, k=kept: k.append((n, out)))
            for name in names
        ]
        logits = model(input_ids=tokens[None], use_cache=False).logits[0].double()
        for handle in handles:
            handle.remove()
        chances = torch.log_softmax(logits, dim=-1)
        loss = -sum(chances[i, tokens[i + 1]] for i in range(len(tokens) - 1))
        gradients = torch.autograd.grad(loss, [output for _, output in kept])
        for (name, _), gradient in zip(kept, gradients, strict=True):
            sums[name] = sums[name] + (gradient.double().numpy() ** 2).reshape(-1, gradient.shape[-1]).sum(0)
    return {name: total / sequences.numel() for name, total in sums.items()}


@pytest.mark.parametrize("family", CONFIGS)
def test_fisher_agrees_with_plain_autograd(family: str, sequences: torch.Tensor) -> None:
    model = build(family)
    projections = find_projections(model)
    done: list[int] = []
    found = output_fisher(model, projections, sequences, done.append)
    expected = plain_fisher(model, [p.name for p in projections], sequences)
    assert done == [1, 1, 1]
    assert set(found) == {p.name for p in projections}
    for p in projections:
        assert found[p.name].shape == (p.d2,)
        assert found[p.name].dtype == torch.float64
        floored = np.maximum(expected[p.name], FLOOR * expected[p.name].mean())
        np.testing.assert_allclose(found[p.name].numpy(), floored, rtol=1e-3, atol=1e-6 * floored.max())


def test_fisher_is_what_an_error_costs_in_the_loss(sequences: torch.Tensor) -> None:
    """The gradient of the loss with respect to a bias is the sum of what `output_fisher` squares, one token alone."""
    model = build("qwen2")
    tokens = sequences[:1, :2]  # only the first token's output, where it does not go through the second
    name = "model.layers.1.mlp.down_proj"
    projection = next(p for p in find_projections(model) if p.name == name)
    found = output_fisher(model, [projection], tokens)[name] * 2
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
    squared = np.square(slopes)
    np.testing.assert_allclose(found.numpy(), np.maximum(squared, FLOOR * squared.mean()), rtol=0.05, atol=1e-4)


def state(model: nn.Module) -> list[Any]:
    """What must be as it was: who needs gradients, own forwards, hooks, gradients."""
    return [
        [parameter.requires_grad for parameter in model.parameters()],
        ["forward" in block.__dict__ for block in decoder_blocks(model)[1]],
        [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        [parameter.grad is None for parameter in model.parameters()],
    ]


@pytest.mark.parametrize("fails", ["never", "forward", "progress"])
def test_fisher_leaves_the_model_as_it_was(fails: str, sequences: torch.Tensor) -> None:
    model = build("llama")
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before, weights = state(model), [parameter.clone() for parameter in model.parameters()]
    with torch.no_grad():
        expected = model(input_ids=sequences).logits

    def stop(_done: int) -> None:
        raise RuntimeError("stop here")

    projections = find_projections(model)
    if fails == "never":
        output_fisher(model, projections, sequences)
    elif fails == "progress":
        with pytest.raises(RuntimeError, match="stop here"):
            output_fisher(model, projections, sequences, stop)
    else:
        handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: stop(0))
        with pytest.raises(RuntimeError, match="stop here"):
            output_fisher(model, projections, sequences)
        handle.remove()
    assert state(model) == before
    assert all(map(torch.equal, model.parameters(), weights))
    with torch.no_grad():
        assert torch.equal(model(input_ids=sequences).logits, expected)


@torch.no_grad()
def test_fisher_works_where_gradients_are_off_and_the_model_is_frozen(sequences: torch.Tensor) -> None:
    model = build("llama").requires_grad_(False)
    projections = find_projections(model)
    found = output_fisher(model, projections, sequences)
    with torch.enable_grad():
        model.requires_grad_(True)
        expected = output_fisher(model, projections, sequences)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values)


def test_outputs_without_effect_are_floored(sequences: torch.Tensor) -> None:
    """Columns of down_proj that are zero make the matching outputs of up_proj mean nothing."""
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, :5] = 0
    name = "model.layers.0.mlp.up_proj"
    projections = find_projections(model)
    found = output_fisher(model, projections, sequences)[name].numpy()
    exact = plain_fisher(model, [name], sequences)[name]
    assert (exact[:5] == 0).all()
    np.testing.assert_allclose(found[:5], FLOOR * exact.mean(), rtol=1e-3)


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


def test_unreached_experts_get_the_mean_of_their_kind() -> None:
    model = Experts()
    projections = find_projections(model)
    sequences = torch.randint(0, 20, (2, 7), generator=torch.Generator().manual_seed(3))
    renamed = [type(p)(p.name, p.block, "expert" if "experts" in p.kind else p.kind, p.d1, p.d2) for p in projections]
    found = output_fisher(model, renamed, sequences)
    reached = [f"blocks.{block}.experts.{expert}" for block in (0, 1) for expert in (0, 1)]
    plain = plain_fisher(model, reached, sequences)
    mean = np.mean([values.mean() for values in plain.values()])
    for block in (0, 1):
        np.testing.assert_allclose(found[f"blocks.{block}.experts.2"].numpy(), np.full(6, mean), rtol=1e-2)
    alone = [p for p in projections if p.name.endswith("experts.2")]
    assert all((values == 1).all() for values in output_fisher(model, alone, sequences).values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_a_user_error(value: float, sequences: torch.Tensor) -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = value
    before = state(model)
    with pytest.raises(UserError, match=r"gradient at the output of model\.layers\.\d\.\S+ is not finite"):
        output_fisher(model, find_projections(model), sequences)
    assert state(model) == before
