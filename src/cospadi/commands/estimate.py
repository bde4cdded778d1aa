"""What a job will cost, before it runs: FLOPs, memory and disk by formula, time as FLOPs over this machine's speed.

All formulas but the solvers' stand here; docs/scaling.md explains them. Names: n calibration sequences of L tokens are
N tokens, and those that gradients and losses are taken on M; a decoder block multiplies every token with P parameters
and its attention is w wide; hidden states are h wide and the vocabulary has V tokens; a group is A (d1 x d2) with k
atoms and T iterations. A multiplication with an addition counts as two FLOPs.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from cospadi.budget.plan import Group, Plan, owner_without_weights
from cospadi.commands.agenda import Agenda, Shape, Text, agenda_of, shape_of, text_of
from cospadi.commands.speed import Speed, dimensions, measure_speed, solver_flops
from cospadi.model import companions, load
from cospadi.model.projections import find_projections
from cospadi.recipe import CACHE_BYTES, Recipe
from cospadi.solvers import find_solver
from cospadi.solvers.flops import Flops, cholesky, triangular
from cospadi.solvers.products import bf16_is_fast, self_product_flops
from cospadi.stages.budgets import SPANS

STAGES = ("load", "fisher", "calibrate", "budgets", "solve", "write")


@dataclass(frozen=True)
class Estimate:
    """What a job will cost.

    Attributes:
        flops: stage -> FLOPs.
        seconds: stage -> seconds; None where nothing was timed.
        memory_bytes: largest resident memory; on a GPU the host's and the device's together, which bounds either.
        disk_bytes: the job directory and the output together at their largest; the source is not counted.
    """

    flops: dict[str, Flops]
    seconds: dict[str, float] | None
    memory_bytes: int
    disk_bytes: int


def estimate(
    model: str | Path,
    recipe: Recipe,
    plan: Plan,
    *,
    final: bool = False,
    cache_bytes: int = CACHE_BYTES,
    keep_grams: bool = False,
    timing: bool = True,
) -> Estimate:
    """Look ahead at the costs of `compress` for a model, from its config and headers, with one worker.

    What only the text or the weights can tell is taken as asked or as likely: that the text has all sequences, that
    blocks follow each other, that budgets choose each rho as often, that no Gram is singular.

    Args:
        plan: the uniform plan, or the one that is to be followed.
        final: whether it is to be followed, so that no budgets are measured.
        timing: run the pieces for some seconds on the recipe's device; else nothing is said about time.

    Raises:
        UserError: as `compress` would.
    """
    skeleton = load.load_skeleton(model, recipe.revision)
    projections = find_projections(skeleton.model)
    selected = {member.name for group in plan.compressed for member in group.members}
    shape = shape_of(skeleton.model, owner_without_weights(skeleton.model, projections), selected)
    text = text_of(recipe, load.positions(skeleton.model.config))
    agenda = agenda_of(recipe, plan, shape, text, final, cache_bytes, keep_grams)
    folder = load.resolve(model, recipe.revision, weights=False)
    others = sum(path.stat().st_size for pattern in companions.COMPANIONS for path in folder.glob(pattern))
    stored = sum(parameter.nbytes for parameter in skeleton.model.parameters())
    stored = sum(skeleton.sizes.values()) if skeleton.sizes else stored
    output = stored + sum(group.parts.total - shape.item * group.dense_bytes // 2 for group in plan.compressed)
    costs = costs_of(shape, recipe, text, agenda, cache_bytes, stored, output)
    flops = dict.fromkeys(STAGES, Flops())
    for cost in costs:
        flops[cost.stage] += cost.flops * cost.count
    memory = memory_of(shape, recipe, plan, text, agenda, cache_bytes)
    disk = disk_of(shape, plan, text, agenda, cache_bytes, keep_grams, output + others)
    seconds = None
    if timing:
        started = time.process_time()  # what `compress` imports is what this process has imported
        speed = measure_speed(shape, recipe, text, agenda)
        seconds = dict.fromkeys(STAGES, 0.0) | {"load": started}
        for cost in costs:
            seconds[cost.stage] += cost.seconds(speed)
    return Estimate(flops, seconds, memory, disk)


DISK_BYTES_A_SECOND = 1e9
"""Of files that are hashed, or copied by way of the page cache."""


@dataclass(frozen=True)
class Cost:
    """Some equal pieces of a job.

    Attributes:
        kind: what is done, for the speed: "passes" (through the model, with Grams), "factors" (float64), "solver",
            "disk".
        flops: of each. count: how many.
        nbytes: read or written.
    """

    stage: str
    kind: str
    flops: Flops = Flops()  # noqa: RUF009
    count: float = 1.0
    nbytes: float = 0.0

    def seconds(self, speed: Speed) -> float:
        """Of all pieces."""
        flops = self.flops.total
        of_each = {
            "passes": flops * speed.passes,
            "factors": flops * speed.factors,
            "solver": speed.solving(flops),
            "disk": self.nbytes / DISK_BYTES_A_SECOND,
        }
        return self.count * of_each[self.kind]


def costs_of(
    shape: Shape, recipe: Recipe, text: Text, agenda: Agenda, cache_bytes: int, stored: int, output: int
) -> list[Cost]:
    """All that a job does, piece by piece.

    Args:
        stored, output: bytes of the checkpoint's tensors before and after.
    """
    return [
        *passes_of(shape, text, agenda),
        *solves_of(recipe, agenda, text.sequences > 0),
        *disk_traffic(shape, text, agenda, cache_bytes, stored, output),
    ]


def passes_of(shape: Shape, text: Text, agenda: Agenda) -> Iterator[Cost]:
    """All that runs text through the model.

    The walk in the model compressed so far passes for each input twice up to it, for the dense and for the compressed
    model, with G and C, and twice through all of a block behind each but the last.
    """
    n, m, length = text.tokens, text.checked_tokens, text.length

    def whole(tokens: float) -> Flops:
        return Flops(forward_flops(shape, tokens, length) + head_flops(shape, tokens))

    grams = sum(self_product_flops(n, reader.d1) for reader in shape.readers)
    whitening = Flops(0.0, sum(cholesky(reader.d1) for reader in shape.readers))
    yield Cost("load", "passes", whole(agenda.learned * length))
    yield Cost("fisher", "passes", Flops(fisher_flops(shape, m, length)), agenda.rounds)
    yield Cost("calibrate", "passes", Flops(forward_flops(shape, n, length) + grams), agenda.walks)
    if agenda.compensated:
        attended = 4.0 * length * shape.attention
        up_to = sum(2 * n * (2.0 * reader.before + (attended if reader.before else 0)) for reader in shape.readers)
        crosses = sum(2.0 * n * reader.d1**2 for reader in shape.readers)
        through = 2 * forward_flops(shape, n, length, slice(0, -1))
        yield Cost("calibrate", "passes", Flops(up_to + grams + crosses + through))
    yield Cost("calibrate", "factors", whitening, agenda.walks + agenda.compensated)
    yield Cost("budgets", "passes", whole(m), agenda.candidates)


def forward_flops(shape: Shape, tokens: float, length: int, blocks: slice = slice(None)) -> float:
    """Of a forward pass through blocks: 2 P a token, and 4 L w for attention, as if no token were masked."""
    return sum(tokens * (2 * p + 4 * length * shape.attention) for p in shape.parameters[blocks])


def head_flops(shape: Shape, tokens: float) -> float:
    """Of the logits: 2 h V a token."""
    return 2.0 * tokens * shape.hidden * shape.vocabulary


def fisher_flops(shape: Shape, tokens: float, length: int) -> float:
    """Of one round of gradients: blocks run twice, and back for activations only, with two and a half the attention."""
    back = sum(tokens * (2 * p + 10 * length * shape.attention) for p in shape.parameters)
    return 2 * forward_flops(shape, tokens, length) + back + 2 * head_flops(shape, tokens)


def solves_of(recipe: Recipe, agenda: Agenda, whitened: bool) -> Iterator[Cost]:
    """All solver runs, with L W before them and D S after each of them."""
    for run in agenda.runs:
        stage = "solve" if run.stage == "solve" else "budgets"
        d1, d2 = run.sizes[0].d1, sum(run.sizes[0].d2s)
        around = Flops(2.0 * d1**2 * d2 if whitened else 0.0)
        if run.stage == "solve" and agenda.compensated:  # the corrected weight
            around += Flops(2.0 * d1**2 * d2, cholesky(d1) + 2 * triangular(d1, d2))
        first = dimensions(run.sizes[0])  # what its run leaves for those behind it
        around += solver_flops(recipe, *first, again=False) + solver_flops(recipe, *first) * -1
        for size in run.sizes:
            around += Flops(2.0 * d1 * size.k * d2)
            if run.stage != "curves" and whitened:
                around += Flops(0.0, triangular(d1, size.k))
            if run.stage == "solve":
                around += Flops((2.0 * d1**2 * size.k if whitened else 0) + 2.0 * d1 * size.k * d2 * agenda.compensated)
            timed = solver_flops(recipe, *dimensions(size))
            count = solver_flops(recipe, *dimensions(size), run.iterations).total / timed.total
            yield Cost(stage, "solver", timed, count * run.count)
        yield Cost(stage, "factors", around, run.count)


def disk_traffic(
    shape: Shape, text: Text, agenda: Agenda, cache_bytes: int, stored: int, output: int
) -> Iterator[Cost]:
    """Bytes that are read, hashed or written.

    Each weight is read by whatever loads its block and for each problem it is part of; hidden states, as far as they
    are beyond half of the cache, go to the disk and come back behind every block.
    """

    def beyond(flow: int) -> int:
        return max(0, flow - cache_bytes // 2)

    first = agenda.runs[0].sizes[0].members
    problems = sum(run.count for run in agenda.runs if run.sizes[0].members == first)
    reads = 6 + agenda.walks + 2 * agenda.rounds + 2 * (agenda.candidates > 0) + agenda.compensated + problems
    yield Cost("load", "disk", count=reads, nbytes=stored)
    yield Cost("write", "disk", count=5, nbytes=output)
    blocks = len(shape.parameters)
    flow, checked = text.tokens * shape.hidden * shape.item, text.checked_tokens * shape.hidden * shape.item
    moved = 2 * blocks * (agenda.walks * beyond(flow) + beyond(agenda.candidates * checked))
    paired = (2 * blocks + len(shape.readers)) * agenda.compensated * beyond(2 * flow)
    yield Cost("calibrate", "disk", nbytes=moved + paired + 4 * agenda.rounds * beyond((blocks + 2) * checked))


def memory_of(shape: Shape, recipe: Recipe, plan: Plan, text: Text, agenda: Agenda, cache_bytes: int) -> int:
    """The largest of what the stages hold, in bytes, beyond what the process has without a model.

    Each holds one block, its text in a spill that keeps half of the cache in memory, and its own working set.
    """
    block, spill = max(shape.block_bytes), cache_bytes // 2
    batch, length = min(text.batch, text.sequences) * text.length, text.length
    flow, checked = text.tokens * shape.hidden * shape.item, text.checked_tokens * shape.hidden * shape.item
    widest = max(reader.d1 for reader in shape.readers)
    by_block: dict[int, list[int]] = {}
    for reader in shape.readers:
        by_block.setdefault(reader.block, []).append(8 * reader.d1**2)
    grams = max(sum(sizes) for sizes in by_block.values())
    whitenings = sum(8 * reader.d1**2 for reader in shape.readers) if agenda.kept else grams
    solving = max(solving_bytes(size, agenda.compensated) for run in agenda.runs for size in run.sizes)

    def activations(tokens: int) -> int:
        """Hidden states, queries and the like, three tensors of the widest, its copy in float32, the product."""
        return tokens * (shape.item * (4 * shape.hidden + 3 * widest) + 4 * widest) + 4 * widest**2

    def losses(tokens: int) -> int:
        """Logits in float32 and their softmax."""
        return shape.edge_bytes + 8 * tokens * shape.vocabulary

    # Without text the whole job is the solving.
    stages = [solving]
    if text.sequences:
        seen = 2 * len(shape.parameters) * batch * shape.hidden * shape.item
        stages.append(seen + shape.edge_bytes + batch * shape.vocabulary * shape.item)
        stages.append(min(flow, spill) + block + grams + whitenings * agenda.kept + activations(batch))
        stages.append(min(flow, spill) + whitenings + solving)
    if agenda.rounds:
        inputs = min((len(shape.parameters) + 2) * checked, spill)
        tape = 2 * activations(length) + length * shape.vocabulary * (2 * shape.item + 12) + shape.edge_bytes
        stages.append(inputs + whitenings * agenda.kept + max(block + 2 * activations(length), tape))
    if agenda.candidates:
        weights = shape.item * sum(group.dense_bytes // 2 for group in plan.compressed)
        some = weights if agenda.kept else max(shape.block_bytes)
        flows = min(agenda.candidates * checked, spill)
        stages.append(flows + agenda.candidates * some + whitenings + max(solving, losses(batch)))
    if agenda.compensated:
        flows, square = min(2 * flow, spill), 8 * widest**2
        stages.append(flows + 2 * block + 2 * square + 2 * activations(batch))
        stages.append(flows + 2 * block + 7 * square + solving)
    return base_bytes() + prepared_bytes(recipe, agenda) + max(stages)


PRODUCT_BYTES, MOST_PRODUCTS = 550_000, 1024
"""Bytes of what torch's CPU library keeps of a bf16 product of a shape, and of how many shapes."""


def prepared_bytes(recipe: Recipe, agenda: Agenda) -> int:
    """Bytes of prepared bf16 products: torch's CPU library keeps the code that it made for each shape.

    A size that groups are measured at counts once for equal groups; the sizes that budgets then choose all differ.
    """
    products = find_solver(recipe.solver).quick_products
    if not products or load.pick_device(recipe.device).type != "cpu" or not bf16_is_fast(torch.device("cpu")):
        return 0
    sizes = {((size.d1, *size.d2s), size.k) for run in agenda.runs for size in run.sizes if run.stage != "candidates"}
    groups = len({run.sizes[0].members for run in agenda.runs})
    chosen = (len(SPANS) - 1) * groups if agenda.candidates else 0
    return PRODUCT_BYTES * min(MOST_PRODUCTS, products * (len(sizes) + chosen))


def solving_bytes(group: Group, compensated: bool) -> int:
    """Bytes of a solver run: W, A in two precisions, its decomposition or the codes; W' where it has one."""
    d1, d2, k = group.d1, sum(group.d2s), group.k
    small = min(d1, d2)
    start = 28 * d1 * d2 + 32 * small**2
    iterating = 4 * (d1 + d2) * small + 16 * k * d2 + 20 * k**2
    packing = 4 * d1 * small + 16 * d1 * k + 24 * k * d2 + 8 * d1 * d2
    return (16 + 8 * compensated) * d1 * d2 + max(start, iterating, packing)


TEXT_LIBRARIES = 80_000_000
"""Bytes of what reading a text and a tokenizer load beside the package."""


def base_bytes() -> int:
    """Resident bytes of this process, which has loaded what `compress` loads, but for what reads the text."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) + TEXT_LIBRARIES
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak if os.uname().sysname == "Darwin" else 1024 * peak) + TEXT_LIBRARIES


def disk_of(
    shape: Shape, plan: Plan, text: Text, agenda: Agenda, cache_bytes: int, keep_grams: bool, output: int
) -> int:
    """The job directory and the output together at their largest, in bytes.

    The job directory keeps tokens and F (float64), for a while the weights that short runs make, the candidates' hidden
    states behind the last block and the one before it, hidden states beyond half of the cache, in the end the factors
    beside the output.
    """

    def beyond(flow: int) -> int:
        return max(0, flow - cache_bytes // 2)

    flow, checked = text.tokens * shape.hidden * shape.item, text.checked_tokens * shape.hidden * shape.item
    small = 8 * text.tokens + (2 if agenda.rounds else 0) * 8 * sum(sum(group.d2s) for group in plan.groups)
    quick = shape.item * sum(group.dense_bytes // 2 for group in plan.compressed) if agenda.rounds else 0
    kept = sum(8 * reader.d1**2 for reader in shape.readers) if keep_grams and not agenda.kept else 0
    factors = sum(group.parts.total for group in plan.compressed)
    flows = agenda.candidates * checked
    passed = min(2, len(shape.parameters) - 1) * flows
    inputs = beyond((len(shape.parameters) + 2) * checked) if agenda.rounds else 0
    return small + max(
        quick + kept + max(beyond(flow), inputs),
        kept + passed + beyond(flow + flows),
        kept + factors + max(output, beyond((1 + agenda.compensated) * flow)),
    )
