"""The main job, top to bottom: text, Gram, whitened weights, dictionary and codes, packed bytes, checkpoint."""

from __future__ import annotations

import hashlib
import logging
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cospadi import __about__, checkpoint, packing, source
from cospadi.calibration.gram import IDENTITY, Whitening, accumulate_grams, whiten
from cospadi.calibration.text import DEFAULT_DATASET, token_sequences
from cospadi.card import model_card
from cospadi.checkpoint import StoredProjection
from cospadi.errors import UserError
from cospadi.factorization import Factorization, Problem, SolverOptions, find_solver
from cospadi.factorization.problem import relative_error
from cospadi.integrations.transformers import mark_compressed, quantizer_of, swap_in_layers
from cospadi.plan import Group, Plan, make_plan
from cospadi.progress import Stage, Stages
from cospadi.projections import (
    Projection,
    decoder_blocks,
    dense_experts,
    find_projections,
    kinds_of,
    select,
    shared_inputs,
)
from cospadi.recipe import Recipe

log = logging.getLogger("cospadi")

GRAM_MEMORY = 4 * 2**30
"""Bytes of Gram matrices held at once. Blocks that do not fit wait for another pass over the calibration text."""

SOLVER_MEMORY = {"cpu": 2**28, "cuda": 2**32}
"""Bytes that batched sparse coding may take. Fixed, not what is free, so that equal runs give equal bytes."""


@dataclass(frozen=True)
class Packed:
    """A group's factors as they are stored, and what they are worth.

    Attributes:
        entries: each member's entry in config.json.
        tensors: full tensor names -> what is stored.
        errors: each member's relative error in the whitened metric, of the stored factors.
        shift: the diagonal shift of the Gram.
    """

    entries: dict[str, StoredProjection]
    tensors: dict[str, Tensor]
    errors: dict[str, float]
    shift: float


@dataclass(frozen=True)
class Compressed:
    """What `compress` gives back.

    Attributes:
        model: the compressed model, ready to run and to save.
        plan: groups, k, s and bytes.
        manifest: what `cospadi.json` holds (hashes of files only if it was written).
        errors: projection -> relative error in the whitened metric, of the stored factors.
        bytes_before, bytes_after: of the whole checkpoint's tensors as stored; None where nothing was read or written.
        seconds: stage -> seconds.
    """

    model: nn.Module
    plan: Plan
    manifest: dict[str, Any]
    errors: dict[str, float]
    bytes_before: int | None
    bytes_after: int | None
    seconds: dict[str, float]


def compress(
    model: str | Path | nn.Module,
    recipe: Recipe | Path | str | dict[str, Any] | None = None,
    output: str | Path | None = None,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    stages: Stages | None = None,
) -> Compressed:
    """Compress a causal language model after training.

    Args:
        model: folder, hub name, "demo", or a loaded transformers model on one device (which is changed in place, and
            for which the recipe's device and revision mean nothing).
        recipe: a Recipe, a YAML file, or a mapping of its fields.
        output: folder to write the checkpoint to; None leaves the result in memory.
        tokenizer: needed with a loaded model, unless the recipe is data-free.
        overwrite: replace an output folder that is not empty.
        stages: where to show progress.

    Raises:
        UserError: a request that cannot be met; nothing was written.
    """
    recipe = Recipe.build(recipe)
    calibrated = needs_text(recipe)
    stages = stages or Stages()
    target = Path(output) if output is not None else None
    if target is not None:
        checkpoint.check_output(target, overwrite)
    device = source.pick_device(recipe.device)

    folder: Path | None = None
    hub_name: str | None = None
    if not isinstance(model, nn.Module):
        hub_name = None if Path(model).exists() else str(model)
        with stages.stage("load", 1):
            folder = source.resolve(model, recipe.revision)
            source.load_config(folder)  # refuses what cannot be compressed before any weight is read
            model = source.load_model(folder, device)
            if calibrated and tokenizer is None:
                tokenizer = source.load_tokenizer(folder)
    elif getattr(model, "hf_quantizer", None) is not None or getattr(model.config, "quantization_config", None):
        raise UserError("the model is already compressed or quantized. Compress the original model instead")
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise UserError("the model is spread over several devices. Load it on one to compress it")
    model.eval()
    before = checkpoint.tensor_bytes(folder) if folder else None
    selected = select(find_projections(model), recipe.include, recipe.exclude, recipe.target)
    if experts := dense_experts(model):
        log.warning("experts that are not nn.Linear stay dense: %s", kinds_of(experts))
    owner = shared_inputs(model, selected)
    plan = make_plan(selected, recipe, owner)
    if target is not None:
        check_space(model, plan, target)

    origin = {"model": hub_name, "weights_sha256": checkpoint.weights_digest(folder) if folder else None}

    sequences: Tensor | None = None
    if calibrated:
        if tokenizer is None:
            raise UserError("calibration needs the model's tokenizer: pass tokenizer=, or make the recipe data_free")
        with stages.stage("text", 1):
            sequences = token_sequences(tokenizer, recipe, source.positions(model))

    packed: list[Packed] = []
    for groups, metrics in walk(model, plan, owner, sequences, recipe, stages):
        with stages.stage("solve", sum(map(_work, plan.groups))) as progress:
            progress.reach(sum(map(_work, plan.groups[: len(packed)])))
            for group in groups:
                packed.append(factorize(model, group, metrics[group.members[0].name], recipe, progress))

    load_factors(model, packed)
    manifest = describe(recipe, origin, sequences, packed)
    quantizer_of(model).manifest = manifest
    after = None
    if target is not None:
        log.info("writing %s", target)
        with stages.stage("write", _written_bytes(model)) as progress:
            manifest = write(model, target, manifest, plan, folder, tokenizer, progress)
            after = checkpoint.tensor_bytes(target)
    errors = {name: error for item in packed for name, error in item.errors.items()}
    return Compressed(model, plan, manifest, errors, before, after, stages.seconds)


def describe(
    recipe: Recipe, origin: dict[str, Any], sequences: Tensor | None, packed: Sequence[Packed]
) -> dict[str, Any]:
    """The manifest but for the hashes of files: source, recipe, calibration, and what each projection became."""
    manifest: dict[str, Any] = {
        "package_version": __about__.__version__,
        "source": origin,
        "recipe": recipe.model_dump(mode="json") | {"calibration": _source_name(recipe)},
        "projections": {},
    }
    if sequences is not None:
        digest = hashlib.sha256(sequences.numpy().tobytes()).hexdigest()
        manifest["calibration"] = {"sequences": len(sequences), "length": sequences.shape[1], "tokens_sha256": digest}
    for item in packed:
        for name, entry in item.entries.items():
            manifest["projections"][name] = {
                "layout": entry.layout,
                "bytes": {tensor.rpartition(".")[2]: _nbytes(item.tensors[tensor]) for tensor in entry.tensors(name)},
                "relative_error": item.errors[name],
                "gram_shift": item.shift,
            }
    return manifest


def check_space(model: nn.Module, plan: Plan, output: Path) -> None:
    """Refuse a disk that will be too full, before any work is done."""
    replaced = [_weight(model, member) for group in plan.groups for member in group.members]
    needed = sum(map(_nbytes, model.parameters())) - sum(map(_nbytes, replaced)) + plan.bytes
    free = shutil.disk_usage(checkpoint.nearest_folder(output)).free
    if needed > free:
        raise UserError(
            f"output {output} needs {needed / 1e6:.1f} MB; {free / 1e6:.1f} MB are free. Free some or write elsewhere"
        )


def needs_text(recipe: Recipe) -> bool:
    """Whether a recipe is calibrated on text."""
    return not recipe.data_free and find_solver(recipe.solver).whitened


def walk(
    model: nn.Module,
    plan: Plan,
    owner: Mapping[str, str],
    sequences: Tensor | None,
    recipe: Recipe,
    stages: Stages,
) -> Iterator[tuple[list[Group], dict[str, Whitening]]]:
    """The decoder blocks in order, as many at a time as their Gram matrices fit in memory.

    Args:
        owner: projection -> the first reader of its input.

    Yields:
        The groups of these blocks, and the whitening of each group by its first member's name.
    """
    if sequences is None:
        yield list(plan.groups), {group.members[0].name: IDENTITY for group in plan.groups}
        return
    _, blocks = decoder_blocks(model)
    for groups in _ranges(plan.groups, owner):
        readers = list(dict.fromkeys(owner[member.name] for group in groups for member in group.members))
        last = max(member.block for group in groups for member in group.members)
        log.info("calibrating up to block %d on %d sequences of %d tokens", last, *sequences.shape)
        with stages.stage("calibrate", len(sequences)) as progress:
            grams = accumulate_grams(
                model, readers, sequences, recipe.batch_size, blocks[last], lambda n: progress.advance(n)
            )
        metrics: dict[str, Whitening] = {}
        whitened: dict[tuple[str, ...], Whitening] = {}
        for group in groups:
            inputs = tuple(dict.fromkeys(owner[member.name] for member in group.members))
            if inputs not in whitened:
                gram = torch.stack([grams[name] for name in inputs]).mean(0) if len(inputs) > 1 else grams[inputs[0]]
                whitened[inputs] = whiten(gram, sequences.numel(), recipe.damping)
                if recipe.layers_shared == 1:
                    grams[inputs[0]] = torch.empty(0)  # has done its work
                if whitened[inputs].factor is None:
                    log.warning("%s reads only zeros on the calibration text: solved without whitening", inputs[0])
            metrics[group.members[0].name] = whitened[inputs]
        del grams
        yield groups, metrics


def _ranges(groups: Sequence[Group], owner: Mapping[str, str]) -> Iterator[list[Group]]:
    """Consecutive groups whose distinct Gram matrices fit GRAM_MEMORY; never splits what ends in the same block."""
    current: list[Group] = []
    readers: set[str] = set()
    size = 0
    by_block: dict[int, list[Group]] = {}
    for group in groups:
        by_block.setdefault(group.members[-1].block, []).append(group)
    for block in sorted(by_block):
        needed = {owner[m.name]: m for group in by_block[block] for m in group.members}
        nbytes = sum(8 * member.d1**2 for name, member in needed.items() if name not in readers)
        if current and size + nbytes > GRAM_MEMORY:
            yield current
            current, readers, size = [], set(), 0
            nbytes = sum(8 * member.d1**2 for member in needed.values())
        current += by_block[block]
        readers |= set(needed)
        size += nbytes
    if current:
        yield current


def factorize(model: nn.Module, group: Group, metric: Whitening, recipe: Recipe, progress: Stage) -> Packed:
    """Solve min ||L W - D_L S|| for one group and round the factors to what is stored."""
    weights = [_weight(model, member) for member in group.members]
    target = metric.apply(torch.cat(weights, dim=1))  # A = L W, float64 (d1, sum of d2)
    scale = target.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    first, done = group.members[0], progress.done
    short = f"{first.block}.{first.kind.rpartition('.')[2]}"

    def report(iteration: int, error: float) -> None:
        share = iteration / recipe.iterations
        progress.reach(done + share * _work(group), f"{short} T {iteration} error {error:.4f}")

    options = SolverOptions(
        iterations=recipe.iterations,
        update=recipe.update,
        tolerance=recipe.tolerance,
        seed=recipe.seed,
        memory_bytes=SOLVER_MEMORY["cuda" if target.is_cuda else "cpu"],
        on_iteration=report,
    )
    problem = Problem((target / scale).float(), None if metric.factor is None else metric.undo)
    solution = find_solver(recipe.solver).solve(problem, group.k, group.s, options)
    progress.reach(done + _work(group))  # a solver may have stopped early
    result = pack(group, solution, metric, target, float(scale))
    log.info(
        "%s: k %d, s %d, error %.4f", ", ".join(m.name for m in group.members), group.k, group.s,
        max(result.errors.values()),
    )  # fmt: skip
    return result


def pack(group: Group, solution: Factorization, metric: Whitening, target: Tensor, scale: float) -> Packed:
    """Undo the whitening, scale the atoms to rms(x d) = 1 over the calibration tokens, round and pack.

    Args:
        solution: of A / scale.
        target: A = L W, float64 (d1, sum of d2).
    """
    if not (torch.isfinite(solution.dictionary).all() and torch.isfinite(solution.coefficients).all()):
        raise RuntimeError(f"the solver returned numbers that are not finite for {group.members[0].name}")
    norms = torch.linalg.vector_norm(solution.dictionary.double(), dim=0)
    atom_scale = torch.where(norms > 0, metric.scale / norms, torch.ones_like(norms))
    dictionary = _saturate(metric.undo(solution.dictionary.double() * atom_scale)).to(torch.bfloat16)  # D (d1, k)
    coefficients = _saturate(solution.coefficients.double() * (scale / atom_scale)[:, None]).float()  # S (k, d2)

    owner = group.members[0]
    entries: dict[str, StoredProjection] = {}
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    low_rank = group.layout == "low-rank"
    tensors[f"{owner.name}.{checkpoint.LEFT if low_rank else checkpoint.DICTIONARY}"] = dictionary.T.contiguous()
    approximation = metric.apply(dictionary)  # L D
    start = 0
    for member in group.members:
        columns = slice(start, start + member.d2)
        start += member.d2
        part = coefficients[:, columns].T.contiguous()  # (d2, k)
        if low_rank:
            stored = part.to(torch.bfloat16)
            tensors[f"{member.name}.{checkpoint.RIGHT}"] = stored
            rounded, nnz = stored.float(), 0
        else:
            assert solution.support is not None
            support = solution.support[:, columns].T.contiguous()
            values = packing.pack_values(part[support], group.value_bits)
            nnz = int(support.sum())
            tensors[f"{member.name}.{checkpoint.SUPPORT}"] = packing.pack_support(support)
            tensors[f"{member.name}.{checkpoint.VALUES}"] = values
            rounded = torch.zeros_like(part).masked_scatter(
                support, packing.unpack_values(values, nnz, group.value_bits)
            )
        errors[member.name] = relative_error(target[:, columns], approximation @ rounded.double().T)
        entries[member.name] = StoredProjection(
            layout="low-rank" if low_rank else "sparse-dictionary",
            d1=member.d1,
            d2=member.d2,
            k=group.k,
            nnz=nnz,
            value_bits=16 if group.value_bits == 16 else 14,
            dictionary=owner.name,
        )
    cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
    assert sum(map(_nbytes, cpu.values())) == group.parts.total
    return Packed(entries, cpu, errors, metric.shift)


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
            if layer.bias is not None:
                bias = old[name].bias
                assert isinstance(bias, Tensor)
                layer.bias.copy_(bias)
    mark_compressed(model, entries)


def write(
    model: Any,
    output: Path,
    manifest: dict[str, Any],
    plan: Plan,
    folder: Path | None,
    tokenizer: Any,
    progress: Stage,
) -> dict[str, Any]:
    """Write the checkpoint beside `output`, then rename; returns the manifest with the files' hashes."""
    from transformers import GenerationConfig

    with checkpoint.staged(output) as staging:
        kept = model.generation_config
        if folder is not None and (folder / "generation_config.json").exists():
            # The source's own file is copied below; some public ones would not pass the check that saving makes.
            model.generation_config = GenerationConfig()
        try:
            with _following(staging, progress):
                model.save_pretrained(staging)
        finally:
            model.generation_config = kept
        if folder is not None:
            checkpoint.copy_companions(folder, staging)
        elif tokenizer is not None:
            tokenizer.save_pretrained(staging)
        (staging / "README.md").write_text(model_card(plan, manifest), encoding="utf-8")
        written = checkpoint.write_manifest(staging, manifest)
    return written


def _written_bytes(model: Any) -> int:
    """Bytes of tensors that saving a compressed model writes."""
    state, _ = quantizer_of(model).get_state_dict_and_metadata(model)
    return sum({tensor.data_ptr(): _nbytes(tensor) for tensor in state.values()}.values())


@contextmanager
def _following(folder: Path, progress: Stage) -> Iterator[None]:
    """Show how much of the safetensors files in a folder is there, while another library writes them."""
    done = threading.Event()

    def follow() -> None:
        while not done.wait(0.2):
            progress.reach(sum(path.stat().st_size for path in checkpoint.all_safetensors(folder)))

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        done.set()
        follower.join()


def _work(group: Group) -> float:
    """What solving a group costs, in arbitrary units: coding its columns with s atoms out of k."""
    return sum(group.d2s) * max(group.s, 1) * group.k**2


def _weight(model: nn.Module, projection: Projection) -> Tensor:
    """W (d1, d2): the transpose of what nn.Linear stores."""
    weight = model.get_submodule(projection.name).weight
    assert isinstance(weight, Tensor)
    if not torch.isfinite(weight).all():
        raise UserError(f"the weight of {projection.name} is not finite")
    return weight.detach().T


def _saturate(values: Tensor) -> Tensor:
    largest = float(torch.finfo(torch.bfloat16).max)
    return values.clamp(-largest, largest)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _source_name(recipe: Recipe) -> str | None:
    """The calibration source without a path of this machine."""
    if not needs_text(recipe):
        return None
    name = recipe.calibration or DEFAULT_DATASET
    return Path(name).name if Path(name).exists() else name
