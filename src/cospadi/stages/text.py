"""The calibration text, and how the model's blocks are called with it."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor

from cospadi.calibration.text import token_sequences
from cospadi.calibration.walk import learn_calls, pass_seconds
from cospadi.errors import UserError
from cospadi.files import file_digest
from cospadi.model import load
from cospadi.stages.open import Job

log = logging.getLogger("cospadi")


def read_text(job: Job) -> None:
    """Read the calibration text, find out how the model's blocks are called with it, and time a pass; nothing without
    calibration.

    A resumed job has its tokens already; a local text is then checked to be the one they were read from.

    Raises:
        UserError: no tokenizer, no text, or another one than before.
    """
    recipe, tokenizer = job.recipe, job.tokenizer
    if recipe.data_free:
        return
    if tokenizer is None:
        raise UserError(
            "calibration needs the model's tokenizer: pass tokenizer=, or metric weights, which takes no text"
        )
    local = Path(recipe.calibration or "").expanduser()
    with job.stages.stage("text", 1):
        digest = file_digest(local) if local.is_file() else None
        piece = job.calibrated.get("text")
        if piece is None:
            model = job.blocks.model
            job.sequences = token_sequences(tokenizer, recipe, load.positions(model.config), load.vocabulary(model))
            job.calibrated.put("text", {"sha256_of_file": digest}, {"tokens": job.sequences})
        else:
            if piece.record.get("sha256_of_file") != digest:
                raise UserError(
                    f"calibration text {recipe.calibration} is not the one that the unfinished job in "
                    f"{job.calibrated.folder} has read. Bring it back, or pass --no-resume to restart"
                )
            job.sequences = piece.tensors()["tokens"]
    texts = [(job.sequences, recipe.batch_size), (check_text(job), 1)]
    with job.stages.stage("text", 1):
        try:
            job.calls = learn_calls(job.blocks, texts, job.spill)
        except (RuntimeError, NotImplementedError) as error:  # a model that uses weights outside of their modules
            if job.blocks.stored is None:
                raise
            log.debug("no forward pass by blocks: %s", error)
        if job.calls is None:
            _run_whole(job)
        job.pass_seconds = pass_seconds(job.blocks, job.sequences, recipe.batch_size)


def _run_whole(job: Job) -> None:
    """Take a model whose blocks do not simply follow each other as one that runs whole."""
    notes = ["solved without compensation"] if job.recipe.compensate else []
    notes += ["not refined"] if job.recipe.refine else []
    if job.blocks.stored is not None:
        assert job.folder is not None
        unstacked = job.blocks.unstacked
        job.blocks = load.load_blocks(job.folder, job.blocks.device, job.recipe.text_only)
        if unstacked:
            job.blocks.unstack_experts()
        notes.insert(0, "loaded whole")
    if notes:
        log.warning("blocks of this model do not simply follow each other: %s", " and ".join(notes))


def check_text(job: Job) -> Tensor:
    """The calibration sequences that gradients are taken on."""
    assert job.sequences is not None
    return job.sequences[: job.recipe.gradient_sequences]
