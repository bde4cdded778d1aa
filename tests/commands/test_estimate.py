"""What `cospadi plan` foretells against what `compress` does: FLOPs, disk, memory. Times are no tests' business."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cospadi.budget.plan import outlook
from cospadi.commands import speed
from cospadi.commands.estimate import STAGES, Estimate, estimate
from cospadi.commands.tables import duration
from cospadi.compress import compress
from cospadi.jobs.ledger import JobDirectory
from cospadi.recipe import Recipe
from cospadi.solvers import SOLVERS, Flops, SolverOptions


def foreseen(folder: Path, recipe: Recipe, **options: Any) -> Estimate:
    return estimate(folder, recipe, outlook(folder, recipe).plan, timing=False, **options)


def recipe_for(text_file: Path, **fields: Any) -> Recipe:
    usual = {"calibration": str(text_file), "sequences": 24, "length": 48, "ratio": 0.3, "iterations": 12}
    return Recipe.build(usual | {"fisher_sequences": 6, "batch_size": 3} | fields)


def attention_flops(query: Any, key: Any, *_args: Any, out_shape: Any = None, **_kwargs: Any) -> int:
    batch, heads, rows, width = query
    return 4 * batch * heads * rows * key[2] * width


def attention_back_flops(_grad: Any, query: Any, key: Any, *_args: Any, out_shape: Any = None, **_kwargs: Any) -> int:
    return attention_flops(query, key) * 5 // 2


def counted(work: Callable[[], object]) -> int:
    """FLOPs of matrix products and attention, as torch counts them."""
    aten = torch.ops.aten
    more = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_back_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("fields", "tolerance"),
    [
        ({"allocate": "uniform", "weight_columns": "none"}, 0.03),
        ({"allocate": "uniform", "weight_columns": "none", "compensate": False}, 0.03),
        ({"allocate": "uniform", "weight_columns": "none", "share": "none", "solver": "svd-llm"}, 0.03),
        ({"allocate": "uniform", "weight_columns": "none", "data_free": True}, 0.03),
        ({"allocate": "uniform"}, 0.03),
        ({"rho": 2.2}, 0.25),  # which sizes budgets choose is not known before
    ],
)
def test_products_are_as_many_as_torch_counts(
    make_llama: Callable[..., Path], text_file: Path, tmp_path: Path, fields: dict[str, Any], tolerance: float
) -> None:
    folder = make_llama(hidden_size=64, intermediate_size=160, num_hidden_layers=2)
    recipe = recipe_for(text_file, **fields)
    spent = counted(lambda: compress(folder, recipe, tmp_path / "out"))
    expected = sum(flops.products for flops in foreseen(folder, recipe).flops.values())
    assert expected == pytest.approx(spent, rel=tolerance)


@pytest.mark.parametrize(
    ("fields", "blocks", "tolerance"),
    [
        ({}, 2, 0.05),
        ({"allocate": "uniform", "weight_columns": "none"}, 2, 0.05),
        ({"fisher_sequences": 24, "rho": 2.2}, 4, 0.3),  # most of it hidden states, of all candidates that may be
    ],
)
def test_disk_at_its_fullest(
    make_llama: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    blocks: int,
    tolerance: float,
) -> None:
    folder = make_llama(hidden_size=128, intermediate_size=320, num_hidden_layers=blocks)
    recipe = recipe_for(text_file, iterations=4, **fields)
    sizes: list[int] = []

    def watched(function: Any) -> Any:
        def look(*args: Any) -> Any:
            before = size_of(tmp_path)
            result = function(*args)
            sizes.extend([before, size_of(tmp_path)])
            return result

        return look

    for name in ("put", "drop", "remove"):
        monkeypatch.setattr(JobDirectory, name, watched(getattr(JobDirectory, name)))
    compress(folder, recipe, tmp_path / "out")
    assert foreseen(folder, recipe).disk_bytes == pytest.approx(max(sizes), rel=tolerance)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_little_memory_for_the_cache_means_more_walks_and_more_disk(
    make_llama: Callable[..., Path], text_file: Path
) -> None:
    folder = make_llama()
    recipe = recipe_for(text_file)
    roomy, tight = foreseen(folder, recipe), foreseen(folder, recipe, cache_bytes=0)
    written = foreseen(folder, recipe, cache_bytes=0, keep_grams=True)
    assert tight.flops["calibrate"].products > 1.3 * roomy.flops["calibrate"].products
    assert written.flops["calibrate"] == roomy.flops["calibrate"]
    assert roomy.disk_bytes < tight.disk_bytes < written.disk_bytes


def test_a_plan_that_is_followed_needs_no_budgets(make_llama: Callable[..., Path], text_file: Path) -> None:
    folder = make_llama()
    recipe = recipe_for(text_file, weight_columns="none")
    assert foreseen(folder, recipe).flops["budgets"].total > 0
    assert foreseen(folder, recipe, final=True).flops["budgets"] == Flops()


def test_peak_memory_is_within_30_percent(make_llama: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    """Of a model whose logits are most of it."""
    folder = make_llama(vocab_size=24000, max_position_embeddings=512)
    words = [str(folder), "--calibration", str(text_file), "--sequences", "8", "--length", "512", "--batch-size", "8"]
    words += ["--iterations", "4", "--rho", "2"]
    program = (
        "import resource, sys\nfrom cospadi.cli import app\n"
        f"app(['plan', *{words}, '--no-timing', '--json'], standalone_mode=False)\n"
        f"app(['compress', *{words}, '-o', {str(tmp_path / 'out')!r}], standalone_mode=False)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", program], env=one_thread, capture_output=True, check=True, text=True)
    expected = json.JSONDecoder().raw_decode(ran.stdout)[0]["estimate"]["memory_bytes"]
    assert expected == pytest.approx(1024 * int(ran.stderr.split()[-1]), rel=0.3)


def test_iterations_cost_what_the_solver_benchmark_counts() -> None:
    d1, d2, k = 2048, 8192, 1911
    products = 4 * d1 * k * d2 + 8 * d2 * k * k + 2 * (d1 + d2) * k * k * 5 // 8
    assert iteration(d1, d2, k).products == products
    assert iteration(8192, 2048, k) == iteration(2048, 2048, k)


def iteration(d1: int, d2: int, k: int) -> Flops:
    flops = SOLVERS["mod-htp"].flops
    one, two = (flops(d1, d2, k, 955, SolverOptions(iterations=count), True) for count in (1, 2))
    return two + one * -1


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_can_be_timed(
    make_llama: Callable[..., Path], text_file: Path, monkeypatch: pytest.MonkeyPatch, solver: str
) -> None:
    folder = make_llama()
    recipe = recipe_for(text_file, solver=solver)
    full = estimate(folder, recipe, outlook(folder, recipe).plan)
    monkeypatch.setitem(speed.TIMED_FLOPS, "cpu", 1e5)  # all pieces are shrunk
    monkeypatch.setitem(speed.TIMED_WIDTH, "cpu", 24)
    shrunk = estimate(folder, recipe, outlook(folder, recipe).plan)
    for found in (full, shrunk):
        assert found.seconds is not None
        assert set(found.seconds) == set(found.flops) == set(STAGES)
        assert min(found.seconds.values()) >= 0
        assert found.seconds["solve"] > 0


def test_seconds_of_a_solve_lie_between_two_that_were_timed_and_grow_with_flops_beyond() -> None:
    known = speed.Speed(0.0, 0.0, ((1e6, 0.2), (3e6, 0.4)))
    assert [known.solving(flops) for flops in (1e5, 1e6, 2e6, 3e6, 6e6)] == pytest.approx([0.2, 0.2, 0.3, 0.4, 0.8])


def test_the_command_tells_costs_and_leaves_timing_out(
    run: Callable[..., Any], make_llama: Callable[..., Path], text_file: Path
) -> None:
    words = ("plan", make_llama(), "--calibration", text_file, "--sequences", 8)
    told = run(*words, "--no-timing")
    assert told.code == 0
    assert "peak memory" in told.out
    assert "disk, beside the source" in told.out
    data = json.loads(run(*words, "--no-timing", "--json").out)["estimate"]
    assert data["seconds"] is None
    assert data["flops"] > 0
    assert data["memory_bytes"] > data["disk_bytes"] > 0


@pytest.mark.parametrize(("seconds", "told"), [(0.04, "0.0 s"), (119, "119.0 s"), (600, "10.0 min"), (9000, "2.5 h")])
def test_durations(seconds: float, told: str) -> None:
    assert duration(seconds) == told
