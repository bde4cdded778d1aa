"""What htp's choices are worth in the metric they are made for, on projections of a model.

    python benchmarks/two_sided.py MODEL --calibration FILE --projection '*.15.mlp.*' --ratio 0.5

Each projection is solved alone, with G and Gamma as a job has them, by htp as it is and with one choice changed; errors
are tr(Gamma E^T G E) over tr(Gamma W^T G W), in float64. Then, of every kind of projection, how much of what lies off
Gamma's diagonal is chance (what it is shrunk by), in the block with least and in that with most of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from cospadi.budget.plan import Group
from cospadi.calibration.gradients import NOISE
from cospadi.jobs.ledger import Ledger
from cospadi.jobs.pool import Engine
from cospadi.jobs.progress import Stages
from cospadi.recipe import CACHE_BYTES, Recipe
from cospadi.solvers import MetricProblem, SolverOptions, find_solver, htp
from cospadi.stages.costs import estimate_costs
from cospadi.stages.measure import measured_groups
from cospadi.stages.open import Job, opened
from cospadi.stages.text import read_text

T = find_solver("htp").iterations
FULL, DIAGONAL = "full", "diagonal"

VARIANTS: dict[str, tuple[str, dict[str, float], int]] = {
    "as it is": (FULL, {}, T),
    "solved for Gamma's diagonal": (DIAGONAL, {}, T),
    "Gamma throughout": (FULL, {"UNTIED": 0.0}, T),
    "Gamma after 0.6 T": (FULL, {"UNTIED": 0.6}, T),
    "tied steps: 1": (FULL, {"TIED_STEPS": 1}, T),
    "tied steps: 4": (FULL, {"TIED_STEPS": 4}, T),
    "steps of the columns: 1": (FULL, {"STEPS": 1}, T),
    "steps of the columns: 3": (FULL, {"STEPS": 3}, T),
    "T = 8": (FULL, {}, 8),
    "T = 20": (FULL, {}, 20),
    "T = 40": (FULL, {}, 40),
}
"""Name -> which Gamma the solver sees; constants of htp; iterations."""


def main(
    model: Path,
    calibration: Annotated[str, typer.Option(help="as of cospadi compress")],
    projection: Annotated[list[str], typer.Option(help="glob of names, repeatable")],
    ratio: float = 0.5,
    sequences: int = 64,
    length: int | None = None,
    threads: int = 1,
) -> None:
    """Print both tables as Markdown."""
    torch.set_num_threads(threads)
    recipe = Recipe.build(
        {"ratio": ratio, "calibration": calibration, "sequences": sequences, "length": length, "device": "cpu"},
        share="none", allocate="uniform", compensate=False, refine=0, include=tuple(projection),
    )  # fmt: skip
    columns: dict[str, list[tuple[float, float]]] = {}
    with opened(model, recipe, None, Stages(), Engine(), Ledger(), CACHE_BYTES) as job:
        read_text(job)
        costs = estimate_costs(job)
        for block in measured_groups(job, job.uniform.groups):
            for group, whitening, weight in block.measure(block.sets[0]):
                assert whitening.gram is not None
                problem = MetricProblem(weight.float(), whitening.gram.float(), costs.of(group), tuple(group.d2s))
                columns[group.members[0].name] = [_solved(problem, group.nonzeros, *one) for one in VARIANTS.values()]
        chance = _chance(job, job.uniform.groups)
    print(f"| htp | {' | '.join(columns)} | seconds |\n|---|{'---|' * len(columns)}---|")
    for index, name in enumerate(VARIANTS):
        errors = [f"{column[index][0]:.5f}" for column in columns.values()]
        print(f"| {name} | {' | '.join(errors)} | {sum(column[index][1] for column in columns.values()):.1f} |")
    print("\n| kind | chance, least | most |\n|---|---|---|")
    for kind, values in chance.items():
        print(f"| {kind} | {min(values):.2f} | {max(values):.2f} |")


def _solved(
    problem: MetricProblem, nonzeros: int, gamma: str, constants: dict[str, float], t: int
) -> tuple[float, float]:
    """The two-sided error of a solution, and the seconds that it took."""
    outputs = problem.outputs if gamma == FULL else tuple(block.diagonal().clone() for block in problem.outputs)
    with _changed(constants):
        start = time.perf_counter()
        found = htp.htp(
            MetricProblem(problem.weight, problem.gram, outputs, problem.members), nonzeros, SolverOptions(iterations=t)
        )
        seconds = time.perf_counter() - start
    return _cost(problem, problem.weight - found.coefficients) / _cost(problem, problem.weight), seconds


def _cost(problem: MetricProblem, error: Tensor) -> float:
    """tr(Gamma E^T G E)."""
    assert problem.gram is not None
    parts = torch.split(error.double(), [len(block) for block in problem.outputs], dim=1)
    read = [problem.gram.double() @ part for part in parts]
    weighed = [one @ block.double() for one, block in zip(read, problem.outputs, strict=True)]
    return float(sum((one * part).sum() for one, part in zip(weighed, parts, strict=True)))


@contextmanager
def _changed(constants: dict[str, float]) -> Iterator[None]:
    """Constants of htp's module inside this block."""
    kept = {name: getattr(htp, name) for name in constants}
    for name, value in constants.items():
        setattr(htp, name, value)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(htp, name, value)


def _chance(job: Job, groups: Sequence[Group]) -> dict[str, list[float]]:
    """Kind -> the part of what is off the diagonal of its Gamma that is chance, the mean over its blocks of outputs."""
    found: dict[str, list[float]] = {}
    for group in groups:
        member = group.members[0]
        piece = job.ledger.get(f"gradients/{member.block:04}")
        assert piece is not None
        noise = piece.tensors({f"{member.name}{NOISE}"})[f"{member.name}{NOISE}"]
        found.setdefault(member.kind, []).append(float(noise.mean()))
    return found


if __name__ == "__main__":
    typer.run(main)
