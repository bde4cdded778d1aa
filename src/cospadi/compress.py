"""The main job, top to bottom: text, Gram, whitened weights, dictionary and codes, packed bytes, checkpoint."""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cospadi import __about__, checkpoint, packing, source
from cospadi.allocation import Option, interpolate, knapsack
from cospadi.budget import byte_budget, dense_bytes
from cospadi.calibration import sequence
from cospadi.calibration.fisher import output_fisher
from cospadi.calibration.gram import IDENTITY, Whitening, accumulate_grams, whiten
from cospadi.calibration.text import DEFAULT_DATASET, token_sequences
from cospadi.card import model_card
from cospadi.checkpoint import StoredProjection
from cospadi.errors import UserError
from cospadi.evaluate import mean_loss
from cospadi.factorization import Factorization, Problem, SolverOptions, find_solver
from cospadi.factorization.problem import relative_error
from cospadi.integrations.transformers import mark_compressed, quantizer_of, swap_in_layers
from cospadi.ops import reference
from cospadi.plan import (
    Group,
    Plan,
    check_plan,
    dense_group,
    fill_up,
    make_plan,
    read_plan,
    read_plan_recipe,
    size_group,
)
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

QUICK_ITERATIONS = 8
"""Iterations of the solver runs that budgets are measured by."""

RHOS = (1.5, 2.2, 3.2, 4.8)
"""k / s that budgets choose from, unless the recipe gives one."""

SPANS = (0.0, 0.1, 0.2, 1.0)
"""How far from the asked ratio a group's own may lie: one allocation each, of which the loss on text chooses."""


@dataclass
class Job:
    """What all stages of one compression look at.

    Attributes:
        owner: projection -> the first reader of its input.
        sequences: calibration tokens, int64 (sequences, tokens); None without calibration.
        metrics: inputs of a group -> their whitening, kept if all of them fit GRAM_MEMORY together.
    """

    model: nn.Module
    recipe: Recipe
    owner: Mapping[str, str]
    sequences: Tensor | None
    stages: Stages
    metrics: dict[tuple[str, ...], Whitening] = field(default_factory=dict)

    def compensates(self) -> bool:
        """Whether projections make up for the errors before them."""
        return self.sequences is not None and self.recipe.compensate and self.recipe.layers_shared == 1

    def inputs(self, group: Group) -> tuple[str, ...]:
        """The tensors that a group's members read, each by its first reader."""
        return tuple(dict.fromkeys(self.owner[member.name] for member in group.members))


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
    plan: Plan | Path | str | None = None,
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
        plan: groups and their sizes from `measure_plan`, or the file they were saved to, whose recipe is followed
            where `recipe` is None; None measures them here.
        tokenizer: needed with a loaded model, unless the recipe is data-free.
        overwrite: replace an output folder that is not empty.
        stages: where to show progress.

    Raises:
        UserError: a request that cannot be met; nothing was written.
    """
    if recipe is None and isinstance(plan, (str, Path)):
        recipe = read_plan_recipe(Path(plan))
    recipe = Recipe.build(recipe)
    stages = stages or Stages()
    target = Path(output) if output is not None else None
    if target is not None:
        checkpoint.check_output(target, overwrite)
    prepared = prepare(model, recipe, tokenizer, stages)
    job, uniform, folder = prepared.job, prepared.uniform, prepared.folder
    before = checkpoint.tensor_bytes(folder) if folder else None
    if isinstance(plan, (str, Path)):
        plan = read_plan(Path(plan), uniform.projections, recipe)
    if plan is not None:
        check_plan(plan, uniform, recipe)
    if target is not None:
        check_space(job.model, plan or uniform, target)
    origin = {"model": prepared.hub_name, "weights_sha256": checkpoint.weights_digest(folder) if folder else None}
    prepared.read_text()

    fisher = estimate_fisher(job, uniform) if plan is None or weighs_columns(recipe) else None
    if plan is None:
        plan = allocate(job, uniform, fisher)
        if target is not None:
            check_space(job.model, plan, target)
    compressed = plan.compressed

    packed = solve_in_sequence(job, compressed, fisher) if job.compensates() else None
    if packed is None:
        packed = []
        for groups, metrics in walk(job, compressed):
            with stages.stage("solve", sum(map(_work, compressed))) as progress:
                progress.reach(sum(map(_work, compressed[: len(packed)])))
                for group in groups:
                    metric = metrics[job.inputs(group)]
                    wanted = _target(job.model, group, metric)
                    packed.append(factorize(job, group, metric, wanted, fisher, progress))

    load_factors(job.model, packed)
    manifest = describe(recipe, origin, job.sequences, plan, packed)
    quantizer_of(job.model).manifest = manifest
    after = None
    if target is not None:
        log.info("writing %s", target)
        with stages.stage("write", _written_bytes(job.model)) as progress:
            manifest = write(job.model, target, manifest, plan, folder, prepared.tokenizer, progress)
            after = checkpoint.tensor_bytes(target)
    errors = {name: error for item in packed for name, error in item.errors.items()}
    return Compressed(job.model, plan, manifest, errors, before, after, stages.seconds)


def measure_plan(
    model: str | Path | nn.Module,
    recipe: Recipe | Path | str | dict[str, Any] | None = None,
    *,
    tokenizer: Any = None,
    stages: Stages | None = None,
) -> Plan:
    """The plan that `compress` would follow: calibrates, and spreads the bytes, but compresses nothing.

    Args: as of `compress`; a loaded model is left as it was.

    Raises:
        UserError: a request that cannot be met.
    """
    training = isinstance(model, nn.Module) and model.training
    prepared = prepare(model, Recipe.build(recipe), tokenizer, stages or Stages())
    job, uniform = prepared.job, prepared.uniform
    try:
        prepared.read_text()
        fisher = estimate_fisher(job, uniform) if allocation_of(job.recipe) != "uniform" else None
        return allocate(job, uniform, fisher)
    finally:
        job.model.train(training)


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

    def read_text(self) -> None:
        """Read the calibration text, if the recipe needs one."""
        if not needs_text(self.job.recipe):
            return
        if self.tokenizer is None:
            raise UserError("calibration needs the model's tokenizer: pass tokenizer=, or make the recipe data_free")
        with self.job.stages.stage("text", 1):
            self.job.sequences = token_sequences(
                self.tokenizer, self.job.recipe, source.positions(self.job.model.config)
            )


def prepare(model: str | Path | nn.Module, recipe: Recipe, tokenizer: Any, stages: Stages) -> Prepared:
    """Load a model, unless it is loaded, select its projections and plan them at a uniform ratio.

    Raises:
        UserError: a model that cannot be compressed, a selection or a ratio that cannot be met.
    """
    device = source.pick_device(recipe.device)
    folder: Path | None = None
    hub_name: str | None = None
    if not isinstance(model, nn.Module):
        hub_name = None if Path(model).exists() else str(model)
        with stages.stage("load", 1):
            folder = source.resolve(model, recipe.revision)
            source.load_config(folder)  # refuses what cannot be compressed before any weight is read
            model = source.load_model(folder, device)
            if needs_text(recipe) and tokenizer is None:
                tokenizer = source.load_tokenizer(folder)
    elif getattr(model, "hf_quantizer", None) is not None or getattr(model.config, "quantization_config", None):
        raise UserError("the model is already compressed or quantized. Compress the original model instead")
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise UserError("the model is spread over several devices. Load it on one to compress it")
    model.eval()
    selected = select(find_projections(model), recipe.include, recipe.exclude, recipe.target)
    if experts := dense_experts(model):
        log.warning("experts that are not nn.Linear stay dense: %s", kinds_of(experts))
    for projection in selected:
        _weight(model, projection)  # refuses what is not finite
    allocation_of(recipe)  # refuses what needs text where there is none,
    weighs_columns(recipe)  # and so does this
    job = Job(model, recipe, shared_inputs(model, selected), None, stages)
    return Prepared(job, make_plan(selected, recipe, job.owner), tokenizer, folder, hub_name)


def describe(
    recipe: Recipe, origin: dict[str, Any], sequences: Tensor | None, plan: Plan, packed: Sequence[Packed]
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
    replaced = [_weight(model, member) for group in plan.compressed for member in group.members]
    needed = sum(map(_nbytes, model.parameters())) - sum(map(_nbytes, replaced))
    needed += sum(group.parts.total for group in plan.compressed)
    free = shutil.disk_usage(checkpoint.nearest_folder(output)).free
    if needed > free:
        raise UserError(
            f"output {output} needs {needed / 1e6:.1f} MB; {free / 1e6:.1f} MB are free. Free some or write elsewhere"
        )


def needs_text(recipe: Recipe) -> bool:
    """Whether a recipe is calibrated on text."""
    return not recipe.data_free and find_solver(recipe.solver).whitened


def estimate_fisher(job: Job, uniform: Plan) -> dict[str, Tensor] | None:
    """What an error at each output costs in the loss (`output_fisher`), or None where the recipe does not ask.

    Taken at the model that a uniform budget and short solver runs make of it: in a damaged model early projections
    matter more than they do in the whole one, and that is the model that is going to be.
    """
    if not (weighs_columns(job.recipe) or allocation_of(job.recipe) == "fisher"):
        return None
    text = check_text(job)
    projections = [member for group in uniform.groups for member in group.members]
    with job.stages.stage("fisher", 2 * len(text)) as progress:
        fisher = output_fisher(job.model, projections, text, progress.advance)
        stand_ins = quick_weights(job, uniform, fisher)
        with sequence.other_weights(job.model, stand_ins):
            return output_fisher(job.model, projections, text, progress.advance)


def check_text(job: Job) -> Tensor:
    """The calibration sequences that gradients and losses are taken on."""
    assert job.sequences is not None
    return job.sequences[: job.recipe.fisher_sequences]


def allocate(job: Job, uniform: Plan, fisher: dict[str, Tensor] | None) -> Plan:
    """Spread the byte budget over the groups so that the errors cost the model least.

    Each group is solved in short runs at a few ratios and rho, which gives its cost against bytes. A knapsack then
    chooses for all groups, for several bounds on how far a group may stray from the asked ratio: costs are quadratic
    and sum up only while errors are small. Of the models that short runs make of these candidates, `uniform` among
    them, the one with the lowest loss on text decides, so that a spread is taken only if it does better than none.
    """
    recipe = job.recipe
    if allocation_of(recipe) == "uniform":
        return uniform
    budget = byte_budget(recipe.ratio, 1, [uniform.dense_bytes // 2])
    runs = len(measured_ratios(recipe)) * len(measured_rhos(recipe))
    with job.stages.stage("allocate", (runs + len(SPANS) + 1) * len(uniform.groups)) as progress:
        curves: dict[tuple[Projection, ...], list[Option]] = {}
        for groups, metrics in walk(job, uniform.groups):
            for group in groups:
                curves[group.members] = cost_curve(job, group, metrics[job.inputs(group)], fisher, progress)
        candidates = [uniform]
        for span in SPANS:
            plan = _spread(uniform, [curves[group.members] for group in uniform.groups], budget, span, recipe)
            if plan is not None and plan not in candidates:
                candidates.append(plan)
        losses = []
        for plan in candidates:
            with sequence.other_weights(job.model, quick_weights(job, plan, fisher)):
                losses.append(mean_loss(job.model, check_text(job), recipe.batch_size))
            progress.advance(len(plan.groups), f"loss {losses[-1]:.4f}")
    best = min(range(len(candidates)), key=lambda index: losses[index] if math.isfinite(losses[index]) else math.inf)
    spread = ", ".join(f"{loss:.4f}" for loss in losses[1:]) or "no other fits"
    log.info("budgets: loss %.4f with a uniform ratio; spread: %s; taken: %.4f", losses[0], spread, losses[best])
    if best == 0:
        log.warning("no other spread of the bytes gives a lower loss on the calibration text: the budget is uniform")
    return candidates[best]


def measured_ratios(recipe: Recipe) -> list[float]:
    """Ratios at which groups are measured, around the asked one."""
    r = recipe.ratio
    return [0.3 * r, r, r + 0.25 * (1 - r), r + 0.5 * (1 - r)]


def measured_rhos(recipe: Recipe) -> tuple[float, ...]:
    """k / s at which groups are measured."""
    if find_solver(recipe.solver).layout == "low-rank":
        return (recipe.uniform_rho,)  # means nothing there
    return RHOS if recipe.rho is None else (recipe.rho,)


def cost_curve(
    job: Job, group: Group, metric: Whitening, fisher: dict[str, Tensor] | None, progress: Stage
) -> list[Option]:
    """What a group costs at the measured ratios and rho: sum over outputs j of F_j ||L e_j||^2.

    e_j is column j of W - D S. With `--allocate output` F_j is one over the energy ||L W||^2 of the projection.
    Rounding of the stored values is added as its expectation.
    """
    target = _target(job.model, group, metric)
    importance = []
    for part, member in zip(torch.split(target, group.d2s, dim=1), group.members, strict=True):
        if allocation_of(job.recipe) == "fisher":
            assert fisher is not None
            importance.append(fisher[member.name])
        else:
            importance.append((1 / part.square().sum().clamp(min=1e-300)).expand(member.d2))
    weight = torch.cat(importance)
    floor = float((target.square().sum(0) * weight).sum()) * packing.rounding_error(group.value_bits) ** 2
    options = []
    for ratio in measured_ratios(job.recipe):
        for rho in measured_rhos(job.recipe):
            progress.advance(1)
            sized = size_group(group.members, ratio, rho, job.recipe)
            if sized is None:
                continue
            solution = solve(job, sized, metric, target, fisher, QUICK_ITERATIONS)
            error = target.float() - solution.dictionary @ solution.coefficients
            cost = float((error.square().sum(0, dtype=torch.float64) * weight).sum())
            options.append(Option(sized.parts.total, cost + floor, ratio, rho))
    return options


def _spread(uniform: Plan, curves: Sequence[Sequence[Option]], budget: int, span: float, recipe: Recipe) -> Plan | None:
    """The plan that a knapsack makes of the groups' cost curves, with ratios within `span` of the asked one."""
    ratios = sorted({ratio / 100 for ratio in range(2, 98, 2)} | {recipe.ratio})
    choices = []
    for group, curve in zip(uniform.groups, curves, strict=True):
        within = [ratio for ratio in ratios if abs(ratio - recipe.ratio) <= span + 1e-9]
        options = interpolate(curve, within, group.dense_bytes)
        if span >= recipe.ratio:
            options.append(Option(group.dense_bytes, 0.0, 0.0, 0.0))
        if not options:
            return None
        choices.append(options)
    chosen = knapsack(choices, budget)
    if chosen is None:
        return None
    groups: list[Group] = []
    for group, option in zip(uniform.groups, chosen, strict=True):
        dense = option.ratio == 0
        sized = dense_group(group.members) if dense else size_group(group.members, option.ratio, option.rho, recipe)
        if sized is None:
            return None
        groups.append(sized)
    if find_solver(recipe.solver).free_support:
        for index in sorted(range(len(groups)), key=lambda index: -groups[index].parts.total):
            if groups[index].layout != "dense":
                groups[index] = fill_up(groups[index], budget - sum(group.parts.total for group in groups))
    plan = Plan(tuple(groups))
    return plan if plan.bytes <= budget else None


def quick_weights(job: Job, plan: Plan, fisher: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The weights (d2, d1) that short solver runs make of a plan's groups, in the model's dtype."""
    weights: dict[str, Tensor] = {}
    for groups, metrics in walk(job, plan.compressed):
        for group in groups:
            metric = metrics[job.inputs(group)]
            solution = solve(job, group, metric, _target(job.model, group, metric), fisher, QUICK_ITERATIONS)
            dictionary = metric.undo(solution.dictionary).float()
            parts = torch.split(solution.coefficients, group.d2s, dim=1)
            for member, coefficients in zip(group.members, parts, strict=True):
                dtype = _weight(job.model, member).dtype
                weights[member.name] = (dictionary @ coefficients).T.contiguous().to(dtype)
    return weights


def allocation_of(recipe: Recipe) -> str:
    """How a recipe spreads bytes."""
    if recipe.allocate in ("fisher", "output") and not needs_text(recipe):
        raise UserError(f"solver {recipe.solver} uses no calibration text to allocate by. Use --allocate uniform")
    if recipe.allocate is not None:
        return recipe.allocate
    return "fisher" if needs_text(recipe) and recipe.accounting == "exact" else "uniform"


def weighs_columns(recipe: Recipe) -> bool:
    """Whether a recipe's solver weighs outputs by what they cost in the loss."""
    if recipe.weight_columns == "fisher" and not needs_text(recipe):
        raise UserError(f"solver {recipe.solver} uses no calibration text to weigh by. Use --weight-columns none")
    if recipe.weight_columns is not None:
        return recipe.weight_columns == "fisher"
    return needs_text(recipe) and recipe.allocate != "output"


def walk(job: Job, groups: Sequence[Group]) -> Iterator[tuple[Sequence[Group], Mapping[tuple[str, ...], Whitening]]]:
    """The decoder blocks in order, as many at a time as their Gram matrices fit in memory.

    Yields:
        Groups, and the whitening of each by its inputs (`Job.inputs`).
    """
    if job.sequences is None:
        yield groups, {job.inputs(group): IDENTITY for group in groups}
        return
    if all(job.inputs(group) in job.metrics for group in groups):
        yield groups, job.metrics
        return
    ranges = list(_ranges(groups, job.owner))
    for some in ranges:
        metrics = calibrate(job, some)
        if len(ranges) == 1:
            job.metrics.update(metrics)
        yield some, metrics


def calibrate(job: Job, groups: Sequence[Group]) -> dict[tuple[str, ...], Whitening]:
    """Run the calibration text through the model and whiten the inputs of some groups."""
    assert job.sequences is not None
    _, blocks = decoder_blocks(job.model)
    readers = list(dict.fromkeys(job.owner[member.name] for group in groups for member in group.members))
    last = max(member.block for group in groups for member in group.members)
    log.info("calibrating up to block %d on %d sequences of %d tokens", last, *job.sequences.shape)
    with job.stages.stage("calibrate", len(job.sequences)) as progress:
        grams = accumulate_grams(
            job.model, readers, job.sequences, job.recipe.batch_size, blocks[last], lambda n: progress.advance(n)
        )
    metrics: dict[tuple[str, ...], Whitening] = {}
    for inputs in dict.fromkeys(map(job.inputs, groups)):
        gram = torch.stack([grams[name] for name in inputs]).mean(0) if len(inputs) > 1 else grams[inputs[0]]
        metrics[inputs] = whiten(gram, job.sequences.numel(), job.recipe.damping)
        if job.recipe.layers_shared == 1:
            grams[inputs[0]] = torch.empty(0)  # has done its work
        if metrics[inputs].factor is None:
            log.warning("%s reads only zeros on the calibration text: solved without whitening", inputs[0])
    return metrics


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


def solve(
    job: Job,
    group: Group,
    metric: Whitening,
    target: Tensor,
    fisher: dict[str, Tensor] | None,
    iterations: int,
    on_iteration: Callable[[int, float], None] | None = None,
) -> Factorization:
    """min ||(A - D S) diag(w)|| for one group, w_j = sqrt(F_j) where columns are weighed, else 1.

    Args:
        target: A = L W, float64 (d1, sum of d2).
    """
    recipe = job.recipe
    weighed = target
    weights = None
    if weighs_columns(recipe):
        assert fisher is not None
        weights = torch.cat([fisher[member.name] for member in group.members]).sqrt()
        weights = weights / weights.mean()
        weighed = target * weights
    scale = weighed.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    options = SolverOptions(
        iterations=iterations,
        update=recipe.update,
        tolerance=recipe.tolerance,
        seed=recipe.seed,
        memory_bytes=SOLVER_MEMORY["cuda" if target.is_cuda else "cpu"],
        on_iteration=on_iteration,
    )
    unwhiten = None if metric.factor is None else metric.undo
    problem = Problem((weighed / scale).float(), unwhiten, tuple(group.d2s))
    solver = find_solver(recipe.solver)
    solution = solver.solve(problem, group.k, group.s if solver.free_support else round(group.s), options)
    factor = scale if weights is None else scale / weights
    return replace(solution, coefficients=(solution.coefficients * factor).to(solution.coefficients))


def solve_in_sequence(job: Job, groups: Sequence[Group], fisher: dict[str, Tensor] | None) -> list[Packed] | None:
    """Solve all groups in the order in which the model runs them, each on what it reads in the model compressed so far.

    Returns:
        None, with a warning, for a model whose blocks do not simply follow each other.
    """
    assert job.sequences is not None
    job.metrics.clear()
    prefix, blocks = decoder_blocks(job.model)
    flow = sequence.start(job.model, list(blocks), job.sequences, job.recipe.batch_size)
    if flow is None:
        log.warning("blocks of this model read more than the block before them gives: solved without compensation")
        return None
    place = {name: index for index, name in enumerate(job.owner)}
    packed: dict[str, Packed] = {}
    work, tokens = sum(map(_work, groups)), job.sequences.numel()
    last = max(group.members[0].block for group in groups)
    log.info("calibrating block by block on %d sequences of %d tokens", *job.sequences.shape)
    for index, block in enumerate(blocks[: last + 1]):
        local = f"{prefix}.{index}."
        stand_ins: dict[str, Tensor] = {}
        # Groups that read the same tensor are solved together, and so is what cannot depend on each other: all experts.
        together: dict[str, dict[str, list[Group]]] = {}
        for group in sorted(groups, key=lambda group: place[group.members[0].name]):
            if group.members[0].block == index:
                reader = job.inputs(group)[0].removeprefix(local)
                together.setdefault(kinds_of([reader]), {}).setdefault(reader, []).append(group)
        for by_reader in together.values():
            readers = {name: block.get_submodule(name) for name in by_reader}
            with job.stages.stage("calibrate", len(flow.dense)) as progress:
                found = sequence.grams(block, index, flow, stand_ins, readers, progress.advance)
            with job.stages.stage("solve", work) as progress:
                progress.reach(sum(_work(group) for group in groups if group.members[0].name in packed))
                for name, some in by_reader.items():
                    gram, cross = found.pop(name)
                    metric = whiten(gram, tokens, job.recipe.damping)
                    if metric.factor is None:
                        log.warning("%s reads only zeros on the calibration text: not whitened", local + name)
                    for group in some:
                        weights = torch.cat([_weight(job.model, member) for member in group.members], dim=1)
                        wanted = metric.apply(sequence.corrected(weights, gram, cross))
                        result = factorize(job, group, metric, wanted, fisher, progress)
                        packed[group.members[0].name] = result
                        for member, weight in dense_weights(result).items():
                            stand_ins[member.removeprefix(local)] = weight.to(weights)
        if index < last:
            sequence.advance(block, index, flow, stand_ins)
    return [packed[group.members[0].name] for group in groups]


def dense_weights(packed: Packed) -> dict[str, Tensor]:
    """The weights (d2, d1) that a group's stored factors stand for, float32."""
    weights = {}
    for name, entry in packed.entries.items():
        if entry.layout == "low-rank":
            left = packed.tensors[f"{entry.dictionary}.{checkpoint.LEFT}"]
            weights[name] = packed.tensors[f"{name}.{checkpoint.RIGHT}"].float() @ left.float()
        else:
            support, values = (packed.tensors[f"{name}.{part}"] for part in (checkpoint.SUPPORT, checkpoint.VALUES))
            coefficients = reference.coefficients(support, values, entry.k, entry.value_bits, torch.float32)
            weights[name] = coefficients @ packed.tensors[f"{entry.dictionary}.{checkpoint.DICTIONARY}"].float()
    return weights


def factorize(
    job: Job,
    group: Group,
    metric: Whitening,
    wanted: Tensor,
    fisher: dict[str, Tensor] | None,
    progress: Stage,
) -> Packed:
    """Solve one group, A = `wanted` (d1, sum of d2) in float64, and round the factors to what is stored."""
    first, done = group.members[0], progress.done
    short = f"{first.block}.{first.kind.rpartition('.')[2]}"

    def report(iteration: int, error: float) -> None:
        share = iteration / job.recipe.iterations
        progress.reach(done + share * _work(group), f"{short} T {iteration} error {error:.4f}")

    solution = solve(job, group, metric, wanted, fisher, job.recipe.iterations, report)
    progress.reach(done + _work(group))  # a solver may have stopped early
    result = pack(group, solution, metric, wanted)
    log.info(
        "%s: k %d, s %.4g, error %.4f", ", ".join(m.name for m in group.members), group.k, group.s,
        max(result.errors.values()),
    )  # fmt: skip
    return result


def pack(group: Group, solution: Factorization, metric: Whitening, target: Tensor) -> Packed:
    """Undo the whitening, scale the atoms to rms(x d) = 1 over the calibration tokens, round and pack.

    Args:
        solution: of A.
        target: A = L W, float64 (d1, sum of d2).
    """
    if not (torch.isfinite(solution.dictionary).all() and torch.isfinite(solution.coefficients).all()):
        raise RuntimeError(f"the solver returned numbers that are not finite for {group.members[0].name}")
    norms = torch.linalg.vector_norm(solution.dictionary.double(), dim=0)
    atom_scale = torch.where(norms > 0, metric.scale / norms, torch.ones_like(norms))
    dictionary = _saturate(metric.undo(solution.dictionary.double() * atom_scale)).to(torch.bfloat16)  # D (d1, k)
    coefficients = _saturate(solution.coefficients.double() / atom_scale[:, None]).float()  # S (k, d2)

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
            weight = old[name].weight
            assert isinstance(weight, Tensor)
            layer.requires_grad_(weight.requires_grad)
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
    """What solving a group costs, in arbitrary units: products of its codes with a Gram of its atoms."""
    return sum(group.d2s) * group.k**2


def _target(model: nn.Module, group: Group, metric: Whitening) -> Tensor:
    """A = L W of a group's members side by side, float64 (d1, sum of d2)."""
    return metric.apply(torch.cat([_weight(model, member) for member in group.members], dim=1))


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
