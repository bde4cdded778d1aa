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
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from cospadi.budget.plan import outlook
from cospadi.commands import speed
from cospadi.commands.estimate import STAGES, Cost, Estimate, estimate, seconds_of
from cospadi.commands.tables import duration
from cospadi.compress import compress
from cospadi.jobs.ledger import JobDirectory
from cospadi.recipe import Recipe
from cospadi.solvers import SOLVERS, Flops, SolverOptions


def foreseen(folder: Path, recipe: Recipe, **options: Any) -> Estimate:
    return estimate(folder, recipe, outlook(folder, recipe).plan, timing=False, **options)


def recipe_for(text_file: Path, **fields: Any) -> Recipe:
    usual = {"calibration": str(text_file), "sequences": 12, "length": 48, "ratio": 0.3, "iterations": 6}
    return Recipe.build(usual | {"gradient_sequences": 6, "batch_size": 3} | fields)


def attention_flops(query: Any, key: Any, *_args: Any, out_shape: Any = None, **_kwargs: Any) -> int:
    batch, heads, rows, width = query
    return 4 * batch * heads * rows * key[2] * width


def attention_back_flops(_grad: Any, query: Any, key: Any, *_args: Any, out_shape: Any = None, **_kwargs: Any) -> int:
    return attention_flops(query, key) * 5 // 2


def counted(work: Callable[[], object]) -> int:
    """FLOPs of matrix products and attention, as torch counts them; Grams, too, are torch's then."""
    aten = torch.ops.aten
    more = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_back_flops,
    }
    with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False, custom_mapping=more) as counter:
        patch.setattr("cospadi.native.takes_grams", lambda: False)
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "fields",
    [
        {"refine": 6},
        {"metric": "fisher", "allocate": "uniform", "refine": 6, "target": ["gate", "down"]},
        {"refine": 0},
        {"metric": "output", "refine": 0, "compensate": False},
        {"metric": "output", "compensate": True, "refine": 4},
        {"method": "svd-llm"},
        {"method": "coded", "ratio": 0.7},
        {"solver": "mod-htp", "metric": "output", "refine": 4},
        {"solver": "mod-htp", "metric": "weights"},
        {"solver": "sparsegpt", "share": "none", "refine": 5},
    ],
    ids=str,
)
def test_products_are_as_many_as_torch_counts(
    make_llama: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    fields: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where bf16 gains nothing: what stays in float32 of quick products counts in models as small as these."""
    monkeypatch.setattr("cospadi.solvers.htp.bf16_is_fast", lambda _device: False)
    folder = make_llama(hidden_size=64, intermediate_size=160, num_hidden_layers=2)
    recipe = recipe_for(text_file, **fields)
    spent = counted(lambda: compress(folder, recipe, tmp_path / "out"))
    expected = sum(flops.products for flops in foreseen(folder, recipe).flops.values())
    assert expected == pytest.approx(spent, rel=0.03)


@pytest.mark.parametrize(
    ("fields", "blocks", "tolerance"),
    [
        ({"refine": 2}, 2, 0.05),
        ({"refine": 0}, 2, 0.05),
        ({"metric": "output", "refine": 0, "compensate": False}, 2, 0.05),
        ({"method": "coded", "ratio": 0.7}, 2, 0.06),
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
    recipe = recipe_for(text_file, **({"iterations": 4} | fields))
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


def test_little_memory_for_the_cache_means_more_disk(make_llama: Callable[..., Path], text_file: Path) -> None:
    folder, recipe = make_llama(), recipe_for(text_file)
    roomy, tight = foreseen(folder, recipe), foreseen(folder, recipe, cache_bytes=0)
    assert tight.flops == roomy.flops
    assert roomy.disk_bytes < tight.disk_bytes
    assert roomy.memory_bytes > tight.memory_bytes


def test_peak_memory_is_within_30_percent(make_llama: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    """Of a model whose logits are most of it."""
    folder = make_llama(vocab_size=24000, max_position_embeddings=512)
    words = [str(folder), "--calibration", str(text_file), "--sequences", "8", "--length", "512", "--batch-size", "8"]
    words += ["--iterations", "4", "--refine", "4"]
    program = (
        "import sys\nfrom pathlib import Path\nfrom cospadi.cli import app\n"
        f"app(['plan', *{words}, '--no-timing', '--json'], standalone_mode=False)\n"
        f"app(['compress', *{words}, '-o', {str(tmp_path / 'out')!r}], standalone_mode=False)\n"
        # not ru_maxrss, in which a child has what its parent had
        "print(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0], file=sys.stderr)"
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
    one, two = (flops(d1, d2, k, 955, SolverOptions(iterations=count)) for count in (1, 2))
    difference: Flops = two + one * -1
    return difference


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


def test_seconds_are_flops_at_the_rate_of_their_kind() -> None:
    costs = [
        Cost("solve", (8, 5), Flops(3.0, 1.0)),
        Cost("solve", "factors", Flops(2.0)),
        Cost("load", "disk", nbytes=5e9),
    ]
    seconds = seconds_of(costs, {(8, 5): 0.5, "factors": 2.0})
    assert {stage: took for stage, took in seconds.items() if took} == {"solve": 6.0, "load": 5.0}


def test_a_model_whose_block_does_not_run_gets_no_time(
    make_llama: Callable[..., Path], text_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError

    folder, recipe = make_llama(), recipe_for(text_file)
    plan = outlook(folder, recipe).plan
    monkeypatch.setattr(LlamaDecoderLayer, "forward", fail)
    assert estimate(folder, recipe, plan).seconds is None
    assert "no time is told" in caplog.text


def test_passes_of_a_job_are_its_seconds_in_forward_passes(
    run: Callable[..., Any], make_llama: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    folder, words = make_llama(), ("--iterations", 1, "--calibration", text_file, "--sequences", 8, "--refine", 2)
    report = json.loads(run("compress", folder, *words, "-o", tmp_path / "json", "--json").out)
    assert set(report["seconds"]) == {
        *("load", "text", "gradients", "budgets", "calibrate", "solve", "refine", "prove", "write")
    }
    assert 0 < report["pass_seconds"] < sum(report["seconds"].values())
    told = run("compress", folder, *words, "-o", tmp_path / "told").out
    seconds, passes = next(line.split()[-3::2] for line in told.splitlines() if "time, all" in line)
    assert float(passes) > 1 or float(seconds) == 0
    without = run("compress", folder, "--metric", "weights", "-o", tmp_path / "free", "--json").out
    assert json.loads(without)["pass_seconds"] is None


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


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.04, "0.0 s"), (119, "119.0 s"), (600, "10.0 min"), (9000, "2.5 h"), (1e8, "3.2 years")],
)
def test_durations(seconds: float, told: str) -> None:
    assert duration(seconds) == told
