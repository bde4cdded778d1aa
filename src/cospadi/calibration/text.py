"""Documents -> token sequences."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cospadi.calibration.documents import DEFAULT_DATASET, Chat, Document, calibration_documents, through_template
from cospadi.errors import UserError, first_line
from cospadi.recipe import Recipe

log = logging.getLogger("cospadi")


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
    for document in calibration_documents(recipe, length):
        documents += 1
        tokens += document_tokens(tokenizer, document, vocabulary)
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


def text_windows(
    tokenizer: Any, documents: str | Sequence[Document], length: int, vocabulary: int | None = None
) -> Tensor:
    """Non-overlapping windows of a text's tokens, or of all documents', joined, the last partial one dropped: int64
    (windows, length).

    Raises:
        UserError: the text is shorter than one window, has tokens that the model's vocabulary has not, or is a chat
            that the model's template does not take.
    """
    documents = [documents] if isinstance(documents, str) else documents
    tokens = [token for document in documents for token in document_tokens(tokenizer, document, vocabulary)]
    count = len(tokens) // length
    if count == 0:
        raise UserError(f"the text has {len(tokens)} tokens, less than one window of {length}. Give a longer text")
    return torch.tensor(tokens[: count * length], dtype=torch.int64).view(count, length)


def document_tokens(tokenizer: Any, document: Document, vocabulary: int | None = None) -> list[int]:
    """The tokens of a text, or of a chat as the model's template writes it, which has its special tokens already.

    Raises:
        UserError: as `tokenize`, and where there is no template that takes the chat.
    """
    if isinstance(document, Chat):
        return tokenize(tokenizer, through_template(tokenizer, document), vocabulary, add_special_tokens=False)
    return tokenize(tokenizer, document, vocabulary)


def tokenize(tokenizer: Any, text: str, vocabulary: int | None = None, **options: bool) -> list[int]:
    """The tokens of a text.

    Args:
        vocabulary: tokens the model knows.
        options: for the tokenizer.

    Raises:
        UserError: the tokenizer fails, or gives a token that the model does not have.
    """
    try:
        tokens: list[int] = tokenizer(text, verbose=False, **options)["input_ids"]
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
