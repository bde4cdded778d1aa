"""Calibration text -> token sequences: a local file, a hub data set read as a stream, or the built-in text."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cospadi.errors import UserError, first_line
from cospadi.files import local_path
from cospadi.recipe import Recipe

log = logging.getLogger("cospadi")

DEFAULT_DATASET = "tiiuae/falcon-refinedweb"
"""Public web text, the paper's calibration set; its text field is `content`."""

BUILTIN = "builtin"
SHUFFLE_BUFFER = 10_000
ROWS = (".jsonl", ".json", ".parquet")
"""Suffixes of files that hold rows, of which one field is text."""


def token_sequences(tokenizer: Any, recipe: Recipe, positions: int, vocabulary: int | None = None) -> Tensor:
    """Calibration sequences for a model.

    Documents are drawn in an order set by the seed, tokenized, joined, and cut into full sequences.

    Args:
        tokenizer: the model's.
        recipe: names the source, the number of sequences and their length.
        positions: tokens the model can attend to.
        vocabulary: tokens the model knows.

    Returns:
        int64 (n, length) with n <= recipe.sequences; fewer, with a warning, where the text is short.

    Raises:
        UserError: no source, an empty one, a wrong field, a length beyond the model's positions, or a tokenizer that
            is not the model's.
    """
    length = sequence_length(recipe.length, positions)
    wanted = recipe.sequences * length
    tokens: list[int] = []
    documents = 0
    for document in _documents(recipe, length):
        documents += 1
        tokens += tokenize(tokenizer, document, vocabulary)
        if len(tokens) >= wanted:
            break
    source = recipe.calibration or DEFAULT_DATASET
    count = min(len(tokens) // length, recipe.sequences)
    if count == 0:
        raise UserError(
            f"calibration text {source} has {len(tokens)} tokens in {documents} documents, less than one sequence of "
            f"{length}. Give more text or a smaller --length"
        )
    if count < recipe.sequences:
        log.warning(
            "calibration text %s gives %d sequences of %d tokens; %d were asked for",
            source,
            count,
            length,
            recipe.sequences,
        )
    return torch.tensor(tokens[: count * length], dtype=torch.int64).view(count, length)


def tokenize(tokenizer: Any, text: str, vocabulary: int | None = None) -> list[int]:
    """The tokens of a text.

    Args:
        vocabulary: tokens the model knows.

    Raises:
        UserError: the tokenizer fails, or gives a token that the model does not have.
    """
    try:
        tokens: list[int] = tokenizer(text, verbose=False)["input_ids"]
    except Exception as error:  # a tokenizer may raise anything where its files, or a text, are malformed
        raise UserError(f"the model's tokenizer fails on the text: {first_line(error)}") from None
    if vocabulary is not None:
        check_token(max(tokens, default=0), vocabulary)
    return tokens


def check_token(largest: int, vocabulary: int) -> None:
    """Refuse a token that the model does not have.

    Raises:
        UserError: it does not.
    """
    if largest >= vocabulary:
        raise UserError(
            f"the tokenizer gives token {largest}, and the model has {vocabulary}: it is not the model's tokenizer"
        )


def sequence_length(asked: int | None, positions: int) -> int:
    """Tokens a sequence: what was asked, or min(1024, positions).

    Raises:
        UserError: more than the model has positions.
    """
    if asked is None:
        return min(1024, positions)
    if asked > positions:
        raise UserError(f"--length {asked} is more than the model's {positions} positions")
    if asked < 2:
        raise UserError(f"--length {asked} is less than 2 tokens: nothing could be predicted")
    return asked


def _documents(recipe: Recipe, length: int) -> Iterator[str]:
    """Non-empty texts of the source, shuffled by the seed."""
    source = recipe.calibration
    if source == BUILTIN:
        return _passages("\n".join(_builtin_text()), recipe.seed, length)
    if source is None:
        return _hub_documents(DEFAULT_DATASET, recipe)
    path = local_path(source, "calibration file")
    if path.suffix == ".txt" or (path.suffix in ROWS and path.exists()):
        if not path.is_file():
            raise UserError(f"calibration file {path} " + ("is not a file" if path.exists() else "does not exist"))
        if path.stat().st_size == 0:
            raise UserError(f"calibration file {path} is empty")
        return (
            _passages(read_text(path, "calibration file"), recipe.seed, length)
            if path.suffix == ".txt"
            else _file_rows(path, recipe)
        )
    if path.exists() or path.suffix in ROWS or source.startswith((".", "/", "~")):
        reason = "is not a .txt, .jsonl or .parquet file" if path.exists() else "does not exist"
        raise UserError(f"calibration file {path} {reason}")
    return _hub_documents(source, recipe)


def _builtin_text() -> list[str]:
    from cospadi.demo import stdlib_documents

    try:
        return stdlib_documents("train")
    except FileNotFoundError as error:
        raise UserError(f"the built-in calibration text is not there: {error}") from None


def read_text(path: Path, what: str = "text file") -> str:
    """A UTF-8 text file; `what` names it in messages.

    Raises:
        UserError: missing, empty or not text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{what} {path} is a folder") from None
    except UnicodeDecodeError:
        raise UserError(f"{what} {path} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror}") from None
    if not text.strip():
        raise UserError(f"{what} {path} " + ("holds only white space" if text else "is empty"))
    return text


def _passages(text: str, seed: int, length: int) -> Iterator[str]:
    """A plain text has no documents: passages of some eight sequences (32 characters to a token's place), shuffled."""
    size = 32 * length
    passages = [text[start : start + size] for start in range(0, len(text), size)]
    random.Random(seed).shuffle(passages)
    yield from passages


def _file_rows(path: Path, recipe: Recipe) -> Iterator[str]:
    from datasets import IterableDataset

    read = _parquet_rows if path.suffix == ".parquet" else _json_rows
    try:
        rows = IterableDataset.from_generator(read, gen_kwargs={"path": path})
        yield from _texts(rows.shuffle(seed=recipe.seed, buffer_size=SHUFFLE_BUFFER), str(path), recipe)
    except UserError:
        raise
    except Exception as error:  # datasets and pyarrow raise many kinds on what they cannot read
        raise UserError(f"calibration file {path} cannot be read as {path.suffix[1:]}: {first_line(error)}") from None


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows as they lie in the file, a few in memory at a time."""
    from pyarrow.parquet import ParquetFile

    # datasets' own reader sleeps five seconds where somebody stops before the last row.
    with ParquetFile(path, pre_buffer=False) as file:
        for batch in file.iter_batches(batch_size=1000):
            yield from batch.to_pylist()


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """One JSON object a line, or one list of objects or texts. (Arrow's reader wants one type a column, and crashes on
    lists nested deep enough.)
    """
    with path.open(encoding="utf-8-sig") as stream:
        listed = stream.read(1) == "["
        stream.seek(0)
        rows = json.load(stream) if listed else (json.loads(line) for line in stream if line.strip())
        for number, row in enumerate(rows, 1):
            if not isinstance(row, (dict, str)):
                raise ValueError(f"row {number} is no JSON object")
            yield {"text": row} if isinstance(row, str) else row


def _hub_documents(name: str, recipe: Recipe) -> Iterator[str]:
    import huggingface_hub
    from datasets import load_dataset

    help_offline = "Give a local text with --calibration FILE, or use the built-in one with --calibration builtin"
    try:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise UserError(f"calibration data set {name} cannot be fetched: the hub is switched off. {help_offline}")
        huggingface_hub.HfApi().dataset_info(name, timeout=15)  # one quick question before the patient loader
        rows = load_dataset(name, recipe.calibration_config, split=recipe.calibration_split, streaming=True)
        yield from _texts(rows.shuffle(seed=recipe.seed, buffer_size=SHUFFLE_BUFFER), name, recipe)
    except UserError:
        raise
    except Exception as error:  # datasets and hub raise many kinds for network, access and naming trouble
        raise UserError(f"calibration data set {name} cannot be read: {first_line(error)}. {help_offline}") from None


def _texts(rows: Iterable[dict[str, Any]], source: str, recipe: Recipe) -> Iterator[str]:
    field = recipe.calibration_field
    for row in rows:
        if field is None:
            field = next((name for name in ("text", "content") if name in row), None)
        if field is None or field not in row:
            wanted = f"field '{field}'" if field else "field 'text' or 'content'"
            raise UserError(
                f"calibration text {source} has no {wanted}; its fields are {', '.join(map(str, row))}. "
                "Name one with --calibration-field"
            )
        if not isinstance(row[field], str):
            raise UserError(f"field '{field}' of calibration text {source} holds {type(row[field]).__name__}, not text")
        if row[field].strip():
            yield row[field]
