"""Calibration in sequence: Grams of the compressed model's inputs, corrected weights, and what they are worth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from inputs import inputs_of
from torch import Tensor, nn

from cospadi.calibration import walk as sequence
from cospadi.calibration.loss import mean_loss
from cospadi.calibration.spill import Spill
from cospadi.commands import evaluate
from cospadi.model.blocks import Blocks


def small_llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=61, num_hidden_layers=3, max_position_embeddings=64, **(sizes | changes))
    return LlamaForCausalLM(config).eval()


def test_grams_are_those_of_the_whole_dense_and_the_whole_compressed_model() -> None:
    model, other = small_llama(), small_llama()
    tokens = torch.randint(0, 61, (5, 12), generator=torch.Generator().manual_seed(1))
    changed = {
        name: torch.randn_like(module.weight) * 0.1
        for name, module in other.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.layers")
    }
    blocks, spill = Blocks(model, torch.device("cpu")), Spill(0)  # nothing stays in memory
    calls = sequence.learn_calls(blocks, [(tokens, 2)], spill)  # batches of 2, 2 and 1
    assert calls is not None
    flow = sequence.embed(blocks, tokens, 2, spill)
    second = flow.copy()
    plain = flow.copy()
    for index, block in enumerate(blocks.modules):
        everything = {
            f"model.layers.{index}.{kind}": block.get_submodule(kind)
            for kind in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
        }
        for name, gram in sequence.grams(block, index, calls, plain, everything).items():
            dense = inputs_of(model, name, tokens)
            torch.testing.assert_close(gram, dense.T @ dense, rtol=1e-4, atol=1e-4)
        replacement: dict[str, Tensor] = {}
        for kind in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            name = f"model.layers.{index}.{kind}"
            readers = {kind: block.get_submodule(kind)}
            gram, cross = sequence.paired_grams(block, index, calls, flow, second, replacement, readers)[kind]
            dense, compressed = inputs_of(model, name, tokens), inputs_of(other, name, tokens)
            assert cross is not None
            torch.testing.assert_close(gram, compressed.T @ compressed, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(cross, compressed.T @ dense, rtol=1e-4, atol=1e-4)
            siblings = {"self_attn.q_proj": ["q", "k", "v"], "mlp.gate_proj": ["gate", "up"]}
            parent, leaf = kind.split(".")
            for word in siblings.get(kind, [leaf.removesuffix("_proj")]):
                local = f"{parent}.{word}_proj"
                replacement[local] = changed[f"model.layers.{index}.{local}"]
                other.get_submodule(f"model.layers.{index}.{local}").weight.data = replacement[local]
        sequence.advance(block, index, calls, flow, {})
        sequence.advance(block, index, calls, second, replacement)
    predicted = [sequence.logits(blocks, calls, second[i], batch) for i, batch in enumerate(torch.split(tokens, 2))]
    torch.testing.assert_close(torch.cat(predicted), other(input_ids=tokens).logits)
    assert spill.used == 0
    spill.close()
    untouched = small_llama()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), untouched.parameters(), strict=True))


def test_weight_is_corrected_to_what_damped_least_squares_gives() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 9))
    y = x + 0.3 * rng.standard_normal((200, 9))
    weight = rng.standard_normal((9, 6))
    gram, cross = torch.tensor(y.T @ y), torch.tensor(y.T @ x)
    pull = sequence.DAMPING * float(gram.diagonal().mean())
    rows = np.concatenate([y, np.sqrt(pull) * np.eye(9)])
    expected = np.linalg.lstsq(rows, np.concatenate([x @ weight, np.sqrt(pull) * weight]), rcond=None)[0]
    corrected = sequence.corrected(torch.tensor(weight).float(), gram, cross)
    np.testing.assert_allclose(corrected.numpy(), expected, atol=1e-6)
    assert np.linalg.norm(x @ weight - y @ corrected.numpy()) < 0.95 * np.linalg.norm(x @ weight - y @ weight)
    assert torch.equal(sequence.corrected(torch.tensor(weight), gram, None), torch.tensor(weight))
    same = sequence.corrected(torch.tensor(weight), gram, gram)
    torch.testing.assert_close(same, torch.tensor(weight))


def test_model_whose_blocks_do_not_follow_each_other_is_told() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, hidden_states: Tensor, extra: Tensor) -> Tensor:
            return hidden_states + self.linear(hidden_states) + extra

    class Model(nn.Module):
        def __init__(self, twist: str) -> None:
            super().__init__()
            self.embed, self.layers, self.twist = nn.Embedding(10, 8), nn.ModuleList([Block(), Block()]), twist

        def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
            hidden = self.embed(input_ids)
            extra = self.embed(input_ids) if self.twist == "tokens" else torch.ones(8)
            first = self.layers[0](hidden_states=hidden, extra=extra)
            result: Tensor = self.layers[1](
                hidden_states=first + hidden if self.twist == "skip" else first, extra=extra
            )
            # one that computes something else where the walk has taken its blocks' place
            return SimpleNamespace(logits=result + (self.twist == "mood" and "forward" not in vars(self.layers[0])))

    tokens = torch.arange(10).view(2, 5)
    for twist, follows in (("", True), ("skip", False), ("tokens", False), ("mood", False)):
        model = Model(twist)
        blocks = Blocks(model, torch.device("cpu"))
        assert (sequence.learn_calls(blocks, [(tokens, 1)], Spill(1000)) is not None) == follows


def test_replaced_weights_come_back_after_an_error() -> None:
    linear = nn.Linear(4, 4, bias=False)
    block = nn.Sequential(linear)
    before = linear.weight.detach().clone()

    def fail() -> None:
        with sequence.replaced_weights(block, {"0": torch.zeros(4, 4)}):
            assert not linear.weight.any()
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert torch.equal(linear.weight, before)


def test_compensation_lowers_the_loss_of_a_hard_compressed_model(shared_model: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import cospadi

    folder = shared_model("stories260k")
    data = folder.parent.parent / "data"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = evaluate.text_windows(tokenizer, [(data / "stories_heldout.txt").read_text()], 512)[:12]
    losses = {}
    for compensate in (False, True):
        recipe = {"ratio": 0.5, "calibration": str(data / "stories_calibration.jsonl"), "sequences": 24}
        quick = {"iterations": 10, "allocate": "uniform", "metric": "output", "refine": 0}
        quick |= {"compensate": compensate}
        model = AutoModelForCausalLM.from_pretrained(folder)
        result = cospadi.compress(model, recipe | quick, tokenizer=tokenizer)
        losses[compensate] = mean_loss(result.model, windows)
    assert losses[True] < losses[False] - 0.1
