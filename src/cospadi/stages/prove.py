"""The output is opened as a user would open it, before it is put in its place: it must hold everything that the source
held, and compute what the job's own model computes."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cospadi import compat
from cospadi.calibration.walk import check_not_nan, relative_difference
from cospadi.errors import OutputError, first_line
from cospadi.experts import parameter_of
from cospadi.format import safetensors
from cospadi.jobs.ledger import Piece
from cospadi.model import load
from cospadi.runtime.layer import CompressedLinear
from cospadi.stages.open import Job
from cospadi.stages.solve import dense_weights, entries_of, packed_of

WITHOUT_TEXT = 32
"""Tokens, the first of the vocabulary, that stand for a calibration sequence where there is none."""

ROUNDING = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
"""By how much logits may differ, relative in norm, by the model's dtype."""


@dataclass(frozen=True)
class Expected:
    """What an output should hold and compute.

    Attributes:
        names: of tensors, those of the source as the model calls them.
        tokens: int64 (1, tokens), the first calibration sequence.
        logits: (1, tokens, vocabulary). means: name of a projection or block -> the mean of what it gives over tokens,
            in running order.
    """

    names: frozenset[str]
    tokens: Tensor
    logits: Tensor
    means: Mapping[str, Tensor]


@torch.no_grad()
def expect(job: Job, pieces: Sequence[Piece], names: frozenset[str]) -> Expected:
    """Run one sequence through the model that the job holds: in memory with its compressed layers, or the dense one,
    block by block, with what is stored in place of its weights.

    Args:
        names: `names_to_hold`.

    Raises:
        UserError: it computes what is no number.
    """
    model, tokens = job.blocks.model, job.sequences
    if tokens is None:
        count = min(WITHOUT_TEXT, load.vocabulary(model), load.positions(model.config))
        tokens = torch.arange(count)[None]
    with _replaced(job, pieces):
        logits, means = _run(job, model, tokens[:1])
    if job.sequences is None:  # else that would have been seen when the model was opened
        check_not_nan(logits)
    return Expected(names, tokens[:1], logits, means)


def names_to_hold(job: Job) -> frozenset[str]:
    """Of the tensors that the output should hold: those of the source, as the job's model calls them. To be asked for
    before its layers are compressed ones."""
    model = job.blocks.model
    own = model.state_dict().keys()
    parts = defaultdict(set)  # of experts that were stacked
    for name in own:
        parts[parameter_of(name)].add(name)
    names = set(own) if job.folder is None else set()
    stored = safetensors.stored_tensors(job.folder) if job.folder is not None else {}
    for source, place in compat.places_in_model(model, stored).items():
        if source in job.blocks.unknown:
            names |= set() if job.recipe.text_only else {source}
        else:
            names.update(*(parts.get(name, {name}) for name in place.names))
    return frozenset(names - compat.tied_weights(model).keys() - compat.not_saved(model))


@torch.no_grad()
def prove(job: Job, folder: Path, expected: Expected) -> None:
    """Open a folder that was just written, one block in memory at a time, and compare.

    Raises:
        OutputError: it lacks a tensor, holds another one where nothing was compressed, does not load, or computes what
            differs by more than rounding.
    """
    if job.blocks.stored is not None:
        job.blocks.model.to("meta")  # it has done its part, and there is room for the other
    if lost := sorted(expected.names - safetensors.stored_tensors(folder).keys()):
        raise OutputError(f"what was written lacks {lost[0]}, one of {len(lost)} tensors of the source that it lacks")
    if (name := next(_altered(job, folder), None)) is not None:
        raise OutputError(f"what was written holds in tensor {name} something else than the source")
    with tempfile.TemporaryDirectory(dir=job.ledger.scratch) as scratch:
        try:
            model: Any = load.open_compressed(folder, job.blocks.device, Path(scratch)).model
            logits, means = _run(job, model, expected.tokens)
        except (MemoryError, torch.OutOfMemoryError, OSError):  # of this machine, not of what was written
            raise
        except Exception as error:  # whatever it is, a user would meet it
            raise OutputError(f"what was written does not load and run: {first_line(error)}") from error
        dtype = model.dtype
        model.to("meta")  # nothing maps the new files any more
    limit = ROUNDING.get(dtype, ROUNDING[torch.bfloat16])
    off = relative_difference(logits, expected.logits)
    if not off <= limit:
        both = ((name, means[name], mean) for name, mean in expected.means.items() if name in means)
        each = ((name, relative_difference(found, mean)) for name, found, mean in both)
        first = next((name for name, found in each if not found <= limit / 4), "the model's head")
        raise OutputError(
            f"what was written computes logits that differ by {off:.2g} from those of the job's own model; {first} is "
            "the first to differ"
        )


def _altered(job: Job, folder: Path) -> Iterator[str]:
    """Names of tensors that are in both, the source's folder and the output's, and differ by more than a cast."""
    if job.folder is None:
        return
    model = job.blocks.model
    source, written = safetensors.stored_tensors(job.folder), safetensors.stored_tensors(folder)
    layers = (name for name, module in model.named_modules() if isinstance(module, CompressedLinear))
    kept = written.keys() - {f"{name}.weight" for name in layers}
    for name, place in compat.places_in_model(model, source).items():
        if not place.same and name not in job.blocks.unknown:
            continue  # the model holds it in another form
        for other in {name, *place.names} & kept:
            with safetensors.open_file(source[name].path) as ours, safetensors.open_file(written[other].path) as theirs:
                if not _equal(ours.get_tensor(name), theirs.get_tensor(other)):
                    yield other


def _equal(source: Tensor, written: Tensor) -> bool:
    """Whether two tensors have the same bytes, or would have if the first one were cast to the dtype of the second."""
    if source.dtype != written.dtype or source.shape != written.shape:
        return torch.equal(source.to(written.dtype), written)
    return torch.equal(source.flatten().view(torch.uint8), written.flatten().view(torch.uint8))


def _run(job: Job, model: Any, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of one sequence, on the CPU, and the means over tokens of what projections and blocks give."""
    means: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, Tensor):
                means[name] = output.float().flatten(0, -2).mean(0).cpu()

        return hook

    watched = [projection.name for projection in job.uniform.projections]
    watched += map(job.blocks.name_of, range(len(job.blocks)))
    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in watched]
    try:
        logits: Tensor = model(input_ids=tokens.to(job.blocks.device), use_cache=False).logits
        return logits.cpu(), means
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _replaced(job: Job, pieces: Sequence[Piece]) -> Iterator[None]:
    """Inside this block a model that is on the disk runs with what is stored in place of its projections' weights."""
    if job.blocks.stored is None:
        yield
        return
    by_block: dict[str, list[Piece]] = defaultdict(list)
    block_of = {projection.name: job.blocks.name_of(projection.block) for projection in job.uniform.projections}
    for piece in pieces:
        for block in {block_of[name] for name in entries_of(piece)}:
            by_block[block].append(piece)

    def replace(name: str) -> Callable[..., None]:
        def before(_module: nn.Module, _args: Any) -> None:  # after the block's own weights have come
            for piece in by_block[name]:
                for layer, weight in dense_weights(packed_of(piece)).items():
                    if layer.startswith(f"{name}."):
                        parameter = job.blocks.model.get_parameter(f"{layer}.weight")
                        parameter.data = weight.to(parameter)

        return before

    handles = [job.blocks.model.get_submodule(name).register_forward_pre_hook(replace(name)) for name in by_block]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
