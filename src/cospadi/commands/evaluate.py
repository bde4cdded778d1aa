"""What a model is worth on text: perplexity, and how far its predictions are from another's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from cospadi.calibration.documents import file_documents
from cospadi.calibration.loss import ByToken, compared, mean_loss, perplexity_of
from cospadi.calibration.text import sequence_length, text_windows
from cospadi.errors import UserError
from cospadi.jobs.progress import Stages
from cospadi.model import load
from cospadi.model.blocks import check_finite
from cospadi.runtime.layer import Runtime, set_runtime


@dataclass(frozen=True)
class Perplexity:
    """Perplexity over non-overlapping windows.

    Attributes:
        value: exp of the mean negative log-likelihood of every token but the first of each window.
        windows, length: how many windows, of how many tokens each.
    """

    value: float
    windows: int
    length: int


def perplexity(
    model: nn.Module,
    windows: Tensor,
    batch_size: int = 4,
    on_batch: Callable[[int], None] | None = None,
) -> Perplexity:
    """Perplexity over windows of tokens, int64 (windows, length); arguments as for `mean_loss`."""
    return Perplexity(perplexity_of(mean_loss(model, windows, batch_size, on_batch)), *windows.shape)


def open_model(name: str | Path, device: torch.device, runtime: Runtime, stages: Stages) -> tuple[Any, Any]:
    """A model and its tokenizer.

    Raises:
        UserError: nothing that can be read.
    """
    with stages.stage("load", 1):
        folder = load.resolve(name)
        tokenizer = load.load_tokenizer(folder)
        model = load.load_model(folder, device)
        set_runtime(model, runtime)
    return model, tokenizer


def evaluate_models(
    models: Sequence[str | Path],
    text: Path,
    length: int | None = None,
    batch_size: int = 4,
    device: str = "auto",
    stages: Stages | None = None,
    runtime: Runtime = "auto",
    text_field: str | None = None,
) -> list[tuple[str, Perplexity]]:
    """Name and perplexity of each model on a text file, each with its own tokenizer.

    Args:
        length: tokens a window; None is min(1024, positions).
        runtime: what the layers keep in memory; see `cospadi.runtime.layer.set_runtime`.
        text_field: of a file of rows, the one that is text or a chat; None looks for it.

    Raises:
        UserError: a text or model that cannot be read, a window longer than the positions.
    """
    documents = file_documents(text, text_field)
    where = load.pick_device(device)
    stages = stages or Stages()
    results: list[tuple[str, Perplexity]] = []
    for name in models:
        model, tokenizer = open_model(name, where, runtime, stages)
        asked = sequence_length(length, load.positions(model.config))
        windows = text_windows(tokenizer, documents, asked, load.vocabulary(model))
        with stages.stage("evaluate", len(windows)) as progress:
            results.append((str(name), perplexity(model, windows, batch_size, progress.advance)))
        if math.isnan(results[-1][1].value):
            why_no_number(model, name)
        del model  # before the next one is loaded
    return results


def why_no_number(model: nn.Module, name: str | Path) -> NoReturn:
    """Say why a model computes NaN.

    Raises:
        UserError: the tensor that is not finite, or that all are.
    """
    for tensor, parameter in model.named_parameters():
        check_finite(tensor, parameter, Path(name))
    raise UserError(f"{name} computes NaN, though all of its tensors are finite. Its config.json may be damaged")


@dataclass(frozen=True)
class SideBySide:
    """A model beside another one on a text.

    Attributes:
        results: name and perplexity of both.
        divergence: of the first one's predictions from the second's, in nats a token, the mean.
        tokens: the same token by token.
        tokenizer: the first one's.
    """

    results: list[tuple[str, Perplexity]]
    divergence: float
    tokens: ByToken
    tokenizer: Any


def compare_models(
    model: str | Path,
    reference: str | Path,
    text: Path,
    length: int | None = None,
    batch_size: int = 4,
    device: str = "auto",
    stages: Stages | None = None,
    runtime: Runtime = "auto",
    text_field: str | None = None,
) -> SideBySide:
    """`evaluate_models` of two, both in memory at once, in windows that both have the positions for, token by token.

    Raises:
        UserError: as there, or two that do not read or predict the same tokens.
    """
    documents = file_documents(text, text_field)
    where, stages = load.pick_device(device), stages or Stages()
    opened = [open_model(name, where, runtime, stages) for name in (model, reference)]
    (first, its_tokenizer), (second, _) = opened
    asked = sequence_length(length, min(load.positions(one.config) for one, _ in opened))
    windows, others = (text_windows(tokenizer, documents, asked, load.vocabulary(one)) for one, tokenizer in opened)
    if load.vocabulary(first) != load.vocabulary(second) or not torch.equal(windows, others):
        raise UserError(
            f"{model} and {reference} do not read or predict the same tokens, so that there is no divergence between "
            "them. Compare with the model that it was made of"
        )
    with stages.stage("evaluate", len(windows)) as progress:
        tokens = compared(first, second, windows, batch_size, progress.advance)
    *losses, divergence = tokens.means
    found = [Perplexity(perplexity_of(loss), *windows.shape) for loss in losses]
    for one, (opened_model, _), result in zip((model, reference), opened, found, strict=True):
        if math.isnan(result.value):
            why_no_number(opened_model, one)
    return SideBySide([(str(model), found[0]), (str(reference), found[1])], divergence, tokens, its_tokenizer)


def perplexity_json(results: Sequence[tuple[str, Perplexity]], divergence: float | None = None) -> dict[str, Any]:
    """Perplexity of each model; of two, also the difference and ln of the ratio, first against second, and the
    divergence where it was measured."""
    data: dict[str, Any] = {
        "models": [
            {"model": name, "perplexity": _finite(result.value), "windows": result.windows, "length": result.length}
            for name, result in results
        ]
    }
    if len(results) == 2:
        first, second = (result.value for _, result in results)
        data |= {"difference": _finite(first - second), "log_ratio": _finite(math.log(first / second))}
    if divergence is not None:
        data["kl_divergence"] = _finite(divergence)
    return data


def _finite(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None


def perplexity_lines(results: Sequence[tuple[str, Perplexity]], divergence: float | None = None) -> list[str]:
    """A line a model, a line for the difference, and one for the divergence."""
    lines = [
        f"{name}: perplexity {result.value:.4f} ({result.windows} windows of {result.length} tokens)"
        for name, result in results
    ]
    data = perplexity_json(results)
    if data.get("difference") is not None:
        lines.append(f"difference {data['difference']:+.4f}, ln of the ratio {data['log_ratio']:+.4f}")
    if divergence is not None:
        lines.append(f"KL divergence of the predictions from the second's: {divergence:.5f} nats a token")
    return lines
