"""A compressed model trained towards the dense one's predictions: Adam on float32 masters, the best state kept."""

from __future__ import annotations

import logging
import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cospadi.calibration.distance import divergence
from cospadi.calibration.loss import total_loss
from cospadi.jobs.ledger import Ledger
from cospadi.jobs.progress import Stage, free_memory, hours, memory_told, peak_memory
from cospadi.jobs.ranks import Ranks
from cospadi.recipe import Healing
from cospadi.stages.clock import Clock
from cospadi.stages.masters import Student
from cospadi.stages.teacher import Targets, rows_at_once

log = logging.getLogger("cospadi")

CHECKS = 16
"""Times that the sequences which were set aside are looked at, and the state is kept for a later run."""
CHECKING = 0.1
"""Part of a run's time that checks may take, but for the last one; where they would take more there are fewer."""
PATIENCE = 8
"""Checks without a better state after which training ends."""
WARM_UP = 10
"""Steps over which the learning rate rises."""
BETAS = (0.9, 0.95)
ROOM = 0.5
"""Part of the free memory that activations may take before they are computed twice instead."""


class Quality(NamedTuple):
    """Of sequences that were set aside: mean divergence from the dense model, and mean loss, nats a token."""

    divergence: float
    loss: float


class Distilled(NamedTuple):
    """The state of a run.

    Attributes:
        numbers: the best ones. best: the step after which they were reached; 0 for those it began with.
        quality: of them. steps: taken so far. idle: checks since then.
    """

    numbers: dict[str, Tensor]
    best: int
    quality: Quality
    steps: int = 0
    idle: int = 0


@torch.no_grad()
def judge(model: Any, held: Targets) -> Quality:
    """What a model is worth on sequences that were set aside."""
    far = loss = 0.0
    count = 0
    for tokens, kept in held.batches(_rows(model, held)):
        tokens, kept = tokens.to(model.device), type(kept)(*(part.to(model.device) for part in kept))
        logits = model(input_ids=tokens, use_cache=False).logits
        found = divergence(logits, kept)
        far, loss, count = far + float(found.double().sum()), loss + total_loss(logits, tokens), count + found.numel()
    return Quality(far / count, loss / count)


def distil(
    student: Student,
    targets: Targets,
    held: Targets,
    before: Quality,
    how: Healing,
    clock: Clock,
    closing: float,
    ledger: Ledger,
    ranks: Ranks,
    progress: Stage,
) -> Distilled:
    """Train, as long as there is time.

    Args:
        targets: to learn. held: to choose the best state by. before: what the model is worth there.
        closing: seconds that what follows takes.
    """
    model, masters = student.model, student.masters
    length = targets[[0]][0].shape[1]
    size = max(1, how.batch // length)
    optimizer = torch.optim.Adam([master.numbers for master in masters.values()], lr=0.0, betas=BETAS, eps=1e-12)
    student.put()
    _save_memory(model, min(size, _rows(model, targets)) * length)
    state = _resumed(student, optimizer, ledger, ranks)
    if state is None:
        state = Distilled(student.numbers(), 0, before)
        _keep(student, optimizer, state, clock, ledger, ranks)
        log.info("before: divergence %.5f, loss %.4f", *state.quality)
    step, checked, checking = state.steps, clock.done(state.steps, closing), 0.0
    first, begun_at = step, clock.spent
    while (fraction := ranks.agreed(clock.done(step, closing))) < 1 and state.idle < PATIENCE:
        rate = how.learning_rate * min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * fraction)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        _gradients(student, targets, _sequences(len(targets), step, size, how.seed), ranks)
        optimizer.step()
        student.put()
        step += 1
        fraction = ranks.agreed(clock.done(step, closing))
        left = clock.left(step, (clock.spent - begun_at) / (step - first))
        progress.reach(min(fraction, 1.0), f"step {step}", left)
        due = int(fraction * CHECKS) > int(checked * CHECKS)
        if fraction >= 1 or (due and ranks.agreed(clock.steps is not None or checking <= CHECKING * clock.spent)):
            checked, begun = fraction, clock.spent
            now = ranks.agreed(judge(model, held) if ranks.first else None)
            checking += clock.spent - begun
            where = [f"step {step}", f"{hours(left)} left", "divergence {:.5f}, loss {:.4f}".format(*now)]
            log.info(" · ".join([*where, *memory_told(peak_memory())]))
            better = now.divergence < state.quality.divergence
            state = state._replace(steps=step, idle=0 if better else state.idle + 1)
            if better:
                state = state._replace(numbers=student.numbers(), best=step, quality=now)
            _keep(student, optimizer, state, clock, ledger, ranks)
    if state.idle >= PATIENCE:
        log.info("no better state in %d checks: training ends", PATIENCE)
    return state._replace(steps=step)


def _gradients(student: Student, targets: Targets, chosen: list[int], ranks: Ranks) -> None:
    """Of the mean divergence over a step's sequences, of which each process takes its part."""
    model = student.model
    mine = chosen[ranks.rank :: ranks.count]
    rows = _rows(model, targets)
    for start in range(0, len(mine), rows):
        tokens, kept = targets[mine[start : start + rows]]
        tokens, kept = tokens.to(model.device), type(kept)(*(part.to(model.device) for part in kept))
        logits = model(input_ids=tokens, use_cache=False).logits
        found = divergence(logits, kept)
        (found.mean(-1).sum() / len(chosen)).backward()  # type: ignore[no-untyped-call]
    for master, grad in student.gradients():
        master.numbers.grad = ranks.summed(grad).mul_(master.unit)


def _sequences(count: int, step: int, size: int, seed: int) -> list[int]:
    """The sequences of a step: the text again and again, each time in another order."""
    found: list[int] = []
    for place in range(step * size, (step + 1) * size):
        again, index = divmod(place, count)
        found.append(int(_order(count, again, seed)[index]))
    return found


@lru_cache(maxsize=2)
def _order(count: int, again: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed + again))


def _rows(model: Any, targets: Targets) -> int:
    """Sequences in one forward pass."""
    length = targets[[0]][0].shape[1]
    return rows_at_once(length, model.config.get_text_config(decoder=True).vocab_size)


# What a later run goes on from


def _keep(
    student: Student,
    optimizer: torch.optim.Optimizer,
    state: Distilled,
    clock: Clock,
    ledger: Ledger,
    ranks: Ranks,
) -> None:
    if not ranks.first:
        return
    tensors = {f"best/{name}": one for name, one in state.numbers.items()}
    for name, master in student.masters.items():
        tensors[f"now/{name}"] = master.numbers
        for part, value in optimizer.state.get(master.numbers, {}).items():
            tensors[f"{part}/{name}"] = value
    record = {name: getattr(state, name) for name in ("best", "quality", "steps", "idle")}
    ledger.put("state", record | {"spent": clock.spent}, tensors)


def _resumed(student: Student, optimizer: torch.optim.Optimizer, ledger: Ledger, ranks: Ranks) -> Distilled | None:
    piece = ranks.agreed(ledger.get("state") if ranks.first else None)
    if piece is None:
        return None
    tensors = piece.tensors()
    with torch.no_grad():
        for name, master in student.masters.items():
            master.numbers.copy_(tensors[f"now/{name}"])
            parts = ("step", "exp_avg", "exp_avg_sq")
            if f"step/{name}" in tensors:
                optimizer.state[master.numbers] = {
                    part: tensors[f"{part}/{name}"].to("cpu" if part == "step" else master.numbers.device)
                    for part in parts
                }
    student.put()
    numbers = {name: tensors[f"best/{name}"].to(master.numbers.device) for name, master in student.masters.items()}
    record = piece.record
    log.info("going on after step %d", record["steps"])
    return Distilled(numbers, record["best"], Quality(*record["quality"]), record["steps"], record["idle"])


# Memory


def _save_memory(model: Any, tokens: int) -> None:
    """Have blocks compute their activations again in the backward pass, where those of so many tokens would take too
    much of the free memory."""
    short, longer = 8, 24
    per_token = max(0.0, (_saved_bytes(model, longer) - _saved_bytes(model, short)) / (longer - short))
    free = torch.cuda.mem_get_info(model.device)[0] if model.device.type == "cuda" else free_memory()
    if per_token * tokens > ROOM * free and model.supports_gradient_checkpointing:
        log.info("activations of a step would take %.1f GB: gradient checkpointing", per_token * tokens / 1e9)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True  # which it asks for; what is inside stays as it is, without dropout


def _saved_bytes(model: Any, length: int) -> int:
    """Bytes that a forward pass of one sequence keeps for the backward pass."""
    sizes: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    tokens = torch.zeros((1, length), dtype=torch.int64, device=model.device)
    with torch.autograd.graph.saved_tensors_hooks(count, _same):
        logits = model(input_ids=tokens, use_cache=False).logits
    return sum(sizes.values()) + 2 * int(logits.nbytes)  # the loss keeps them, and gives a gradient as large


def _same(tensor: Tensor) -> Tensor:
    return tensor
