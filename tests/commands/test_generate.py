"""Text as it comes: what is written, conversations that go on from their cache, and where they end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cospadi.commands.generate import Pace, Sampling, Speaker, Stopped, answer, chat, continue_text, load_speaker
from cospadi.errors import UserError

TEMPLATE = "{% for message in messages %}[{{ message['role'][0] }}]{{ message['content'] }}{% endfor %}[a]"


@pytest.fixture
def make_speaker(make_model: Callable[..., Path]) -> Callable[[], Speaker]:
    folder = make_model(dtype=torch.float32)

    def make() -> Speaker:
        speaker = load_speaker(folder, Sampling(1), device="cpu")
        speaker.tokenizer.chat_template = TEMPLATE
        return speaker

    return make


def ignore(_: str) -> None:
    pass


def talk(speaker: Speaker, said: Iterator[str] | list[str], tokens: int = 3, **options: Any) -> tuple[str, list[Pace]]:
    parts: list[str] = []
    paces: list[Pace] = []
    chat(speaker, said, Sampling(tokens), parts.append, paces.append, **options)
    return "".join(parts), paces


def test_what_is_written_is_the_whole_text(make_speaker: Callable[[], Speaker]) -> None:
    speaker, parts = make_speaker(), list[str]()
    pace = continue_text(speaker, "one two", Sampling(9), parts.append)
    inputs = torch.tensor([speaker.tokenizer("one two")["input_ids"]])
    output = speaker.network.generate(input_ids=inputs, max_new_tokens=9, do_sample=False, pad_token_id=257)[0]
    assert "".join(parts) == speaker.tokenizer.decode(output, skip_special_tokens=True)
    assert (pace.prompt, pace.tokens) == (inputs.shape[1], len(output) - inputs.shape[1])
    assert pace.first > 0
    assert f"{pace.tokens} tokens" in str(pace)


def test_what_goes_on_goes_on_from_the_cache(make_speaker: Callable[[], Speaker], monkeypatch: Any) -> None:
    speaker, given = make_speaker(), list[int | None]()
    generate = speaker.network.generate

    def watched(**options: Any) -> Any:
        cache = options.get("past_key_values")
        given.append(None if cache is None else cache.get_seq_length())
        return generate(**options)

    monkeypatch.setattr(speaker.network, "generate", watched)
    speaker.speak([5, 6, 7], Sampling(4), ignore, echo=False)
    assert speaker.known[:3] == [5, 6, 7]
    known = len(speaker.known)
    longer = [*speaker.known, 8, 9]
    text, _ = speaker.speak(longer, Sampling(4), ignore, echo=False)
    assert text == make_speaker().speak(longer, Sampling(4), ignore, echo=False)[0]
    other = [4, *longer]
    text, _ = speaker.speak(other, Sampling(4), ignore, echo=False)
    assert text == make_speaker().speak(other, Sampling(4), ignore, echo=False)[0]
    assert given == [None, known, None]


def test_answers_are_those_to_the_whole_conversation(make_speaker: Callable[[], Speaker]) -> None:
    speaker, messages = make_speaker(), list[dict[str, str]]()
    for text in ("ab", "cd", "ef"):
        messages.append({"role": "user", "content": text})
        answered, _ = answer(speaker, messages, Sampling(3), ignore)
        assert answered == answer(make_speaker(), list(messages), Sampling(3), ignore)[0]
        messages.append({"role": "assistant", "content": answered})


def test_the_oldest_messages_give_way_but_not_the_system(make_speaker: Callable[[], Speaker]) -> None:
    speaker = make_speaker()
    messages = [{"role": "system", "content": "s"}]
    for _ in range(6):
        messages.append({"role": "user", "content": "0123456789"})
        text, _ = answer(speaker, messages, Sampling(2), ignore)
        messages.append({"role": "assistant", "content": text})
    assert messages[0] == {"role": "system", "content": "s"}
    assert 3 <= len(messages) < 13
    with pytest.raises(UserError, match="the model has 64 positions"):
        answer(speaker, [{"role": "user", "content": "x" * 70}], Sampling(2), lambda part: None)


def test_lines_are_answered_one_by_one_and_empty_ones_are_none(make_speaker: Callable[[], Speaker]) -> None:
    text, paces = talk(make_speaker(), ["ab", "", "  ", "cd"], system="be brief")
    assert len(paces) == 2
    assert paces[0].prompt == len("[s]be brief[u]ab[a]")
    assert text.count("\n") >= 2


def test_ctrl_c_ends_an_answer_and_not_the_conversation(make_speaker: Callable[[], Speaker]) -> None:
    speaker, parts, paces, stops = make_speaker(), list[str](), list[Pace](), [True]

    def write(part: str) -> None:
        parts.append(part)
        if stops and part:
            stops.pop()
            raise KeyboardInterrupt

    chat(speaker, ["ab", "cd"], Sampling(5), write, paces.append)
    assert not stops
    assert len(paces) == 2


def test_ctrl_c_tells_how_fast_the_tokens_came(make_speaker: Callable[[], Speaker]) -> None:
    parts = list[str]()

    def write(part: str) -> None:
        parts.append(part)
        if len(parts) == 4:
            raise KeyboardInterrupt

    speaker = make_speaker()
    speaker.network.generation_config.eos_token_id = None
    with pytest.raises(Stopped) as stopped:
        continue_text(speaker, "one two", Sampling(40), write)
    assert 0 < stopped.value.pace.tokens < 10
    assert parts[-1] == "\n"  # what is said next begins a line


def test_a_model_without_a_template_is_refused(make_speaker: Callable[[], Speaker]) -> None:
    speaker = make_speaker()
    speaker.tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"no chat template.*cospadi generate"):
        talk(speaker, ["ab"])


def test_bytes_that_are_no_text_are_the_users_mistake(make_speaker: Callable[[], Speaker]) -> None:
    with pytest.raises(UserError, match=r"the text is not UTF-8 after 'h'"):
        continue_text(make_speaker(), "h\udce9llo", Sampling(2), print)


def test_a_text_that_fills_all_positions_says_so(make_speaker: Callable[[], Speaker]) -> None:
    speaker = make_speaker()
    speaker.network.generation_config.eos_token_id = None
    pace = continue_text(speaker, "one", Sampling(10**6), lambda _: None)
    assert pace.prompt + pace.tokens == speaker.room == pace.full
    assert str(pace).endswith(f"the model's {speaker.room} positions are used up")
