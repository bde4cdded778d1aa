"""Gram matrices against numpy, whitening against the objective it stands for, text sources."""

import copy
import importlib
import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import PreTrainedTokenizerFast

from cospadi.calibration import documents
from cospadi.calibration.grams import accumulate_grams, gram_block, whiten
from cospadi.calibration.text import document_tokens, token_sequences
from cospadi.errors import UserError
from cospadi.recipe import Recipe


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
    with pytest.raises(
        UserError,
        match=r"line \d+, has no field 'text', 'content', 'messages' or 'conversations'; its fields are body, id",
    ):
        token_sequences(words, recipe(path), 100)
    with pytest.raises(UserError, match="holds a number, no text"):
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
    with pytest.raises(UserError, match="line 2, is not valid JSON: Expecting value at column 10"):
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


def test_an_order_that_does_not_follow_the_library_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of datasets 5.2, with which results were made."""
    monkeypatch.setattr(documents, "SHUFFLE_BUFFER", 4)
    order = [row.fields for row in documents.shuffled((documents.Row("", n) for n in range(11)), 42)]
    generator, held, wanted = np.random.default_rng(42), [], []
    for first, last in ((0, 4), (4, 6), (6, 8), (8, 10)):
        held = [[*held, *range(first, last)][index] for index in generator.permutation(4)]
        wanted, held = wanted + held[:2], held[2:]
    held.append(10)
    assert order == wanted + [held[index] for index in generator.permutation(3)]


def test_a_local_file_needs_no_cache(tmp_path: Path) -> None:
    """A process of its own: where caches are is read when libraries are imported."""
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"a b c d e {i}"}) for i in range(10)))
    code = "import sys; from cospadi.calibration.documents import *; from pathlib import Path; "
    code += "r = Recipe(calibration=sys.argv[1], length=8); print(len(list(calibration_documents(r, 8)))); "
    code += "print('datasets' in sys.modules)"
    nowhere = {"HF_HOME": "/proc/nowhere", "HF_DATASETS_CACHE": "/proc/nowhere", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=nowhere, capture_output=True, text=True)
    assert done.stdout.split() == ["10", "False"], done.stderr


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_DATASETS_CACHE"])
def test_a_cache_that_cannot_be_written_is_named_with_its_variable(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", "/proc/nowhere/datasets")

    importlib.import_module("datasets")  # which keeps for the whole process what these say when it is imported
    monkeypatch.setenv(variable, "/proc/nowhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", "/proc/nowhere")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", load)
    with pytest.raises(UserError, match=f"the cache folder /proc/nowhere cannot be written .*Set {variable} to one"):
        token_sequences(words, recipe("some/set"), 100)


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": MESSAGES},
        {"id": 1, "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "How many?"}]},
        {"messages": [MESSAGES[0], {"role": "user", "content": [{"type": "text", "text": "How many?"}]}]},
        {"messages": [{**message, "tool_calls": None} for message in MESSAGES]},
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_of_chats(row: dict[str, object], suffix: str, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / f"chats.{suffix}"
    if suffix == "jsonl":
        path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "messages": [], "conversations": []}) + "\n")
    elif isinstance(row.get("messages", MESSAGES)[1].get("content"), list):  # type: ignore[index]
        pytest.skip("Arrow wants one type a column")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    (chat,) = documents.file_documents(path)
    assert isinstance(chat, documents.Chat)
    assert chat.messages == MESSAGES


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"messages": ["hello"]}, "line 1, field 'messages', message 0, is a text. A chat is a list of objects"),
        ({"messages": [{"role": "user"}]}, "message 0, has role. A message has a role and a content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "message 0, holds image, and only text"),
        ({"conversations": [{"from": "parrot", "value": "hello"}]}, "message 0, is from 'parrot', which is none of"),
        ({"text": {"a": 1}}, "field 'text', holds an object, no text and no list of messages"),
        ({"messages": '[{"role": "user", "content": "hi"}]'}, "field 'messages', holds a text and no list of messages"),
        ({"text": None}, "field 'text', holds null, no text and no list of messages"),
        ({"story": "once"}, "has no field 'text', 'content', 'messages' or 'conversations'; its fields are story"),
    ],
)
def test_rows_that_are_no_chats_are_refused(row: dict[str, object], told: str, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match=told):
        documents.file_documents(path)


def test_rows_of_two_kinds_are_told(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n{"text": "hello"}\n')
    with pytest.raises(UserError, match="line 2, has no field 'messages', which rows before it have"):
        documents.file_documents(path)


def test_a_chat_a_line_needs_no_field_and_null_is_none(tmp_path: Path) -> None:
    chat, path = [{"role": "user", "content": "hi"}], tmp_path / "chats.JSONL"
    path.write_text(f"{json.dumps(chat)}\n\n{json.dumps(chat)}\n")
    assert [document.messages for document in documents.file_documents(path)] == [chat, chat]  # type: ignore[union-attr]
    path.write_text(json.dumps([{"text": "one"}, {"text": "two"}]))  # one list of all rows
    assert documents.file_documents(path) == ["one", "two"]
    path.write_text('{"text": null, "content": "there"}')
    assert documents.file_documents(path) == ["there"]


def test_special_tokens_of_a_template_are_not_doubled(tokenizer: PreTrainedTokenizerFast) -> None:
    eager = copy.deepcopy(tokenizer)
    eager.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    assert document_tokens(eager, "a")[0] == 256
    eager.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}"
    tokens = document_tokens(eager, documents.Chat([{"role": "user", "content": "abc"}], "line 1"))
    assert tokens == [256, *tokenizer("abc")["input_ids"], 257]
    eager.chat_template = None
    with pytest.raises(UserError, match="line 1, is a chat, and the model's tokenizer has no chat template"):
        document_tokens(eager, documents.Chat([], "line 1"))


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
