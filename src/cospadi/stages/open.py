"""A compression under way: the model seen as blocks, what is selected of it, the job directory, the workers."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from cospadi import __about__, files
from cospadi.budget.plan import Group, Plan, make_plan
from cospadi.calibration.gradients import gamma_shape
from cospadi.calibration.grams import Whitening
from cospadi.calibration.spill import Spill
from cospadi.calibration.walk import Calls
from cospadi.errors import UserError, first_line
from cospadi.format import safetensors
from cospadi.format.manifest import MANIFEST, weights_digest
from cospadi.jobs.ledger import REPLACED, JobDirectory, Ledger
from cospadi.jobs.pool import Engine, Pool, Task, device_model
from cospadi.jobs.progress import Stages
from cospadi.model import adapters, hub, load
from cospadi.model.blocks import Blocks
from cospadi.model.merge import merge_adapter
from cospadi.model.projections import find_projections, running, select, shared_inputs, what_stays_dense
from cospadi.recipe import CALIBRATED, Recipe
from cospadi.stages.solve import GroupProblem, memory_of

log = logging.getLogger("cospadi")

EXPERTS_DIFFER = 0.05
"""By how much logits may differ, relative in norm, when experts run one by one: bf16 sums in another order."""


@dataclass
class Job:
    """One compression under way: what all its stages look at.

    Attributes:
        asked: the recipe as it was given. recipe: the same, settled.
        blocks: the model.
        folder: where it was read from; None for one that came loaded. source: the same before an adapter was merged.
        hub_name, hub_revision: where the folder came from, or None; the revision where the name had one.
        tokenizer: the model's, or None.
        owner: projection -> the first reader of its input.
        uniform: the plan that gives every group the recipe's ratio.
        stays_dense: what no recipe compresses, in sentences without a stop.
        ledger: finished pieces. spill: hidden states. pool: who solves.
        shared: what follows from the dense model and the text alone, which other jobs take from there; or None.
        cache_bytes: of hidden states kept in memory, and of Grams that a model that runs whole takes in one pass.
        sequences: calibration tokens, int64 (sequences, tokens); None without calibration.
        calls: how blocks are called; None for a model whose blocks do not simply follow each other, which runs whole.
        pass_seconds: of one plain forward pass of the calibration text through the dense model; None without text.
        origin: where the model came from, for the manifest.
    """

    asked: Recipe
    recipe: Recipe
    blocks: Blocks
    folder: Path | None
    source: Path | None
    hub_name: str | None
    hub_revision: str | None
    tokenizer: Any
    owner: Mapping[str, str]
    uniform: Plan
    stays_dense: Sequence[str]
    stages: Stages
    ledger: Ledger
    spill: Spill
    pool: Pool
    cache_bytes: int
    shared: JobDirectory | None = None
    sequences: Tensor | None = None
    calls: Calls | None = None
    pass_seconds: float | None = None
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def compensates(self) -> bool:
        """Whether projections make up for the errors before them."""
        return bool(self.recipe.compensate) and self.calls is not None

    @property
    def refines(self) -> bool:
        """Whether the values of each block are tuned to its output."""
        return bool(self.recipe.refine) and self.calls is not None

    @property
    def walks(self) -> bool:
        """Whether the text runs through the model that is compressed so far."""
        return self.compensates or self.refines

    @property
    def calibrated(self) -> Ledger:
        """Where tokens and gradients are kept."""
        return self.ledger if self.shared is None else self.shared

    @property
    def shares_grams(self) -> bool:
        """Whether Grams of the dense model are kept, too; a model that runs whole takes its own each time."""
        return self.shared is not None and self.calls is not None

    def inputs(self, group: Group) -> tuple[str, ...]:
        """The tensors that a group's members read, each by its first reader."""
        return tuple(dict.fromkeys(self.owner[member.name] for member in group.members))

    def weight(self, group: Group) -> Tensor:
        """W of a group's members side by side, (d1, sum of d2)."""
        return torch.cat([self.blocks.weight(member.name).T for member in group.members], dim=1)

    def task(
        self,
        group: Group,
        whitening: Whitening,
        costs: tuple[Tensor, ...] | None,
        *more: Any,
        weight: Tensor | None = None,
    ) -> Task:
        """A group's problem for the workers, of its own weight unless another is given, and what else they are told."""
        weight = self.weight(group) if weight is None else weight
        problem = GroupProblem(self.recipe, group, whitening, weight, costs, self.blocks.device)
        if not self.pool.here:  # what leaves this process travels through the CPU
            problem = replace(problem.on(torch.device("cpu")), device=torch.device(self.blocks.device.type))
        return Task((problem, *more), memory_of(group))


@contextmanager
def opened(
    model: str | Path | nn.Module,
    recipe: Recipe,
    tokenizer: Any,
    stages: Stages,
    engine: Engine,
    ledger: Ledger,
    cache_bytes: int,
    whole: bool = False,
    shared: JobDirectory | None = None,
) -> Iterator[Job]:
    """Open a model, select its projections and plan them at a uniform ratio.

    Args:
        whole: load a model that is on disk at once, instead of block by block.

    Raises:
        UserError: a model that cannot be compressed, a selection or a ratio that cannot be met.
    """
    settled = recipe.settled()
    with ExitStack() as stack:
        folder, source, hub_name, hub_revision = None, None, None, None
        if isinstance(model, nn.Module):
            if recipe.merge_adapter:
                raise UserError("merge_adapter is for a model on the disk. Merge a loaded one with merge_and_unload()")
            blocks = _given(model)
        else:
            device = load.pick_device(recipe.device)
            if not Path(model).exists():
                hub_name, hub_revision = hub.split_name(model)
            with stages.stage("load", 1):
                folder = source = load.resolve(model, recipe.revision, merge_adapter=recipe.merge_adapter)
                converted = ledger.scratch or Path(stack.enter_context(tempfile.TemporaryDirectory()))
                if recipe.merge_adapter:
                    folder = merge_adapter(folder, converted, recipe.text_only)
                load.load_config(folder)  # refuses what cannot be compressed before any weight is read
                if whole:
                    blocks = load.load_blocks(folder, device, recipe.text_only)
                else:
                    blocks = load.open_blocks(folder, device, converted / "converted", recipe.text_only)
                if not settled.data_free and tokenizer is None:
                    tokenizer = load.load_tokenizer(folder)
        blocks.model.eval()
        modules = dict(blocks.model.named_modules())
        selected = select(find_projections(blocks.model), recipe.include, recipe.exclude, recipe.target)
        if any(projection.name not in modules for projection in selected):
            _unstack(blocks)
        try:
            owner = shared_inputs(blocks.model, selected, blocks.device)
        except (UserError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a model may ask for anything beside tokens
            raise UserError(f"{type(blocks.model).__name__} does not run on text alone: {first_line(error)}") from error
        idle = [projection for projection in selected if projection.name not in owner]
        stays_dense = what_stays_dense(blocks.model, idle)
        for left in stays_dense:
            log.warning("%s", left)
        if blocks.unknown:
            parts = ", ".join(dict.fromkeys(".".join(name.split(".")[:2]) for name in blocks.unknown))
            kind, what = type(blocks.model).__name__, "left out" if recipe.text_only else "kept as they are"
            log.warning("%d tensors of %s, which %s does not know, are %s", len(blocks.unknown), parts, kind, what)
        selected = running(selected, owner)
        uniform = make_plan(selected, settled, owner)
        spill = Spill(cache_bytes, ledger.scratch and ledger.scratch / "hidden")
        stack.callback(spill.close)
        pool = stack.enter_context(engine.open(blocks.device))
        yield Job(
            recipe, settled, blocks, folder, source, hub_name, hub_revision, tokenizer, owner, uniform, stays_dense,
            stages, ledger, spill, pool, cache_bytes, shared,
        )  # fmt: skip


@torch.no_grad()
def _unstack(blocks: Blocks) -> None:
    """Give experts layers of their own.

    Raises:
        UserError: the model computes something else with them.
    """
    tokens = torch.arange(4, device=blocks.device)[None]
    before = blocks.model(input_ids=tokens, use_cache=False).logits.float()
    blocks.unstack_experts()
    after = blocks.model(input_ids=tokens, use_cache=False).logits.float()
    if not (after - before).norm() <= EXPERTS_DIFFER * before.norm():
        raise UserError(
            f"{type(blocks.model).__name__} uses its experts in a way of its own. Leave them dense with "
            "--exclude '*expert*'"
        )


def _given(model: nn.Module) -> Blocks:
    """The blocks of a loaded model."""
    if getattr(model, "hf_quantizer", None) is not None or getattr(model.config, "quantization_config", None):
        raise UserError("the model is already compressed or quantized. Compress the original model instead")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        raise UserError("the model is spread over several devices. Load it on one to compress it")
    return Blocks(model, devices.pop())


def begin(job: Job, plan: Plan | None) -> None:
    """Find out which weights these are, and say in the ledger which job this is, and in what it shares what that is of.

    Args:
        plan: the one that was given; None where it will be measured.

    Raises:
        UserError: the ledger is another job's, or what is shared is of another model or text.
    """
    ledger, folder = job.ledger, job.folder
    digest: str | None = None
    stamps: list[Any] = []
    if folder is not None:
        stamps = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in safetensors.weight_files(folder)]
        noted = job.calibrated.note("weights") if isinstance(job.calibrated, JobDirectory) else None
        if isinstance(noted, list) and len(noted) == 2 and noted[0] == stamps:
            digest = noted[1]
        else:
            with job.stages.stage("load", 1):
                digest = weights_digest(folder)
    job.origin = {"model": job.hub_name, "weights_sha256": digest}
    if job.hub_revision is not None:
        job.origin["revision"] = job.hub_revision
    asked = job.asked.model_dump(mode="json")
    of_all = {"weights": digest} | place_of(job.blocks.device)
    notes, but = {"weights": [stamps, digest]}, ["device"] if job.pool.allow_mixed else []
    if job.shared is not None:
        if folder is None:
            raise UserError("what jobs share is of a model on the disk. Save the loaded one, and give its folder")
        job.shared.begin({"recipe": {name: asked[name] for name in CALIBRATED}} | of_all, notes, but)
    if isinstance(ledger, JobDirectory):
        identity = of_all | {
            "recipe": asked,
            "plan": None if plan is None else hashlib.sha256(repr(plan).encode()).hexdigest(),
            "threads_per_task": job.pool.threads,
        }
        if ledger.begin(identity, notes, but):
            log.info("resuming the unfinished job in %s", ledger.folder)


def place_of(device: torch.device) -> dict[str, Any]:
    """What a job's bytes follow from beside what is asked: versions, threads, the device's model."""
    return {
        "version": {
            "cospadi": __about__.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "threads": torch.get_num_threads(),
        "device": device_model(device),
    }


def job_directory(output: Path) -> Path:
    """Where a job keeps its finished pieces: beside the output."""
    output = Path(os.path.realpath(output))  # behind a link, so that it is on the same disk
    name = output.name
    if len(os.fsencode(name)) > 200:  # a name may be as long as the system allows, and this one is longer
        name = f"{name[:40]}.{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return output.parent / f"{name}.work"


def inputs_of(model: str | Path | nn.Module, **named: str | Path | None) -> dict[Path, str]:
    """What a job reads from this machine's disk -> what it is: the model's folder, or its place in the hub's cache, and
    files by their names.
    """
    source = getattr(model, "name_or_path", "") if isinstance(model, nn.Module) else model
    found = {load.source_folder(str(source)): "the model"} if source else {}
    for folder in [folder for folder in found if folder is not None and adapters.has_adapter(folder)]:
        with suppress(UserError):
            found.setdefault(load.source_folder(str(adapters.base_of(folder)[0])), "the adapter's base")
    for name, file in named.items():
        with suppress(UserError):  # a name that no file can have is told where it is read
            path = files.local_path(file, name) if file is not None else None
            found |= {path: f"the {name}"} if path is not None and path.exists() else {}
    return {path: what for path, what in found.items() if path is not None}


def check_place(output: Path, inputs: Mapping[Path, str], what: str = "output") -> None:
    """Refuse an output, or a job directory beside it, that is, holds or lies in what the job reads.

    Raises:
        UserError: it does, or it has no name beside which a job directory could lie.
    """
    files.check_name(output, what)
    if not Path(os.path.realpath(output)).name:
        raise UserError(f"{what} {output} is the root of all folders, which cannot be replaced. Name one inside it")
    files.check_apart(output, inputs, what)
    files.check_apart(job_directory(output), inputs, "job directory")


def open_ledger(
    output: Path | None, from_disk: bool, overwrite: bool, resume: bool | None, inputs: Mapping[Path, str] | None = None
) -> Ledger:
    """The finished pieces of the job that writes to an output.

    Args:
        output: None for a job that writes nothing.
        from_disk: whether its model is; a model that came loaded has no name by which a job could be resumed.
        inputs: what the job reads, as of `inputs_of`.

    Raises:
        UserError: an output that may not be replaced, or cannot be written; a job directory that cannot be used.
    """
    if output is None:
        return Ledger()
    check_place(output, inputs or {})
    directory = job_directory(output)
    check_before(output, overwrite)
    ledger = JobDirectory(directory, resume) if from_disk else Ledger()
    try:
        if ledger.folder is not None:
            replaced = ledger.folder / REPLACED
            if (
                replaced.exists() and not output.exists()
            ):  # stopped between moving an old output away and the new one in
                replaced.rename(output)
        check_output(output, overwrite or was_written(ledger, output))
    except BaseException:
        ledger.close()
        raise
    return ledger


def check_before(output: Path, overwrite: bool) -> None:
    """Refuse an output that no job has begun to write to, if none may.

    Raises:
        UserError: as of `check_output`.
    """
    if not job_directory(output).exists():
        check_output(output, overwrite)


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output folder that holds something, or anything but a model, or that cannot be written.

    Raises:
        UserError: it does.
    """
    why = _why_no_model(output) if output.is_dir() else None
    if overwrite or why is None:  # else "pass --overwrite" would be bad advice
        files.check_output(output, overwrite)
    if why is not None:
        raise UserError(
            f"output folder {output} {why}: it is no model's, and --overwrite replaces nothing else. Name another, or "
            "remove it yourself"
        )


def _why_no_model(folder: Path) -> str | None:
    """What shows that a folder is neither empty nor one that a model was saved in; None if nothing does."""
    entries = sorted(folder.iterdir())
    if folder / MANIFEST in entries:
        return None
    inside = next((entry for entry in entries if entry.is_dir()), None)
    if inside is not None:
        return f"holds the folder {inside.name}"
    return None if not entries or folder / "config.json" in entries else "holds files and no config.json"


def was_written(ledger: Ledger, output: Path) -> bool:
    """Whether an earlier run of this job has put what is at `output` there, and was stopped only after that."""
    piece = ledger.get("written")
    try:
        content = (output / MANIFEST).read_bytes()
    except OSError:
        return False
    return piece is not None and piece.record.get("manifest") == hashlib.sha256(content).hexdigest()


def check_space(job: Job, plan: Plan, output: Path) -> None:
    """Refuse a disk that will be too full, before anything is computed.

    The job directory holds what gradients leave, and the factors, refined ones beside those that were solved; the
    output is there another time. What is shared holds Grams.
    """
    parameters = {name: parameter.nbytes for name, parameter in job.blocks.model.named_parameters()}
    replaced = sum(parameters[f"{member.name}.weight"] for group in plan.compressed for member in group.members)
    packed = sum(group.parts.total for group in plan.compressed)
    needed = sum(parameters.values()) - replaced + packed
    if isinstance(job.ledger, JobDirectory):
        needed += packed * (2 if job.recipe.refine else 1)
        if job.recipe.wants_gradients:
            full = job.recipe.metric == "two-sided"
            needed += sum(4 * math.prod(gamma_shape(member.d2, full)) for member in plan.projections)
        if job.shared is not None and not job.recipe.data_free:
            readers = {job.owner[member.name]: member.d1 for member in plan.projections}
            needed += max(0, sum(8 * d1**2 for d1 in readers.values()) - job.shared.kept_bytes())
        needed -= job.ledger.kept_bytes()
    free = shutil.disk_usage(files.nearest_folder(output)).free
    if needed > free:
        raise UserError(
            f"output {output} needs {needed / 1e6:.1f} MB; {free / 1e6:.1f} MB are free. Free some or write elsewhere"
        )
