"""What this machine can do with one model: `cospadi doctor MODEL`."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from cospadi.budget.plan import outlook
from cospadi.commands import tables
from cospadi.commands.bench import memory_of_loading
from cospadi.commands.estimate import estimate
from cospadi.format import safetensors, schema, verify
from cospadi.format.form import DENSE_BITS
from cospadi.jobs.progress import free_memory
from cospadi.model import load
from cospadi.recipe import Recipe

BITS = 3.0
"""To which a dense model would be compressed, if nothing else is said."""

HELD = 2.5
"""Bits a weight that levels take in memory beyond those of their code, roughly: SmolLM2-135M-Instruct and a Llama of
9.1M parameters at 3 bits take 5.5."""


@dataclass
class Prospects:
    """What `cospadi doctor` says of a model.

    Attributes:
        compressed: whether `cospadi compress` wrote it.
        stored: bytes of its tensors on disk; None where its headers do not tell.
        memory_free, disk_free: bytes that this process may still have, the disk's in the folder where it runs.
        gpu_free: the same of the GPU that is used; None without one.
        bits: a weight of the job that is looked ahead at; None for a compressed model.
        after: bytes of the tensors it would leave. running: of those once they are loaded, roughly: codes are decoded.
        job_memory, job_disk, job_seconds: what it would take, as `cospadi plan` tells; None where that is not known.
        weights, load_seconds: memory of the model's tensors once it is loaded, and the time of loading and one token:
            measured of a compressed model; of a dense one what is stored, and no time.
        problems: what cannot be done here, in sentences. notes: what cannot be done with the model as it is, but with
            what a job makes of it.
    """

    model: str
    compressed: bool
    stored: int | None
    memory_free: int
    disk_free: int
    gpu_free: int | None
    bits: float | None = None
    after: int | None = None
    running: int | None = None
    job_memory: int | None = None
    job_disk: int | None = None
    job_seconds: float | None = None
    weights: int | None = None
    load_seconds: float | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The same for machines."""
        return asdict(self)


def prospects(model: str, bits: float = BITS, device: str = "auto", timing: bool = True) -> Prospects:
    """Look at what a model needs beside what there is here. A compressed one is loaded, in a process of its own.

    Args:
        bits: of the job that a dense one is looked at for.
        timing: run pieces of that job for some seconds to tell its time.

    Raises:
        UserError: the model cannot be read, or compressed at all. CheckpointError: it is damaged.
    """
    where = load.pick_device(device)
    folder = load.resolve(model, weights=False)
    compressed = schema.is_compressed(folder)
    gpu_free = torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else None
    found = Prospects(model, compressed, None, free_memory(), shutil.disk_usage(Path.cwd()).free, gpu_free)
    room = found.memory_free if gpu_free is None else gpu_free
    if compressed:
        folder = load.resolve(model)
        verify.read_checkpoint(folder)
        found.stored = sum(tensor.nbytes for tensor in safetensors.stored_tensors(folder).values())
        if not _too_large(found, f"running {model}", found.stored, room, where):
            measured = memory_of_loading(folder, where)
            found.weights, found.load_seconds = measured.tensors, measured.load_seconds
        return found
    recipe = Recipe.build(bits=bits, device=device)
    ahead = outlook(model, recipe)
    costs = estimate(model, recipe, ahead.plan, timing=timing)
    found.stored, found.after, found.bits, found.weights = ahead.before, ahead.after, bits, ahead.before
    found.job_memory, found.job_disk = costs.memory_bytes, costs.disk_bytes
    found.job_seconds = None if costs.seconds is None else sum(costs.seconds.values())
    if ahead.before is not None and ahead.before > room:
        found.notes.append(
            f"Running {model} as it is takes {tables.gigabytes(ahead.before)}, and {tables.gigabytes(room)} are free."
        )
    if ahead.after is not None:
        dense, stored = ahead.plan.dense_bytes, ahead.plan.bytes
        found.running = ahead.after + min(round(HELD / DENSE_BITS * dense), dense - stored)
        _too_large(found, f"running {model}, compressed,", found.running, room, where)
    _too_large(found, f"compressing {model}", costs.memory_bytes, found.memory_free + (gpu_free or 0), where)
    if costs.disk_bytes > found.disk_free:
        found.problems.append(
            f"Compressing {model} takes {tables.gigabytes(costs.disk_bytes)} of disk, and "
            f"{tables.gigabytes(found.disk_free)} are free in {Path.cwd()}: write to another disk."
        )
    return found


def _too_large(found: Prospects, what: str, needed: int, room: int, where: torch.device) -> bool:
    """Whether there is too little memory, which is then a problem."""
    if needed <= room:
        return False
    kind = "memory" if where.type == "cpu" else "the GPU's memory"
    found.problems.append(
        f"{what[0].upper()}{what[1:]} takes {tables.gigabytes(needed)} of {kind}, and {tables.gigabytes(room)} are "
        "free: it needs a larger machine."
    )
    return True


def prospects_table(found: Prospects) -> Table:
    """A line a fact."""
    table = tables.new_table("", "value")
    table.columns[1].justify = "left"
    table.add_row("model", f"{found.model}, {'compressed by cospadi' if found.compressed else 'dense'}")
    table.add_row("stored", tables.megabytes(found.stored))
    table.add_row("memory free", tables.gigabytes(found.memory_free))
    if found.gpu_free is not None:
        table.add_row("memory of the GPU free", tables.gigabytes(found.gpu_free))
    table.add_row("disk free here", tables.gigabytes(found.disk_free))
    if found.weights is not None:
        table.add_row("running it, weights in memory", tables.megabytes(found.weights))
    if found.load_seconds is not None:
        table.add_row("loading it and one token", tables.duration(found.load_seconds))
    if found.bits is not None and found.job_memory is not None and found.job_disk is not None:
        name = f"compressing it to {found.bits:g} bits"
        table.add_row(f"{name}, leaves", tables.megabytes(found.after))
        table.add_row(f"{name}, weights in memory", tables.megabytes(found.running))
        table.add_row(f"{name}, memory", tables.gigabytes(found.job_memory))
        table.add_row(f"{name}, disk", tables.gigabytes(found.job_disk))
        table.add_row(f"{name}, time", "-" if found.job_seconds is None else tables.duration(found.job_seconds))
    return table
