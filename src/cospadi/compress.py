"""The main job, top to bottom: text, Gram, whitened weights, dictionary and codes, packed bytes, checkpoint."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from cospadi import __about__, files
from cospadi.budget.plan import Group, Plan, check_plan, make_plan, read_plan, read_plan_recipe
from cospadi.calibration import walk as sequence
from cospadi.calibration.grams import whiten
from cospadi.calibration.spill import Shelf
from cospadi.calibration.text import DEFAULT_DATASET
from cospadi.errors import UserError
from cospadi.format import safetensors
from cospadi.format.form import dense_bytes
from cospadi.format.manifest import MANIFEST, weights_digest, write_manifest
from cospadi.format.schema import StoredProjection
from cospadi.jobs.ledger import OUTPUT, REPLACED, JobDirectory, Ledger, Piece
from cospadi.jobs.pool import Engine, Task, device_model
from cospadi.jobs.progress import Stage, Stages
from cospadi.model import companions, load
from cospadi.model.blocks import Blocks, check_finite
from cospadi.model.projections import dense_experts, find_projections, kinds_of, select, shared_inputs
from cospadi.recipe import Recipe
from cospadi.runtime.swap import mark_compressed, quantizer_of, swap_in_layers
from cospadi.stages.budgets import allocate, estimate_fisher
from cospadi.stages.card import model_card
from cospadi.stages.open import (
    CACHE_BYTES,
    Job,
    allocation_of,
    each_group,
    needs_text,
    pieces_of,
    read_text,
    run_tasks,
    wants_compensation,
    weighs_columns,
)
from cospadi.stages.solve import Packed, dense_weights, factorize

log = logging.getLogger("cospadi")


@dataclass(frozen=True)
class Compressed:
    """What `compress` gives back.

    Attributes:
        plan: groups, k, s and bytes.
        manifest: what `cospadi.json` holds (hashes of files only if it was written).
        errors: projection -> relative error in the whitened metric, of the stored factors.
        bytes_before, bytes_after: of the whole checkpoint's tensors as stored; None where nothing was read or written.
        seconds: stage -> seconds.
        folder: where it was written; None for a result in memory.
        device: where the model computes.
        in_memory: the model, if it was made in memory.
    """

    plan: Plan
    manifest: dict[str, Any]
    errors: dict[str, float]
    bytes_before: int | None
    bytes_after: int | None
    seconds: dict[str, float]
    folder: Path | None
    device: torch.device
    in_memory: nn.Module | None = None

    @cached_property
    def model(self) -> nn.Module:
        """The compressed model, ready to run and to save; read from what was written when it is first asked for."""
        if self.in_memory is not None:
            return self.in_memory
        assert self.folder is not None
        return load.load_model(self.folder, self.device)


def compress(
    model: str | Path | nn.Module,
    recipe: Recipe | Path | str | dict[str, Any] | None = None,
    output: str | Path | None = None,
    *,
    plan: Plan | Path | str | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    resume: bool | None = None,
    engine: Engine | None = None,
    cache_bytes: int = CACHE_BYTES,
    keep_grams: bool = False,
    stages: Stages | None = None,
) -> Compressed:
    """Compress a causal language model after training.

    With a folder or hub name and an output the model is never in memory whole, and finished work is kept in
    OUTPUT.work until the output is there: the same call goes on where one that died has stopped.

    Args:
        model: folder, hub name, "demo", or a loaded transformers model on one device (which is changed in place, and
            for which the recipe's device and revision mean nothing).
        recipe: a Recipe, a YAML file, or a mapping of its fields.
        output: folder to write the checkpoint to; None leaves the result in memory.
        plan: groups and their sizes from `measure_plan`, or the file they were saved to, whose recipe is followed
            where `recipe` is None; None measures them here.
        tokenizer: needed with a loaded model, unless the recipe is data-free.
        overwrite: replace an output folder that is not empty.
        resume: False begins anew where an unfinished job of this output lies; else it goes on if it is the same job.
        engine: who solves; None is this process.
        cache_bytes: hidden states and whitenings kept in memory; the rest lies on disk or is computed again.
        keep_grams: write whitenings that do not fit there to OUTPUT.work, rather than to compute them again.
        stages: where to show progress.

    Raises:
        UserError: a request that cannot be met; nothing was written to the output.
    """
    if recipe is None and isinstance(plan, (str, Path)):
        recipe = read_plan_recipe(Path(plan))
    recipe, engine, stages = Recipe.build(recipe), engine or Engine(), stages or Stages()
    target = Path(output) if output is not None else None
    with ExitStack() as stack:
        ledger = Ledger()
        if target is not None and not work_folder(target).exists():
            files.check_output(target, overwrite)
        if target is not None and not isinstance(model, nn.Module):
            ledger = JobDirectory(work_folder(target), resume)
            stack.callback(ledger.close)
            put_back(ledger, target)
        if target is not None:
            files.check_output(target, overwrite or was_written(ledger, target))
        prepared = stack.enter_context(
            prepare(model, recipe, tokenizer, stages, engine, ledger, cache_bytes, keep_grams, whole=target is None)
        )
        job, uniform, folder = prepared.job, prepared.uniform, prepared.folder
        before = safetensors.tensor_bytes(folder) if folder else None
        if isinstance(plan, (str, Path)):
            plan = read_plan(Path(plan), uniform.projections, recipe)
        if plan is not None:
            check_plan(plan, uniform, recipe)
        if target is not None:
            check_space(job, plan or uniform, target)
        origin = prepared.begin(plan)
        if needs_text(recipe):
            read_text(job, prepared.tokenizer, folder)

        fisher = estimate_fisher(job, uniform) if plan is None or weighs_columns(recipe) else None
        plan = plan or allocate(job, uniform, fisher)
        groups = plan.compressed
        pieces = solve_in_sequence(job, groups, fisher) if job.compensates() else solve_at_once(job, groups, fisher)

        manifest = describe(recipe, origin, job.sequences, plan, pieces)
        errors = {name: error for piece in pieces for name, error in piece.record["errors"].items()}
        in_memory, after = None, None
        if job.blocks.stored is None:
            in_memory = job.blocks.model
            load_factors(in_memory, [packed_of(piece) for piece in pieces])
            quantizer_of(in_memory).manifest = manifest
        if target is not None:
            if was_written(ledger, target):
                manifest = files.read_json(target / MANIFEST)
            else:
                log.info("writing %s", target)
                manifest = write(job, target, manifest, plan, pieces, folder, prepared.tokenizer)
            after = safetensors.tensor_bytes(target)
            if isinstance(ledger, JobDirectory):
                ledger.remove()
        return Compressed(
            plan, manifest, errors, before, after, stages.seconds, target, job.blocks.device,
            in_memory if target is None or isinstance(model, nn.Module) else None,
        )  # fmt: skip


def measure_plan(
    model: str | Path | nn.Module,
    recipe: Recipe | Path | str | dict[str, Any] | None = None,
    *,
    tokenizer: Any = None,
    work: Path | None = None,
    resume: bool | None = None,
    engine: Engine | None = None,
    cache_bytes: int = CACHE_BYTES,
    keep_grams: bool = False,
    stages: Stages | None = None,
) -> Plan:
    """The plan that `compress` would follow: calibrates, and spreads the bytes, but compresses nothing.

    Args: as of `compress`; a loaded model is left as it was.
        work: folder for finished work, from which the same call goes on if it died; removed at the end.

    Raises:
        UserError: a request that cannot be met.
    """
    training = isinstance(model, nn.Module) and model.training
    recipe, engine, stages = Recipe.build(recipe), engine or Engine(), stages or Stages()
    with ExitStack() as stack:
        ledger = Ledger() if work is None else JobDirectory(work, resume)
        stack.callback(ledger.close)
        prepared = stack.enter_context(
            prepare(model, recipe, tokenizer, stages, engine, ledger, cache_bytes, keep_grams)
        )
        job, uniform = prepared.job, prepared.uniform
        stack.callback(job.blocks.model.train, training)
        prepared.begin(None)
        if needs_text(recipe):
            read_text(job, prepared.tokenizer, prepared.folder)
        fisher = estimate_fisher(job, uniform) if allocation_of(recipe) != "uniform" else None
        plan = allocate(job, uniform, fisher)
        if isinstance(ledger, JobDirectory):
            ledger.remove()
        return plan


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to be calibrated.

    Attributes:
        job: without its calibration tokens, until `read_text`.
        uniform: the plan that gives every group the recipe's ratio.
        tokenizer: the model's, or None.
        folder: where the model was read from; None for one that came loaded.
        hub_name: where the folder came from, or None.
    """

    job: Job
    uniform: Plan
    tokenizer: Any
    folder: Path | None
    hub_name: str | None

    def begin(self, plan: Plan | None) -> dict[str, Any]:
        """Say in the ledger which job this is; returns where the model came from.

        Raises:
            UserError: the ledger is another job's.
        """
        job, ledger = self.job, self.job.ledger
        origin = {"model": self.hub_name, "weights_sha256": None}
        stamps: list[Any] = []
        if self.folder is not None:
            stamps = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in safetensors.weight_files(self.folder)]
            noted = ledger.note("weights") if isinstance(ledger, JobDirectory) else None
            if isinstance(noted, list) and len(noted) == 2 and noted[0] == stamps:
                origin["weights_sha256"] = noted[1]
            else:
                origin["weights_sha256"] = weights_digest(self.folder)
        if isinstance(ledger, JobDirectory):
            identity = {
                "recipe": job.recipe.model_dump(mode="json"),
                "plan": None if plan is None else hashlib.sha256(repr(plan).encode()).hexdigest(),
                "weights": origin["weights_sha256"],
                "version": {
                    "cospadi": __about__.__version__,
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                },
                "threads": torch.get_num_threads(),
                "threads_per_task": job.pool.threads,
                "device": device_model(job.blocks.device),
            }
            notes = {"weights": [stamps, origin["weights_sha256"]]}
            if ledger.begin(identity, notes, but=["device"] if job.pool.allow_mixed else []):
                log.info("going on with the unfinished job in %s", ledger.folder)
        return origin


@contextmanager
def prepare(
    model: str | Path | nn.Module,
    recipe: Recipe,
    tokenizer: Any,
    stages: Stages,
    engine: Engine,
    ledger: Ledger,
    cache_bytes: int = CACHE_BYTES,
    keep_grams: bool = False,
    whole: bool = False,
) -> Iterator[Prepared]:
    """Open a model, select its projections and plan them at a uniform ratio.

    Args:
        whole: load a model that is on disk at once, instead of block by block.

    Raises:
        UserError: a model that cannot be compressed, a selection or a ratio that cannot be met.
    """
    allocation_of(recipe)  # refuses what needs text where there is none,
    weighs_columns(recipe)  # and so do these
    wants_compensation(recipe)
    device = load.pick_device(recipe.device)
    folder: Path | None = None
    hub_name: str | None = None
    with ExitStack() as stack:
        if not isinstance(model, nn.Module):
            hub_name = None if Path(model).exists() else str(model)
            with stages.stage("load", 1):
                folder = load.resolve(model, recipe.revision)
                load.load_config(folder)  # refuses what cannot be compressed before any weight is read
                if whole:
                    blocks = Blocks(load.load_model(folder, device), device)
                else:
                    converted = ledger.scratch or Path(stack.enter_context(tempfile.TemporaryDirectory()))
                    blocks = load.open_blocks(folder, device, converted / "converted")
                if needs_text(recipe) and tokenizer is None:
                    tokenizer = load.load_tokenizer(folder)
        else:
            if getattr(model, "hf_quantizer", None) is not None or getattr(model.config, "quantization_config", None):
                raise UserError("the model is already compressed or quantized. Compress the original model instead")
            devices = {parameter.device for parameter in model.parameters()}
            if len(devices) > 1:
                raise UserError("the model is spread over several devices. Load it on one to compress it")
            blocks = Blocks(model, devices.pop())
        blocks.model.eval()
        selected = select(find_projections(blocks.model), recipe.include, recipe.exclude, recipe.target)
        if experts := dense_experts(blocks.model):
            log.warning("experts that are not nn.Linear stay dense: %s", kinds_of(experts))
        if blocks.stored is None:
            for projection in selected:
                check_finite(projection.name, blocks.weight(projection.name))
        blocks.finite = {projection.name for projection in selected}
        owner = shared_inputs(blocks.model, selected, blocks.device)
        uniform = make_plan(selected, recipe, owner)
        shelf = Shelf(cache_bytes // 2, ledger.scratch and ledger.scratch / "hidden")
        stack.callback(shelf.close)
        pool = stack.enter_context(engine.open(blocks.device))
        job = Job(recipe, blocks, owner, stages, ledger, shelf, pool, cache_bytes, keep_grams)
        yield Prepared(job, uniform, tokenizer, folder, hub_name)


def work_folder(output: Path) -> Path:
    """Where a job keeps its unfinished work: beside the output."""
    output = Path(os.path.realpath(output))  # behind a link, so that it is on the same disk
    name = output.name
    if len(os.fsencode(name)) > 200:  # a name may be as long as the system allows, and this one is longer
        name = f"{name[:40]}.{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return output.with_name(f"{name}.work")


def was_written(ledger: Ledger, output: Path) -> bool:
    """Whether an earlier run of this job has put what is at `output` there, and was stopped only after that."""
    piece = ledger.get("written")
    try:
        content = (output / MANIFEST).read_bytes()
    except OSError:
        return False
    return piece is not None and piece.record.get("manifest") == hashlib.sha256(content).hexdigest()


def put_back(ledger: Ledger, output: Path) -> None:
    """Where an earlier run was stopped between moving an old output away and the new one to its place: undo it."""
    assert ledger.folder is not None
    replaced = ledger.folder / REPLACED
    if replaced.exists() and not output.exists():
        replaced.rename(output)


def describe(
    recipe: Recipe, origin: dict[str, Any], sequences: Tensor | None, plan: Plan, pieces: Sequence[Piece]
) -> dict[str, Any]:
    """The manifest but for the hashes of files: source, recipe, calibration, and what each projection became."""
    manifest: dict[str, Any] = {
        "package_version": __about__.__version__,
        "source": origin,
        "recipe": recipe.model_dump(mode="json") | {"calibration": _source_name(recipe)},
        "projections": {},
    }
    if left := plan.left_dense:
        manifest["dense"] = {member.name: dense_bytes(member.d1, member.d2) for member in left}
    if sequences is not None:
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
    return manifest


def check_space(job: Job, plan: Plan, output: Path) -> None:
    """Refuse a disk that will be too full, before any work is done.

    The job directory first holds the weights that short solves make of all groups, then, without these, the factors,
    which are in the output a second time when it is written.
    """
    parameters = {name: parameter.nbytes for name, parameter in job.blocks.model.named_parameters()}
    replaced = sum(parameters[f"{member.name}.weight"] for group in plan.compressed for member in group.members)
    packed = sum(group.parts.total for group in plan.compressed)
    needed = sum(parameters.values()) - replaced + packed
    if job.ledger.folder is not None:
        by_fisher = weighs_columns(job.recipe) or allocation_of(job.recipe) == "fisher"
        needed = max(needed + packed, replaced if by_fisher else 0)
        needed -= sum(path.stat().st_size for path in job.ledger.folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(files.nearest_folder(output)).free
    if needed > free:
        raise UserError(
            f"output {output} needs {needed / 1e6:.1f} MB; {free / 1e6:.1f} MB are free. Free some or write elsewhere"
        )


def solve_at_once(job: Job, groups: Sequence[Group], fisher: Mapping[str, Tensor] | None) -> list[Piece]:
    """Solve all groups, each on what it reads in the dense model."""
    return each_group(
        job, "solve", "factors", groups, factorize,
        lambda group, metric: job.task(job.work(group, metric, fisher)), _kept,
    )  # fmt: skip


def solve_in_sequence(job: Job, groups: Sequence[Group], fisher: Mapping[str, Tensor] | None) -> list[Piece]:
    """Solve all groups in the order in which the model runs them, each on what it reads in the model compressed so far.

    Groups that are solved already only take part in running the text through the model.
    """
    assert job.sequences is not None
    assert job.calls is not None
    job.metrics.clear()
    blocks, calls = job.blocks, job.calls
    keys = {group: f"factors/{group.members[0].name}" for group in groups}
    missing = [group for group in groups if job.ledger.get(keys[group]) is None]
    if missing:
        dense = sequence.embed(blocks, job.sequences, job.recipe.batch_size, job.shelf)
        compressed = dense.copy()
        place = {name: index for index, name in enumerate(job.owner)}
        last = max(group.members[0].block for group in missing)
        log.info("calibrating block by block on %d sequences of %d tokens", *job.sequences.shape)
        for index in range(last + 1):
            local = f"{blocks.name_of(index)}."
            here = sorted(
                (group for group in groups if group.members[0].block == index),
                key=lambda group: place[group.members[0].name],
            )
            # Groups that read the same tensor are solved together, and so is what cannot depend on each other: experts.
            together: dict[str, dict[str, list[Group]]] = {}
            for group in here:
                reader = job.inputs(group)[0].removeprefix(local)
                together.setdefault(kinds_of([reader]), {}).setdefault(reader, []).append(group)
            stand_ins: dict[str, Tensor] = {}
            with blocks.loaded(index) as block:
                for by_reader in together.values():
                    wanted = [group for some in by_reader.values() for group in some if group in missing]
                    if wanted:
                        readers = {name: block.get_submodule(name) for name in by_reader}
                        count = (last + 1) * len(dense)
                        with job.stages.stage("calibrate", count) as progress:
                            progress.reach(index * len(dense), f"block {index + 1} of {last + 1}")
                            pairs = sequence.paired_grams(
                                block, index, calls, dense, compressed, stand_ins, readers, progress.advance
                            )
                        solve_together(job, by_reader, wanted, pairs, keys, fisher)
                    for group in (group for some in by_reader.values() for group in some):
                        piece = job.ledger.get(keys[group])
                        assert piece is not None
                        for member, weight in dense_weights(packed_of(piece)).items():
                            stand_ins[member.removeprefix(local)] = weight.to(blocks.device, blocks.dtype(member))
                if index < last:
                    sequence.advance(block, index, calls, dense, {})
                    sequence.advance(block, index, calls, compressed, stand_ins)
        dense.close()
        compressed.close()
    return pieces_of(job, keys)


def solve_together(
    job: Job,
    by_reader: Mapping[str, Sequence[Group]],
    wanted: Sequence[Group],
    pairs: dict[str, tuple[Tensor, Tensor | None]],
    keys: Mapping[Group, str],
    fisher: Mapping[str, Tensor] | None,
) -> None:
    """Solve the wanted ones of some groups that do not depend on each other, for their corrected weights.

    Args:
        by_reader: the first reader of an input, by its name in the block -> the groups that read it.
        pairs: the same name -> G and C of the input; emptied.
        keys: of all groups' pieces.
    """
    assert job.sequences is not None
    tokens = job.sequences.numel()

    def tasks() -> Iterator[tuple[Group, Task]]:
        for name, some in by_reader.items():
            gram, cross = pairs.pop(name)
            metric = whiten(gram, tokens, job.recipe.damping)
            if metric.factor is None:
                log.warning("%s reads only zeros on the calibration text: not whitened", job.inputs(some[0])[0])
            for group in some:
                if group in wanted:
                    corrected = sequence.corrected(job.weight(group), gram, cross)
                    yield group, job.task(job.work(group, metric, fisher, corrected))

    run_tasks(job, "solve", keys, factorize, tasks(), _kept)


def _kept(packed: Packed) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """A solved group as a piece of the ledger, and a line in the log."""
    k = next(iter(packed.entries.values())).k
    s = sum(entry.nnz for entry in packed.entries.values()) / sum(entry.d2 for entry in packed.entries.values())
    log.info("%s: k %d, s %.4g, error %.4f", ", ".join(packed.entries), k, s, max(packed.errors.values()))
    return packed.record(), packed.tensors


def entries_of(piece: Piece) -> dict[str, StoredProjection]:
    """A solved group's entries in config.json."""
    return {name: StoredProjection.model_validate(entry) for name, entry in piece.record["entries"].items()}


def packed_of(piece: Piece) -> Packed:
    """A solved group from its piece."""
    return Packed(entries_of(piece), piece.tensors(), piece.record["errors"], piece.record["shift"])


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
    folder: Path | None,
    tokenizer: Any,
) -> dict[str, Any]:
    """Write the checkpoint beside `output`, then rename; returns the manifest with the files' hashes.

    A model that was never in memory is written tensor by tensor: from the source's files and the ledger's.
    """
    from transformers import GenerationConfig

    ledger = job.ledger
    staging = ledger.folder and ledger.folder / OUTPUT
    retired = ledger.folder and ledger.folder / REPLACED
    model: Any = job.blocks.model
    with files.staged(output, staging, retired) as staging:
        if job.blocks.stored is not None:
            assert folder is not None
            write_streamed(job, staging, pieces, folder)
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
            elif tokenizer is not None:
                tokenizer.save_pretrained(staging)
            (staging / "README.md").write_text(model_card(plan, manifest), encoding="utf-8")
            manifest = write_manifest(staging, manifest)
            digest = hashlib.sha256((staging / MANIFEST).read_bytes()).hexdigest()
            ledger.put("written", {"manifest": digest})
    return manifest


def write_streamed(job: Job, staging: Path, pieces: Sequence[Piece], folder: Path) -> None:
    """Write config.json and the weights of a model that was never in memory."""
    blocks = job.blocks
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
    load.write_config(model, staging, folder)
    state, _ = quantizer_of(model).get_state_dict_and_metadata(model)
    tensors = load.tensors_to_write(model, state, blocks, held)
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
    if not needs_text(recipe):
        return None
    name = recipe.calibration or DEFAULT_DATASET
    return Path(name).name if Path(name).exists() else name
