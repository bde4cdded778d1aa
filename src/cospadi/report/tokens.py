"""The held-out text token by token: what each costs both models, and where they part most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from cospadi.calibration.loss import ByToken
from cospadi.report.content import Measured

SHOWN = 3000
"""Tokens that the page shows one by one, at most: of whole windows, the first ones, or the first part of the first."""

PARTED = 15
"""Tokens that it quotes."""
BEFORE, AFTER = 14, 4
"""Tokens around one that is quoted."""

STEPS = (("better", -1.0), ("well", -0.25), ("", 0.25), ("bad", 1.0), ("worse", 2.5), ("worst", float("inf")))
"""How tokens are marked, and up to which difference in nats."""


class Token(NamedTuple):
    """One token of the text.

    Attributes:
        text: as it is shown. mark: one of STEPS.
        dense, compressed: its loss in nats; None for the first of a window.
        place: window and position, which name it on the page.
    """

    text: str
    mark: str
    dense: float | None
    compressed: float | None
    place: tuple[int, int]


class Parted(NamedTuple):
    """A token at which the models part.

    Attributes:
        before, text, after: the token in its place.
        expected: what each took for likeliest: the compressed model, the dense one.
        shown: whether the page shows it in its text, too.
    """

    before: str
    text: str
    after: str
    dense: float
    compressed: float
    expected: tuple[str, str]
    place: tuple[int, int]
    shown: bool


def windows_shown(tokens: ByToken) -> range:
    """The windows whose tokens are shown one by one."""
    count, length = tokens.windows.shape
    return range(min(count, max(1, SHOWN // length)))


def parted_most(tokens: ByToken) -> list[tuple[int, int]]:
    """Window and position of the tokens whose losses differ most, the largest difference first."""
    difference = tokens.differences.abs()
    order = difference.flatten().sort(descending=True, stable=True).indices[:PARTED]
    width = difference.shape[1]
    return [(int(place) // width, int(place) % width + 1) for place in order if difference.flatten()[place] > 0]


def text_of(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text of each token; of a character that several spell, the last one has it."""
    if not getattr(tokenizer, "is_fast", False):
        return [tokenizer.decode([token]) for token in tokens]
    from tokenizers.decoders import DecodeStream

    stream, backend = DecodeStream(skip_special_tokens=False), tokenizer.backend_tokenizer
    return [stream.step(backend, token) or "" for token in tokens]


def pieces(tokens: ByToken, tokenizer: Any) -> tuple[dict[int, list[str]], dict[int, str]]:
    """The windows and the words that the page needs, as `Measured` has them."""
    parted = parted_most(tokens)
    wanted = sorted({*windows_shown(tokens), *(window for window, _ in parted)})
    likeliest = {int(one[window, at - 1]) for window, at in parted for one in tokens.likeliest}
    words = {token: text_of(tokenizer, [token])[0] or tokenizer.decode([token]) for token in sorted(likeliest)}
    return {window: text_of(tokenizer, tokens.windows[window].tolist()) for window in wanted}, words


def windows(measured: Measured) -> Iterator[tuple[int, list[Token]]]:
    """The tokens that are shown, window by window."""
    for window in windows_shown(measured.tokens):
        first, *texts = measured.pieces[window][:SHOWN]
        compressed, dense = (one[window].tolist() for one in measured.tokens.losses)
        marks = map(mark_of, measured.tokens.differences[window].tolist())
        rest = enumerate(zip(texts, marks, dense, compressed, strict=False), 1)
        found = [Token(_visible(text), mark, before, after, (window, at)) for at, (text, mark, before, after) in rest]
        yield window, [Token(_visible(first), "", None, None, (window, 0)), *found]


def mark_of(difference: float) -> str:
    """How a token is marked that costs the compressed model so much more."""
    return next(mark for mark, most in STEPS if difference <= most)


def parted(measured: Measured) -> list[Parted]:
    """Where the models part most."""
    tokens, shown = measured.tokens, windows_shown(measured.tokens)
    found = []
    for window, at in parted_most(tokens):
        texts = measured.pieces[window]
        compressed, dense = (float(one[window, at - 1]) for one in tokens.losses)
        ours, theirs = (measured.words[int(one[window, at - 1])] for one in tokens.likeliest)
        found.append(
            Parted(
                "".join(texts[max(0, at - BEFORE) : at]).replace("\n", "↵"),
                _plain(texts[at]),
                "".join(texts[at + 1 : at + 1 + AFTER]).replace("\n", "↵"),
                dense,
                compressed,
                (_plain(ours), _plain(theirs)),
                (window, at),
                window in shown and at < SHOWN,
            )
        )
    return found


def fractions(tokens: ByToken) -> tuple[float, float, float]:
    """Which part of the tokens costs within 0.1 nats of the dense model, over a nat more, and over a nat less."""
    difference = tokens.differences
    near, more, less = difference.abs() <= 0.1, difference > 1, difference < -1
    return float(near.double().mean()), float(more.double().mean()), float(less.double().mean())


def same_choice(tokens: ByToken) -> float:
    """Which part of the tokens both models expect the same in place of."""
    return float((tokens.likeliest[0] == tokens.likeliest[1]).to(torch.float64).mean())


def _visible(text: str) -> str:
    """Line ends are shown, and stay; a token that is a part of a character is a dot."""
    return text.replace("\n", "↵\n") or "·"


def _plain(text: str) -> str:
    """In one line, with something to see."""
    text = text.replace("\n", "↵")
    return text if text.strip() else text.replace(" ", "␣") or "·"
