"""Healing, top to bottom: the dense model's predictions, what a folder stores trained towards them, written anew."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cospadi import __about__
from cospadi.calibration.documents import file_documents
from cospadi.calibration.gradients import deterministic
from cospadi.calibration.text import sequence_length, text_windows
from cospadi.compat import cpu_multiplies_bf16
from cospadi.errors import UserError
from cospadi.format.manifest import MANIFEST, weights_digest
from cospadi.format.schema import is_compressed
from cospadi.format.verify import read_checkpoint
from cospadi.jobs.ledger import JobDirectory, Ledger
from cospadi.jobs.progress import Stages, hours
from cospadi.jobs.ranks import Ranks, ranks
from cospadi.model import hub, load
from cospadi.recipe import Healing
from cospadi.stages.clock import Clock
from cospadi.stages.distil import Distilled, Quality, distil, judge
from cospadi.stages.masters import student_of
from cospadi.stages.open import open_ledger, place_of, was_written
from cospadi.stages.rewrite import rewrite
from cospadi.stages.teacher import Targets, check_teacher, split, teach

log = logging.getLogger("cospadi")

TEACHER = 1 / 6
"""Part of the time that the dense model may take: a step of training costs four or five times what it does there."""

LENGTH = 256
"""Tokens of a sequence, unless told otherwise."""


def heal(
    folder: str | Path,
    text: str | Path,
    output: str | Path,
    how: Healing,
    *,
    teacher: str | Path | None = None,
    text_field: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    resume: bool | None = None,
    stages: Stages | None = None,
) -> Healed:
    """Train what a compressed folder stores towards the predictions of the dense model that it was made of, and write
    the result: the same supports, codes and bytes.

    What is finished is kept in OUTPUT.work until the output is there: the same call resumes where one that died has
    stopped. Where no step makes the model better on text that is set aside, the output is a copy of the folder. Started
    by `accelerate launch`, its processes share the text.

    Args:
        folder: what `compress` wrote, or where it is on the hub.
        text: a file of text, or of rows; its last eighth is set aside, of long ones 16,384 tokens.
        output: folder to write to.
        teacher: the dense model; None is the one that the folder names.
        text_field: of a file of rows, the one that is text or a chat; None looks for it.
        device, overwrite, resume: as of `compress`.
        stages: where to show progress.

    Raises:
        UserError: a request that cannot be met; nothing was written to the output.
    """
    stages, output, text = stages or Stages(), Path(output), Path(text)
    clock = Clock(None if how.minutes is None else 60 * how.minutes, how.steps)
    world, where = ranks(load.pick_device(device))
    source = hub.folder_of(folder)
    _, manifest = read_checkpoint(source)
    if manifest is None:
        raise UserError(f"{source / MANIFEST} is not there, which tells what the folder was made of. Compress again")
    named, dense = _teacher(source, manifest, teacher)
    inputs = {source: "the compressed model", dense: "the teacher", text: "the text"}
    with ExitStack() as stack:
        ledger = open_ledger(output, True, overwrite, resume, inputs) if world.first else Ledger()
        stack.callback(ledger.close)
        with stages.stage("text", 1):
            windows = _windows(source, dense, text, text_field, how)
            training, aside = split(windows, how.seed)
            name = None if Path(named).exists() else named
            origin = {"model": name, "weights_sha256": weights_digest(dense)}
        if world.first:
            _begin(ledger, source, origin, windows, how, where)
        finished = world.first and was_written(ledger, output)
        if not world.agreed(finished):
            # What the dense model predicts, for as much of the text as there is time for.
            model_of = partial(_open_teacher, dense, source, manifest, origin, where)
            held, targets, loss = _taught(model_of, training, aside, how, clock, ledger, world, stages)

            # What the folder is worth, and how long its end will take.
            begun = time.monotonic()
            with stages.stage("judge", 1):
                model: Any = load.load_model(source, where)
                before = world.agreed(judge(model, held) if world.first else None)
            closing = 2 * (time.monotonic() - begun)

            # Its numbers in float32, trained on what is stored of them.
            if model.dtype == torch.float16 or (where.type == "cpu" and not cpu_multiplies_bf16()):
                model.to(torch.float32)
            student = student_of(model, source, how.trained)
            with (
                stages.stage("heal", 1) as progress,
                torch.inference_mode(False),
                torch.enable_grad(),
                deterministic(where),
            ):
                found = distil(student, targets, held, before, how, clock, closing, ledger, world, progress)

            # The same files with these numbers, if they are better as they are stored.
            if world.first:
                record = _record(how, origin, text, windows, targets, held, found)
                result = {"before": list(before), "dense_loss": loss, "best": found.best, **record["text"]}
                result |= {"steps": found.steps, "top": how.top}
                tensors = student.stored(found.numbers) if found.best else {}
                del student, model
                with stages.stage("write", 1):
                    judged = partial(_judged, held, where)
                    rewrite(source, output, ledger, manifest, tensors, record, result, judged)
        piece = ledger.get("written") if world.first else None
        result = world.agreed(piece and piece.record["result"])
        if isinstance(ledger, JobDirectory):
            ledger.remove()
        return _healed(result, output, stages)


@dataclass(frozen=True)
class Healed:
    """What `heal` gives back.

    Attributes:
        before, after: what the folder and the output are worth on the text that was set aside; equal where no step was
            better.
        dense_loss: of the dense model there, nats a token.
        steps: taken. best: the one whose numbers were kept; 0 for those that it began with.
        sequences, length, held_out: sequences to train on, their tokens, and those that were set aside.
        top: of the dense model's predictions, as many for a token as were learned, over which divergences are taken;
            0 where the text itself was, whose loss they are then.
        folder: where it was written. seconds: stage -> seconds, of this run.
    """

    before: Quality
    after: Quality
    dense_loss: float
    steps: int
    best: int
    sequences: int
    length: int
    held_out: int
    top: int
    folder: Path
    seconds: dict[str, float]

    @property
    def better(self) -> bool:
        return self.after.divergence < self.before.divergence


def _healed(result: dict[str, Any], output: Path, stages: Stages) -> Healed:
    fields = {name: result[name] for name in ("dense_loss", "steps", "best", "sequences", "length", "held_out", "top")}
    before, after = Quality(*result["before"]), Quality(*result["after"])
    return Healed(before, after, **fields, folder=output, seconds=stages.seconds)


def _teacher(source: Path, manifest: dict[str, Any], given: str | Path | None) -> tuple[str, Path]:
    """The dense model's name, and its folder.

    Raises:
        UserError: it has no name, or is not to be had, or is compressed itself.
    """
    told = manifest.get("source")
    origin = told if isinstance(told, dict) else {}
    name = given
    if name is None:
        name = "@".join(str(origin[part]) for part in ("model", "revision") if origin.get(part))
        if not name:
            raise UserError(
                f"{source} does not tell the name of the model that it was made of, which lay on a disk. Name it with "
                "--teacher"
            )
    folder = load.resolve(name)
    if is_compressed(folder):
        raise UserError(f"the teacher {name} is compressed itself. Name the dense model with --teacher")
    load.load_config(folder)
    return str(name), folder


def _windows(source: Path, dense: Path, text: Path, text_field: str | None, how: Healing) -> Tensor:
    """The text's tokens, int64 (sequences, length).

    Raises:
        UserError: a text that cannot be read or is too short, or two models that do not read the same tokens of it.
    """
    documents = file_documents(text, text_field)
    found = []
    for folder in (source, dense):
        config = load.read_config(folder)
        positions = load.positions(config)
        length = sequence_length(min(LENGTH, positions) if how.length is None else how.length, positions)
        vocabulary = config.get_text_config(decoder=True).vocab_size
        found.append(text_windows(load.load_tokenizer(folder), documents, length, vocabulary))
    ours, theirs = found
    if not torch.equal(ours, theirs):
        raise UserError(
            f"the teacher {dense} reads other tokens than {source}: it is not the model that the folder was made of. "
            "Name that one with --teacher"
        )
    return ours


def _begin(
    ledger: Ledger, source: Path, origin: dict[str, Any], windows: Tensor, how: Healing, device: torch.device
) -> None:
    """Say in the ledger which job this is.

    Raises:
        UserError: the ledger is another job's.
    """
    assert isinstance(ledger, JobDirectory)
    asked = {name: value for name, value in how.model_dump().items() if name != "minutes"}
    identity = {
        "heal": asked,
        "weights": weights_digest(source),
        "teacher": origin["weights_sha256"],
        "text": _digest(windows),
        **place_of(device),
    }
    if ledger.begin(identity, {}):
        log.info("resuming the unfinished job in %s", ledger.folder)


def _digest(windows: Tensor) -> str:
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()


def _open_teacher(
    dense: Path, source: Path, manifest: dict[str, Any], origin: dict[str, Any], device: torch.device
) -> Any:
    """The dense model, which is that of the folder.

    Raises:
        UserError: it is another one.
    """
    model = load.load_model(dense, device)
    told = manifest.get("source")
    if not isinstance(told, dict) or told.get("weights_sha256") != origin["weights_sha256"]:
        check_teacher(model, load.load_model(source, device), str(dense))
        log.warning(
            "%s is not, by its hash, what %s was made of. It is the teacher all the same, since whatever was not "
            "compressed is equal in both",
            dense,
            source,
        )
    return model


def _taught(
    model_of: Callable[[], Any],
    training: Tensor,
    aside: Tensor,
    how: Healing,
    clock: Clock,
    ledger: Ledger,
    world: Ranks,
    stages: Stages,
) -> tuple[Targets, Targets, float]:
    """What was set aside and what is learned, with the dense model's predictions, and its loss on the first."""
    opened = cache(model_of)
    clock.before = world.agreed(_spent(ledger) if world.first else None)

    if clock.limit is not None:
        most = TEACHER * clock.limit
        log.info("the dense model reads up to %d sequences, for %s at most", len(aside) + len(training), hours(most))

    def goes_on() -> bool:
        return clock.steps is not None or clock.done(0) < TEACHER

    with stages.stage("teacher", len(aside) + len(training)) as progress:
        held = teach(opened, aside, "held", how.top, ledger, world, clock, lambda: True, progress.advance)
        targets = teach(opened, training, "teacher", how.top, ledger, world, clock, goes_on, progress.advance)
    log.info("the teacher has read %d sequences of %d tokens", len(targets) + len(held), training.shape[1])
    loss = sum(piece.record["loss"] for piece in held.pieces)
    return held, targets, loss / (len(held) * (aside.shape[1] - 1))


def _spent(ledger: Ledger) -> float:
    """Seconds that earlier runs of the job have taken, as far as they noted it."""
    noted = (ledger.get(name) for name in ("state", "spent"))
    return max((piece.record["spent"] for piece in noted if piece is not None), default=0.0)


def _judged(held: Targets, device: torch.device, folder: Path) -> Quality:
    return judge(load.load_model(folder, device), held)


def _record(
    how: Healing,
    origin: dict[str, Any],
    text: Path,
    windows: Tensor,
    targets: Targets,
    held: Targets,
    found: Distilled,
) -> dict[str, Any]:
    """What the manifest says of it."""
    asked = {name: value for name, value in how.model_dump().items() if value is not None and name != "length"}
    count = {"sequences": len(targets), "held_out": len(held), "length": windows.shape[1]}
    return {
        "package_version": __about__.__version__,
        "teacher": {name: value for name, value in origin.items() if value is not None},
        "settings": asked,
        "text": {"name": text.name, "tokens_sha256": _digest(windows), **count},
        "steps": found.steps,
        "best_step": found.best,
    }
