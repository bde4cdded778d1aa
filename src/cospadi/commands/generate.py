"""A quick look that a model still speaks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessorList

from cospadi.calibration.text import tokenize
from cospadi.commands.evaluate import why_no_number
from cospadi.errors import UserError
from cospadi.model import load
from cospadi.runtime.layer import Runtime, set_runtime

COLDEST = 1e-6
"""Below this temperature logits, divided by it, might no longer be finite."""


def continue_text(
    model: str | Path,
    prompt: str,
    tokens: int,
    temperature: float = 0.0,
    seed: int = 42,
    device: str = "auto",
    runtime: Runtime = "auto",
) -> str:
    """The prompt and what the model adds to it; greedy at temperature 0, and at one so low that it comes to the same.

    Raises:
        UserError: a temperature below 0, a model that cannot be read, an empty prompt, or no room for it.
    """
    if not 0 <= temperature < math.inf:
        raise UserError(f"--temperature {temperature:g} is not a number from 0 up")
    where = load.pick_device(device)
    folder = load.resolve(model)
    tokenizer = load.load_tokenizer(folder)
    network: Any = load.load_model(folder, where)
    set_runtime(network, runtime)
    inputs = torch.tensor([tokenize(tokenizer, prompt, load.vocabulary(network))], dtype=torch.int64, device=where)
    used, room = inputs.shape[1], load.positions(network.config)
    if used == 0:
        raise UserError("the prompt is empty")
    if used >= room:
        raise UserError(f"the prompt has {used} tokens; the model has {room} positions")
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > COLDEST else {"do_sample": False}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def checked(_tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.isnan().any():
            why_no_number(network, model)
        return scores

    output = network.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=min(tokens, room - used),
        pad_token_id=pad,
        logits_processor=LogitsProcessorList([checked]),
        **sampling,
    )
    text: str = tokenizer.decode(output[0], skip_special_tokens=True)
    return text
