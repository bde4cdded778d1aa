"""Gram matrices against numpy, whitening against the objective it stands for, text sources."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from cospadi.calibration.grams import accumulate_grams, gram_block, whiten
from cospadi.calibration.text import token_sequences
from cospadi.errors import UserError
from cospadi.recipe import Recipe


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """datasets waits five seconds for its threads after each Parquet file."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 4), nn.Linear(6, 5), nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.c(self.a(x)) + self.b(x).mean(-1, keepdim=True)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 6)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


def test_gram_is_that_of_all_tokens_whatever_the_batch() -> None:
    model, tokens = Toy(), torch.arange(40).view(8, 5)
    grams = accumulate_grams(model, ["blocks.0.a", "blocks.1.c"], tokens, batch_size=3)
    x = model.embed(tokens).flatten(0, 1).detach().double().numpy()
    np.testing.assert_allclose(grams["blocks.0.a"].numpy(), x.T @ x, rtol=1e-5)
    assert grams["blocks.1.c"].shape == (4, 4)
    whole = accumulate_grams(model, ["blocks.1.c"], tokens, batch_size=8)["blocks.1.c"]
    torch.testing.assert_close(grams["blocks.1.c"], whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d1", [40, 600])
def test_gram_of_a_batch_loses_nothing_to_low_precision(dtype: torch.dtype, d1: int) -> None:
    """Whatever the hardware does with bf16: its numbers are multiplied as they are, and added in float32."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 100, d1, generator=generator).to(dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    gram, cross = gram_block(x, x, "q_proj"), gram_block(x, y, "q_proj")
    assert torch.get_float32_matmul_precision() == before
    left, right = (tensor.flatten(0, 1).double().numpy() for tensor in (x, y))
    np.testing.assert_allclose(gram.numpy(), left.T @ left, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(cross.numpy(), left.T @ right, rtol=1e-5, atol=1e-4)


def test_forward_stops_after_the_last_wanted_block_and_hooks_go() -> None:
    model = Toy()
    grams = accumulate_grams(
        model, ["blocks.0.a", "blocks.1.a"], torch.zeros(2, 3, dtype=torch.int64), 2, model.blocks[0]
    )
    assert grams["blocks.0.a"].abs().max() > 0
    assert grams["blocks.1.a"].abs().max() == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_non_finite_activations_stop_with_the_name() -> None:
    model = Toy()
    with torch.no_grad():
        model.blocks[0].a.weight[0, 0] = float("inf")
    with pytest.raises(UserError, match=r"blocks\.0\.c"):
        accumulate_grams(model, ["blocks.0.a", "blocks.0.c"], torch.ones(1, 3, dtype=torch.int64), 1)


def test_whitened_error_is_the_output_error() -> None:
    x = torch.randn(100, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(12, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    metric = whiten(x.T @ x, 100, 1e-6)
    assert metric.shift == 0
    torch.testing.assert_close(metric.apply(weight).norm(), (x @ weight).norm())
    torch.testing.assert_close(metric.undo(metric.apply(weight)), weight)


@pytest.mark.parametrize("case", ["dead features", "fewer tokens than features"])
def test_singular_grams_are_shifted(case: str) -> None:
    x = torch.randn(
        100 if case == "dead features" else 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    if case == "dead features":
        x[:, [2, 7]] = 0
    gram = x.T @ x
    metric = whiten(gram, len(x), 1e-6)
    assert metric.factor is not None
    assert metric.shift == pytest.approx(1e-6 * float(gram.diagonal().mean()), rel=0.01)
    torch.testing.assert_close(
        metric.factor.T @ metric.factor, gram + metric.shift * torch.eye(12, dtype=torch.float64)
    )
    weight = torch.randn(12, 7, dtype=torch.float64)
    torch.testing.assert_close(metric.undo(metric.apply(weight)), weight, rtol=1e-6, atol=1e-6)


def test_zero_gram_is_the_identity() -> None:
    metric = whiten(torch.zeros(4, 4, dtype=torch.float64), 10, 1e-6)
    assert metric.factor is None
    assert metric.scale == 1
    torch.testing.assert_close(metric.apply(torch.ones(4, 2)), torch.ones(4, 2, dtype=torch.float64))


def words(text: str, verbose: bool = True) -> SimpleNamespace | dict[str, list[int]]:
    return {"input_ids": [len(word) for word in text.split()]}


def recipe(source: object, **fields: object) -> Recipe:
    return Recipe.build({"calibration": str(source), "sequences": 4, "length": 5}, **fields)


@pytest.mark.parametrize("name", ["text.jsonl", "text.parquet", "text.txt"])
def test_local_sources(tmp_path: Path, name: str) -> None:
    path, suffix = tmp_path / name, name.rpartition(".")[2]
    texts = [f"{'a ' * 3}{'bb ' * 4}{i}" for i in range(10)]
    if suffix == "jsonl":
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    elif suffix == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    else:
        path.write_text("\n".join(texts))
    first = token_sequences(words, recipe(path), 100)
    assert first.shape == (4, 5)
    assert torch.equal(first, token_sequences(words, recipe(path), 100))


def test_the_seed_chooses_the_documents(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{'x' * i} " * 5}) for i in range(1, 40)))
    one, two = (token_sequences(words, recipe(path, seed=seed), 100) for seed in (1, 2))
    assert not torch.equal(one, two)


def test_other_fields(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"body": "a b c d e f", "id": 1}) for _ in range(10)))
    assert len(token_sequences(words, recipe(path, calibration_field="body"), 100)) == 4
    with pytest.raises(UserError, match=r"no field 'text' or 'content'; its fields are body, id"):
        token_sequences(words, recipe(path), 100)
    with pytest.raises(UserError, match="holds int, not text"):
        token_sequences(words, recipe(path, calibration_field="id"), 100)


def test_short_text_is_used_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one two three four five six seven eight nine ten eleven")
    logging.getLogger("cospadi").propagate = True
    with caplog.at_level(logging.WARNING, logger="cospadi"):
        assert len(token_sequences(words, recipe(path), 100)) == 2
    assert "2 sequences of 5 tokens; 4 were asked for" in caplog.text


@pytest.mark.parametrize("content", ["", "  \n ", "only three words"])
def test_useless_text_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "text.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=r"empty|white space|less than one sequence"):
        token_sequences(words, recipe(path), 100)


def test_malformed_lines_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "a b c"}\n{"text": \n')
    with pytest.raises(UserError, match="cannot be read as jsonl"):
        token_sequences(words, recipe(path), 100)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"text": ' + b"[" * 100_000,
        b'{"text": ' + b"9" * 5000 + b"}",
        b"5\n",
        b"null",
        b'["words", 5]',
        b'{"text": "a b c d e f"}\n["a"]',
        b'{"text": "caf\xe9"}',
    ],
    ids=lambda content: content[:20],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_rows_that_are_no_objects_are_refused(suffix: str, content: bytes, tmp_path: Path) -> None:
    """Not only with an exception: Arrow's reader of JSON crashes on the deepest of these."""
    path = tmp_path / f"text.{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"text.{suffix}"):
        token_sequences(words, recipe(path), 100)


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a b c d e"}, {"text": "f g h i j", "other": {"deep": [1, "x"]}}]',
        '["a b c d e", "f g h i j"]',
        '\ufeff{"text": "a b c d e"}\n\n{"other": [], "text": "f g h i j"}\n',
        '{"text": "a b c d e", "mixed": 1}\r\n{"text": "f g h i j", "mixed": "one"}',
    ],
    ids=["objects", "texts", "lines after a BOM", "lines of mixed types"],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_rows_are_lines_or_one_list(suffix: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / f"text.{suffix}"
    path.write_text(content, encoding="utf-8", newline="")
    assert token_sequences(words, recipe(path), 100).shape == (2, 5)


@pytest.mark.parametrize("name", ["[1].jsonl", "a*.jsonl", "[1].parquet", "a?.parquet"])
def test_a_file_name_is_no_pattern(name: str, tmp_path: Path) -> None:
    test_local_sources(tmp_path, name)


@pytest.mark.parametrize("source", ["~nobody/text.txt", "x" * 300, "a\0b.txt", "\udcff\ud800.jsonl"])
def test_a_name_that_no_file_can_have_is_refused(source: str) -> None:
    with pytest.raises(UserError, match="calibration file"):
        token_sequences(words, recipe("x").model_copy(update={"calibration": source}), 100)


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").mkdir()
    with pytest.raises(UserError, match=r"text\.txt is not a file"):
        token_sequences(words, recipe(tmp_path / "text.txt"), 100)


def test_a_tokenizer_that_fails_or_knows_other_tokens_is_told(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "\\ud800 is half a character"}')
    with pytest.raises(UserError, match="tokenizer fails on the text"):
        token_sequences(tokenizer, recipe(path), 100)
    path.write_text('{"text": "one two three four five"}')
    assert len(token_sequences(words, recipe(path), 100, vocabulary=6)) == 1
    with pytest.raises(UserError, match="gives token 5, and the model has 5"):
        token_sequences(words, recipe(path), 100, vocabulary=5)


def test_length_defaults_to_the_positions_and_cannot_exceed_them(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a " * 5000)
    base = Recipe(calibration=str(path), sequences=2)
    assert token_sequences(words, base, 64).shape == (2, 64)
    assert token_sequences(words, base, 4096).shape == (2, 1024)
    with pytest.raises(UserError, match="65 is more than the model's 64 positions"):
        token_sequences(words, base.model_copy(update={"length": 65}), 64)


def test_builtin_text() -> None:
    sequences = token_sequences(words, recipe("builtin", sequences=8, length=32), 100)
    assert sequences.shape == (8, 32)
