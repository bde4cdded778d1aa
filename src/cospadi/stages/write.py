"""The end of a job: the compressed model in memory, or its folder, whole or not at all."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cospadi import __about__, files
from cospadi.budget.plan import Plan
from cospadi.calibration.documents import DEFAULT_DATASET
from cospadi.format import safetensors
from cospadi.format.card import CARD
from cospadi.format.form import dense_bytes
from cospadi.format.manifest import MANIFEST, write_manifest
from cospadi.format.schema import StoredProjection
from cospadi.jobs.ledger import OUTPUT, REPLACED, Piece
from cospadi.jobs.progress import Stage
from cospadi.model import companions, load
from cospadi.recipe import Recipe
from cospadi.runtime.swap import mark_compressed, quantizer_of, swap_in_layers
from cospadi.stages.card import model_card
from cospadi.stages.open import Job, was_written
from cospadi.stages.prove import Expected, expect, names_to_hold, prove
from cospadi.stages.solve import Packed, entries_of, packed_of

log = logging.getLogger("cospadi")


def finish(job: Job, plan: Plan, pieces: Sequence[Piece], output: Path | None) -> dict[str, Any]:
    """Leave the compressed model in memory, if it was there, and write it to `output`, if there is one.

    Returns:
        The manifest; with hashes of files if they were written.
    """
    manifest, names = describe(job, plan, pieces), names_to_hold(job)
    if job.blocks.stored is None:
        load_factors(job.blocks.model, [packed_of(piece) for piece in pieces])
        quantizer = quantizer_of(job.blocks.model)
        quantizer.manifest, quantizer.carried = manifest, {} if job.recipe.text_only else dict(job.blocks.unknown)
        quantizer.card = model_card(job, plan, manifest, None)
    if output is None:
        return manifest
    if was_written(job.ledger, output):
        return files.read_json(output / MANIFEST)
    log.info("writing %s", output)
    with job.stages.stage("prove", 2) as progress:
        expected = expect(job, pieces, names)
        progress.advance(1)
    return write(job, output, manifest, plan, pieces, expected)


def describe(job: Job, plan: Plan, pieces: Sequence[Piece]) -> dict[str, Any]:
    """The manifest but for the hashes of files: source, recipe, calibration, and what each projection became."""
    manifest: dict[str, Any] = {
        "package_version": __about__.__version__,
        "source": job.origin,
        "recipe": job.asked.model_dump(mode="json") | {"calibration": _source_name(job.recipe)},
        "projections": {},
    }
    if left := plan.left_dense:
        manifest["dense"] = {member.name: dense_bytes(member.d1, member.d2) for member in left}
    if job.stays_dense:
        manifest["stays_dense"] = list(job.stays_dense)
    if job.recipe.text_only and job.folder is not None and job.blocks.unknown:
        sizes = safetensors.tensor_sizes(job.folder)
        manifest["left_out"] = {
            "parts": list(dict.fromkeys(".".join(name.split(".")[:2]) for name in job.blocks.unknown)),
            "tensors": len(job.blocks.unknown),
            "bytes": sum(sizes[name] for name in job.blocks.unknown),
        }
    if (sequences := job.sequences) is not None:
        digest = hashlib.sha256(sequences.numpy().tobytes()).hexdigest()
        manifest["calibration"] = {"sequences": len(sequences), "length": sequences.shape[1], "tokens_sha256": digest}
    for piece in pieces:
        for name, entry in entries_of(piece).items():
            manifest["projections"][name] = {
                "layout": entry.form.layout,
                "bytes": {
                    tensor.rpartition(".")[2]: safetensors.tensor_nbytes(*what)
                    for tensor, what in entry.tensors(name).items()
                },
                "relative_error": piece.record["errors"][name],
                "gram_shift": piece.record["shift"],
            }
            if name in (losses := piece.record.get("losses", {})):
                manifest["projections"][name]["loss"] = losses[name]
    return manifest


def load_factors(model: nn.Module, packed: Sequence[Packed]) -> None:
    """Swap the compressed layers into the model and fill them; biases move over. Leaves it as from_pretrained would."""
    old = {name: model.get_submodule(name) for item in packed for name in item.entries}
    entries = {
        name: entry.model_copy(update={"bias": old[name].bias is not None})
        for item in packed
        for name, entry in item.entries.items()
    }
    first = next(iter(old.values()))
    assert isinstance(first, nn.Linear)
    layers = swap_in_layers(model, entries, first.weight.dtype, first.weight.device)
    with torch.no_grad():
        for item in packed:
            for full_name, tensor in item.tensors.items():
                name, _, part = full_name.rpartition(".")
                getattr(layers[name], part).copy_(tensor)
        for name, layer in layers.items():
            layer.eval()
            weight = old[name].weight
            assert isinstance(weight, Tensor)
            layer.requires_grad_(weight.requires_grad)
            if layer.bias is not None:
                bias = old[name].bias
                assert isinstance(bias, Tensor)
                layer.bias.copy_(bias)
    mark_compressed(model, entries)


def write(
    job: Job,
    output: Path,
    manifest: dict[str, Any],
    plan: Plan,
    pieces: Sequence[Piece],
    expected: Expected,
) -> dict[str, Any]:
    """Write the checkpoint beside `output`, prove it, then rename; returns the manifest with the files' hashes.

    A model that was never in memory is written tensor by tensor: from the source's files and the ledger's.
    """
    from transformers import GenerationConfig

    ledger, folder = job.ledger, job.folder
    staging = ledger.folder and ledger.folder / OUTPUT
    retired = ledger.folder and ledger.folder / REPLACED
    model: Any = job.blocks.model
    with files.staged(output, staging, retired) as staging:
        if job.blocks.stored is not None:
            write_streamed(job, staging, pieces)
        else:
            kept = model.generation_config
            if folder is not None and (folder / "generation_config.json").exists():
                # The source's own file is copied below; some public ones would not pass the check that saving makes.
                model.generation_config = GenerationConfig()
            try:
                with (
                    job.stages.stage("write", _written_bytes(model)) as progress,
                    _following(staging, progress),
                ):
                    model.save_pretrained(staging)
            finally:
                model.generation_config = kept
        with job.stages.stage("write", 1):
            if folder is not None:
                companions.copy_companions(folder, staging)
            elif job.tokenizer is not None:
                job.tokenizer.save_pretrained(staging)
            (staging / CARD).write_text(model_card(job, plan, manifest, staging), encoding="utf-8", newline="\n")
            manifest = write_manifest(staging, manifest)
        with job.stages.stage("prove", 2) as progress:
            progress.reach(1)
            prove(job, staging, expected)
            progress.reach(2)
        with job.stages.stage("write", 1):
            digest = hashlib.sha256((staging / MANIFEST).read_bytes()).hexdigest()
            ledger.put("written", {"manifest": digest})
    return manifest


def write_streamed(job: Job, staging: Path, pieces: Sequence[Piece]) -> None:
    """Write config.json and the weights of a model that was never in memory."""
    blocks = job.blocks
    assert job.folder is not None
    model: Any = blocks.model
    entries: dict[str, StoredProjection] = {}
    held: dict[str, Path] = {}
    for piece in pieces:
        for name, entry in entries_of(piece).items():
            bias = getattr(model.get_submodule(name), "bias", None) is not None
            entries[name] = entry.model_copy(update={"bias": bias})
            assert piece.path is not None
            held |= dict.fromkeys(entry.tensors(name), piece.path)
    swap_in_layers(model, entries, blocks.dtype(next(iter(entries))), "meta")
    mark_compressed(model, entries)
    load.write_config(model, staging, job.folder)
    state, _ = quantizer_of(model).get_state_dict_and_metadata(model)
    tensors = load.tensors_to_write(model, state, blocks, held, job.recipe.text_only)
    with job.stages.stage("write", sum(tensor.nbytes for tensor in tensors.values())) as progress:
        safetensors.write_weights(staging, tensors, progress.advance)


def _written_bytes(model: Any) -> int:
    """Bytes of tensors that saving a compressed model writes."""
    state, _ = quantizer_of(model).get_state_dict_and_metadata(model)
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in state.values()}.values())


@contextmanager
def _following(folder: Path, progress: Stage) -> Iterator[None]:
    """Show how much of the safetensors files in a folder is there, while another library writes them."""
    done = threading.Event()

    def follow() -> None:
        while not done.wait(0.2):
            progress.reach(sum(path.stat().st_size for path in safetensors.all_safetensors(folder)))

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        done.set()
        follower.join()


def _source_name(recipe: Recipe) -> str | None:
    """The calibration source without a path of this machine."""
    if recipe.data_free:
        return None
    name = recipe.calibration or DEFAULT_DATASET
    return Path(name).name if Path(name).exists() else name
