"""Documents of a source: texts and chats, of a local file, a hub data set read as a stream, or the built-in text.

A local file is read by this file alone: no library's cache has a part in it.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from cospadi.errors import UserError, first_line
from cospadi.files import local_path
from cospadi.model.hub import cache_trouble
from cospadi.recipe import Recipe

DEFAULT_DATASET = "tiiuae/falcon-refinedweb"
"""Public web text, the paper's calibration set; its text field is `content`."""

BUILTIN = "builtin"
SHUFFLE_BUFFER = 10_000
ROWS = (".jsonl", ".json", ".parquet")
"""Suffixes of files that hold rows, of which one field is text or a chat."""

FIELDS = ("text", "content", "messages", "conversations")
"""Where a row's document is looked for, in this order."""

CHATS = ("messages", "conversations")
"""Those of them that hold chats."""

SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip
"""Who speaks in {from, value} -> role of a message."""


@dataclass(frozen=True)
class Chat:
    """Messages, each a mapping with a role and, mostly, a content.

    Attributes:
        where: which row of which source they are, for messages.
    """

    messages: list[dict[str, Any]]
    where: str


Document = str | Chat


class Row(NamedTuple):
    """A row of a source: its fields, and which one it is, for messages."""

    where: str
    fields: Mapping[str, Any]


def calibration_documents(recipe: Recipe, length: int) -> Iterator[Document]:
    """Non-empty documents of a recipe's source, in an order set by its seed.

    Args:
        length: tokens of a sequence, by which a plain text is cut into passages.

    Raises:
        UserError: no source, one that cannot be read, or without the field that is asked for.
    """
    source = recipe.calibration
    if source == BUILTIN:
        return _passages("\n".join(_builtin_text()), recipe.seed, length)
    if source is None:
        return _hub_documents(DEFAULT_DATASET, recipe)
    path = local_path(source, "calibration file")
    suffix = path.suffix.lower()
    if suffix == ".txt" or (suffix in ROWS and path.exists()):
        check_file(path, "calibration file")
        if suffix == ".txt":
            return _passages(read_text(path, "calibration file"), recipe.seed, length)
        rows = shuffled(read_rows(path, "calibration file"), recipe.seed)
        return _documents(rows, f"calibration text {path}", recipe.calibration_field, "--calibration-field")
    if path.exists() or suffix in ROWS or source.startswith((".", "/", "~")):
        reason = "is not a .txt, .jsonl, .json or .parquet file" if path.exists() else "does not exist"
        raise UserError(f"calibration file {path} {reason}")
    return _hub_documents(source, recipe)


def file_documents(path: Path, field: str | None = None) -> list[Document]:
    """All documents of a file, in its order: those of its rows, or of any other text the whole.

    Args:
        field: the rows' field that is text or a chat; None looks for it.

    Raises:
        UserError: a file that cannot be read, or without the field.
    """
    if path.suffix.lower() not in ROWS:
        if field is not None:
            raise UserError(f"--text-field {field} is of rows, and {path} is no {', '.join(ROWS)} file. Leave it out")
        return [read_text(path)]
    check_file(path, "text file")
    found = list(_documents(read_rows(path, "text file"), f"text file {path}", field, "--text-field"))
    if not found:
        raise UserError(f"text file {path} holds no text")
    return found


def check_file(path: Path, what: str) -> None:
    """Refuse what is no file, or an empty one; `what` names it in messages."""
    if not path.is_file():
        raise UserError(f"{what} {path} " + ("is not a file" if path.exists() else "does not exist"))
    if path.stat().st_size == 0:
        raise UserError(f"{what} {path} is empty")


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


def shuffled(rows: Iterable[Row], seed: int) -> Iterator[Row]:
    """Rows in another order, with no more than SHUFFLE_BUFFER of them in memory: the order of
    `datasets.IterableDataset.shuffle` (5.2), whichever version is there.
    """
    generator = np.random.default_rng(seed)
    held: list[Row] = []
    for row in rows:
        held.append(row)
        if len(held) >= SHUFFLE_BUFFER:
            order = generator.permutation(len(held))
            half = len(held) - SHUFFLE_BUFFER // 2
            yield from (held[index] for index in order[:half])
            held = [held[index] for index in order[half:]]
    yield from (held[index] for index in generator.permutation(len(held)))


def _builtin_text() -> list[str]:
    from cospadi.demo import stdlib_documents

    try:
        return stdlib_documents("train")
    except FileNotFoundError as error:
        raise UserError(f"the built-in calibration text is not there: {error}") from None


def _passages(text: str, seed: int, length: int) -> Iterator[str]:
    """A plain text has no documents: passages of some eight sequences (32 characters to a token's place), shuffled."""
    size = 32 * length
    passages = [text[start : start + size] for start in range(0, len(text), size)]
    random.Random(seed).shuffle(passages)
    yield from passages


# Rows


def read_rows(path: Path, what: str) -> Iterator[Row]:
    """The rows of a .jsonl, .json or .parquet file, as they lie in it; `what` names it in messages.

    Raises:
        UserError: where one cannot be read: which it is, and why.
    """
    kind = path.suffix[1:].lower()
    try:
        yield from _parquet_rows(path) if kind == "parquet" else _json_rows(path, f"{what} {path}")
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror or first_line(error)}") from None
    except Exception as error:  # pyarrow raises many kinds on what it cannot read
        raise UserError(f"{what} {path} cannot be read as {kind}: {first_line(error)}") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    """A few in memory at a time."""
    from pyarrow.parquet import ParquetFile

    number = 0
    with ParquetFile(path, pre_buffer=False) as file:
        for batch in file.iter_batches(batch_size=1000):
            for fields in batch.to_pylist():
                number += 1
                yield Row(f"row {number}", fields)


def _json_rows(path: Path, source: str) -> Iterator[Row]:
    """One JSON object or text a line, or one list of them. (Arrow's reader wants one type a column, and crashes on
    lists nested deep enough.)
    """
    # What is no UTF-8 is met where it stands, in the line that is told.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as stream:
        first = next((character for line in stream for character in line if not character.isspace()), "")
        stream.seek(0)
        if first == "[" and not _is_list_a_line(stream):
            rows = enumerate(_parsed(stream.read(), source, 0), 1)
            yield from (_row(f"row {number}", row, source) for number, row in rows)
            return
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield _row(f"line {number}", _parsed(line.rstrip("\r\n"), source, number), source)


def _parsed(text: str, source: str, line: int) -> Any:
    """JSON of a line, or of a whole file, which is line 0."""
    where = f"line {line}" if line else "which is one list"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at = line or text.count("\n", 0, error.start) + 1
        raise UserError(f"{source}, line {at}, is not UTF-8 text") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {line or error.lineno}"
        reason = f"{error.msg.removesuffix(' at')} at column {error.colno}"
    except RecursionError:
        reason = "it is nested too deep"
    except ValueError as error:  # a number of too many digits
        reason = first_line(error)
    ask = "Mend the line or take it out" if line else "Mend it"
    if line == 1 and source.endswith(".json"):
        ask = "Such a file holds one object a line, or one list of objects"
    raise UserError(f"{source}, {where}, is not valid JSON: {reason}. {ask}") from None


def _row(where: str, row: Any, source: str) -> Row:
    if isinstance(row, list) and all(isinstance(message, dict) for message in row):
        return Row(where, {CHATS[0]: row})
    if not isinstance(row, (dict, str)):
        raise UserError(f"{source}, {where}, is no JSON object, no text and no chat but {_kind(row)}")
    return Row(where, {"text": row} if isinstance(row, str) else row)


def _is_list_a_line(stream: TextIO) -> bool:
    """Whether a file that begins with a list has one on its first line, and another on the next."""
    lines = list(itertools.islice((line for line in stream if line.strip()), 2))
    stream.seek(0)
    try:
        return len(lines) == 2 and all(isinstance(json.loads(line), list) for line in lines)
    except (ValueError, RecursionError):
        return False


def _kind(value: object) -> str:
    """What JSON calls a value."""
    names = {list: "a list", dict: "an object", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _hub_documents(name: str, recipe: Recipe) -> Iterator[Document]:
    import huggingface_hub
    from datasets import load_dataset

    help_offline = "Give a local text with --calibration FILE, or use the built-in one with --calibration builtin"
    source = f"calibration data set {name}"
    try:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise UserError(f"{source} cannot be fetched: the hub is switched off. {help_offline}")
        huggingface_hub.HfApi().dataset_info(name, timeout=15)  # one quick question before the patient loader
        rows = load_dataset(name, recipe.calibration_config, split=recipe.calibration_split, streaming=True)
        rows = rows.shuffle(seed=recipe.seed, buffer_size=SHUFFLE_BUFFER)
        numbered = (Row(f"row {number} as shuffled", row) for number, row in enumerate(rows, 1))
        yield from _documents(numbered, source, recipe.calibration_field, "--calibration-field")
    except UserError:
        raise
    except Exception as error:  # datasets and hub raise many kinds for network, access and naming trouble
        if trouble := cache_trouble(error):
            raise UserError(f"{source} cannot be read: {trouble}") from None
        raise UserError(f"{source} cannot be read: {first_line(error)}. {help_offline}") from None


# A row's document


def _documents(rows: Iterable[Row], source: str, field: str | None, flag: str) -> Iterator[Document]:
    """What each row holds, but for what holds nothing.

    Args:
        field: None is the first of FIELDS that the first row has.
        flag: which names another.
    """
    found = None
    for row in rows:
        names = ", ".join(map(str, row.fields)) or "none"
        if field is None:
            there = [name for name in FIELDS if name in row.fields]
            field = found = next((name for name in there if row.fields[name] is not None), there[0] if there else None)
        if found is not None and found not in row.fields:
            raise UserError(
                f"{source}, {row.where}, has no field '{found}', which rows before it have; its fields are {names}. "
                f"All rows of a source have one field of text or chats, which {flag} names"
            )
        if field is None or field not in row.fields:
            wanted = f"'{field}'" if field else ", ".join(f"'{name}'" for name in FIELDS[:-1]) + f" or '{FIELDS[-1]}'"
            raise UserError(
                f"{source}, {row.where}, has no field {wanted}; its fields are {names}. Name one with {flag}"
            )
        value = row.fields[field]
        if found in CHATS and isinstance(value, str):
            raise UserError(
                f"{source}, {row.where}, field '{found}', holds a text and no list of messages. Write it as a list, or "
                f"name a field of text with {flag}"
            )
        if isinstance(value, list):
            where = f"{source}, {row.where}"
            messages = [_message(message, f"{where}, field '{field}', message {n}") for n, message in enumerate(value)]
            if messages:
                yield Chat(messages, where)
        elif not isinstance(value, str):
            raise UserError(
                f"{source}, {row.where}, field '{field}', holds {_kind(value)}, no text and no list of messages. Mend "
                f"it, or name another field with {flag}"
            )
        elif value.strip():
            yield value


def _message(message: Any, where: str) -> dict[str, Any]:
    """A message of {role, content} or {from, value}, whose content is text, as templates expect it.

    Raises:
        UserError: it is none.
    """
    if not isinstance(message, dict):
        raise UserError(f"{where}, is {_kind(message)}. A chat is a list of objects with role and content")
    said = {str(name): value for name, value in message.items() if value is not None}  # as Parquet fills in
    if "role" not in said and "from" in said:
        speaker = said["from"]
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise UserError(f"{where}, is from {speaker!r:.40}, which is none of {', '.join(SPEAKERS)}")
        said = {"role": SPEAKERS[speaker], "content": said.get("value")}
    role, content = said.get("role"), said.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        for part in content:
            if not isinstance(part.get("text"), str):
                raise UserError(f"{where}, holds {part.get('type', 'a part')!s:.40}, and only text is read")
        said["content"] = content = "".join(part["text"] for part in content)
    if not isinstance(role, str) or not (isinstance(content, str) or (content is None and "tool_calls" in said)):
        raise UserError(f"{where}, has {', '.join(said) or 'nothing'}. A message has a role and a content, both text")
    return said


def through_template(tokenizer: Any, chat: Chat) -> str:
    """A chat as the model's template writes it, special tokens and all.

    Raises:
        UserError: the tokenizer has no template, or it does not take this chat.
    """
    if not getattr(tokenizer, "chat_template", "one of its own"):
        raise UserError(
            f"{chat.where}, is a chat, and the model's tokenizer has no chat template to write it with. Use the "
            "model's instruct version, put chat_template.jinja into its folder, or name a field of plain text"
        )
    try:
        text: str = tokenizer.apply_chat_template(chat.messages, tokenize=False, add_generation_prompt=False)
    except Exception as error:  # a template is a program, which raises what it likes
        raise UserError(f"{chat.where}, does not fit the model's chat template: {first_line(error)}") from None
    return text
