"""Text from a model, as it comes: `cospadi generate` and `cospadi chat`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, TextStreamer

from cospadi.calibration.text import tokenize
from cospadi.commands.bench import tensor_bytes
from cospadi.commands.evaluate import why_no_number
from cospadi.commands.tables import megabytes
from cospadi.errors import UserError
from cospadi.model import load
from cospadi.runtime.layer import Runtime, set_runtime

COLDEST = 1e-6
"""Below this temperature logits, divided by it, might no longer be finite."""

Write = Callable[[str], None]
Message = dict[str, str]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        tokens: new ones at most.
        temperature: 0 takes the likeliest each time; None leaves it to the model's generation_config.json.
    """

    tokens: int
    temperature: float | None = 0.0

    def options(self) -> dict[str, Any]:
        """For transformers.

        Raises:
            UserError: a temperature below 0.
        """
        if self.temperature is None:
            return {}
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature {self.temperature:g} is not a number from 0 up")
        if self.temperature <= COLDEST:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature}


@dataclass(frozen=True)
class Pace:
    """How fast tokens came: seconds until the first of them, and from it to the last.

    Attributes:
        full: positions of the model, where the tokens ended because these are used up; else 0.
    """

    prompt: int
    tokens: int
    first: float
    others: float
    full: int = 0

    def __str__(self) -> str:
        rate = f", {(self.tokens - 1) / self.others:.1f} tokens/s" if self.tokens > 1 and self.others else ""
        ended = f"; the model's {self.full} positions are used up" if self.full else ""
        return f"{self.tokens} tokens{rate}; the first {self.first:.2f} s after a prompt of {self.prompt} tokens{ended}"


class Stopped(KeyboardInterrupt):
    """Ctrl-C while tokens came: how fast they did."""

    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self.pace = pace


@dataclass
class Speaker:
    """A model that is ready to speak.

    Attributes:
        known: tokens whose keys and values `cache` holds, for a conversation that goes on.
    """

    name: str | Path
    network: Any
    tokenizer: Any
    device: torch.device
    known: list[int] = field(default_factory=list)
    cache: DynamicCache | None = None

    @property
    def room(self) -> int:
        """Positions of the model."""
        return load.positions(self.network.config)

    def weights(self) -> str:
        """What the model takes in memory."""
        return f"weights take {megabytes(tensor_bytes(self.network))}"

    def speak(self, prompt: list[int], sampling: Sampling, write: Write, echo: bool) -> tuple[str, Pace]:
        """What the model adds to a prompt, written as it comes, after the prompt itself where that is echoed."""
        inputs = torch.tensor([prompt], dtype=torch.int64, device=self.device)
        told = _Told(self.tokenizer, write, echo)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        goes_on = len(self.known) < len(prompt) and prompt[: len(self.known)] == self.known
        kept = {"past_key_values": self.cache} if self.cache is not None and goes_on else {}
        self.known, self.cache = [], None  # what is stopped half-way leaves a cache that nobody knows
        start = time.perf_counter()
        try:
            output = self.network.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=min(sampling.tokens, self.room - len(prompt)),
                pad_token_id=pad,
                logits_processor=LogitsProcessorList([self._check]),
                streamer=told,
                return_dict_in_generate=True,
                **kept,
                **sampling.options(),
            )
        except BaseException as error:
            if told.wrote:
                write("\n")  # what is said next begins a line
            if isinstance(error, KeyboardInterrupt) and len(told.times) > 1:
                raise Stopped(told.pace(len(prompt), start)) from None
            raise
        sequence: list[int] = output.sequences[0].tolist()
        cache = output.get("past_key_values")
        if isinstance(cache, DynamicCache):
            self.known, self.cache = sequence[: cache.get_seq_length()], cache
        text: str = self.tokenizer.decode(sequence[len(prompt) :], skip_special_tokens=True)
        full = self.room if len(sequence) == self.room < len(prompt) + sampling.tokens else 0
        return text, told.pace(len(prompt), start, full)

    def _check(self, _tokens: Tensor, scores: Tensor) -> Tensor:
        if scores.isnan().any():
            why_no_number(self.network, self.name)
        return scores


class _Told(TextStreamer):
    """Writes text as its words are whole, and notes when each token came, after the prompt's."""

    def __init__(self, tokenizer: Any, write: Write, echo: bool) -> None:
        super().__init__(tokenizer, skip_prompt=not echo, skip_special_tokens=True)
        self.write, self.times, self.wrote = write, list[float](), False

    def pace(self, prompt: int, start: float, full: int = 0) -> Pace:
        """How fast the tokens came that came so far, one at least, after a start."""
        _, *times = self.times
        return Pace(prompt, len(times), times[0] - start, times[-1] - times[0], full)

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.wrote = self.wrote or bool(text)
        self.write(text)


def load_speaker(
    model: str | Path, sampling: Sampling, seed: int = 42, device: str = "auto", runtime: Runtime = "auto"
) -> Speaker:
    """A compressed or dense model that will speak as `sampling` says.

    Raises:
        UserError: it cannot be read; a temperature below 0.
    """
    sampling.options()
    torch.manual_seed(seed)
    where = load.pick_device(device)
    folder = load.resolve(model)
    tokenizer = load.load_tokenizer(folder)
    network: Any = load.load_model(folder, where)
    set_runtime(network, runtime)
    return Speaker(model, network, tokenizer, where)


def continue_text(speaker: Speaker, prompt: str, sampling: Sampling, write: Write) -> Pace:
    """Write a prompt, and what the model adds to it.

    Raises:
        UserError: an empty prompt, one that is no text, or no room for it.
    """
    check_text(prompt)
    tokens = list(tokenize(speaker.tokenizer, prompt, load.vocabulary(speaker.network)))
    if not tokens:
        raise UserError("the prompt is empty")
    if len(tokens) >= speaker.room:
        raise UserError(f"the prompt has {len(tokens)} tokens; the model has {speaker.room} positions")
    return speaker.speak(tokens, sampling, write, echo=True)[1]


def answer(speaker: Speaker, messages: list[Message], sampling: Sampling, write: Write) -> tuple[str, Pace]:
    """The model's answer to a conversation, in the form of its chat template, written as it comes. Where there is no
    room for all of it, the oldest messages are taken out of `messages`, but what the system says.

    Raises:
        UserError: the model has no chat template, the last message is no text, or there is no room for it.
    """
    check_template(speaker)
    check_text(messages[-1]["content"])
    while True:
        text = speaker.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        tokens: list[int] = speaker.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(tokens) < speaker.room:
            return speaker.speak(tokens, sampling, write, echo=False)
        first = 1 if messages[0]["role"] == "system" else 0
        if len(messages) <= first + 1:
            raise UserError(f"the message has {len(tokens)} tokens; the model has {speaker.room} positions")
        del messages[first : first + 2]  # what the user said, and the answer


def check_text(text: str) -> None:
    """Refuse bytes that stand for no characters, which a terminal or a pipe may hand over.

    Raises:
        UserError: there are some.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        before = text[: error.start][-20:]
        raise UserError(f"the text is not UTF-8 after {before!r}. Write it in UTF-8") from None


def check_template(speaker: Speaker) -> None:
    """Refuse a model that is not made for conversations.

    Raises:
        UserError: it has no chat template.
    """
    if not speaker.tokenizer.chat_template:
        raise UserError(
            f"{speaker.name} has no chat template: it is not made for conversations. Use `cospadi generate`, which "
            "continues a text"
        )


def chat(
    speaker: Speaker,
    said: Iterable[str],
    sampling: Sampling,
    write: Write,
    tell: Callable[[Pace], None],
    system: str | None = None,
) -> None:
    """A conversation: an answer to each message. Ctrl-C ends an answer, and the conversation goes on from there."""
    messages: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    for text in said:
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        parts: list[str] = []

        def both(part: str, parts: list[str] = parts) -> None:
            parts.append(part)
            write(part)

        pace = None
        try:
            answered, pace = answer(speaker, messages, sampling, both)
            write("\n")
        except KeyboardInterrupt as stopped:
            answered = "".join(parts).removesuffix("\n")
            pace = stopped.pace if isinstance(stopped, Stopped) else None
            if not parts:
                write("\n")
        messages.append({"role": "assistant", "content": answered})
        if pace is not None:
            tell(pace)
