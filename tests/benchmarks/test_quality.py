"""The job on real trained models: sparse dictionaries beat low rank at equal bytes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import cospadi
from cospadi.commands import evaluate
from cospadi.commands.demo import run_demo
from cospadi.demo import HELD_OUT, model_path, stdlib_documents
from cospadi.jobs.progress import Stages
from cospadi.model import load


def test_demo_ranks_the_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cospadi.commands.demo.WINDOWS", 6)
    monkeypatch.setattr("cospadi.commands.demo.SEQUENCES", 6)
    ours_in_short = {"gradient_sequences": 2, "iterations": 4, "refine": 5}
    monkeypatch.setattr("cospadi.commands.demo.OURS", ours_in_short)
    dense, low_rank, paper, pruned, ours = run_demo(ratio=0.5, iterations=2, stages=Stages())
    assert dense.perplexity < 20
    assert dense.perplexity < ours.perplexity < min(paper.perplexity, pruned.perplexity)
    assert max(paper.perplexity, pruned.perplexity) < low_rank.perplexity
    assert 0.5 <= paper.ratio < 0.51
    assert 0.5 <= ours.ratio < 0.5004
    assert pruned.nbytes == ours.nbytes <= 0.5 * dense.nbytes


def test_demo_text_keeps_what_is_held_out_apart() -> None:
    train, held_out = stdlib_documents("train"), stdlib_documents("heldout")
    assert len(held_out) == len(HELD_OUT)
    assert not set(train) & set(held_out)


def test_demo_model_is_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in model_path().glob("*.safetensors")) < 8e6


def test_stories260k(shared_model: Callable[[str], Path], tmp_path: Path) -> None:
    """A public model with sizes that are no multiples of 8 and fp32 weights."""
    folder = shared_model("stories260k")
    data = folder.parent.parent / "data"
    tokenizer = load.load_tokenizer(folder)
    windows = evaluate.text_windows(tokenizer, [(data / "stories_heldout.txt").read_text()], 512)[:16]
    found = {}
    for solver, update in (("svd-llm", "power"), ("ksvd", "power"), ("ksvd", "mod")):
        recipe = {"ratio": 0.2, "solver": solver, "share": "none", "update": update, "iterations": 3, "sequences": 24}
        recipe |= {"allocate": "uniform", "metric": "output", "compensate": False, "refine": 0}
        recipe |= {"calibration": str(data / "stories_calibration.jsonl")}
        output = tmp_path / f"{solver}-{update}"
        result = cospadi.compress(folder, recipe, output)
        assert result.plan.ratio >= 0.2
        loaded = load.load_model(output, torch.device("cpu"))
        found[solver, update] = evaluate.perplexity(loaded, windows).value
    dense = evaluate.perplexity(load.load_model(folder, torch.device("cpu")), windows).value
    low_rank = found.pop(("svd-llm", "power"))
    for perplexity in found.values():
        assert dense < perplexity < 0.5 * low_rank
