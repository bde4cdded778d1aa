"""What jobs of one model and text have in common is calibrated once, and changes no byte of what each writes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from killed import hashes
from transformers import MixtralConfig

import cospadi
from cospadi.jobs.ledger import JobDirectory
from cospadi.recipe import CALIBRATED, METHODS, Recipe
from cospadi.stages import costs, measure

SHORT = {"sequences": 4, "length": 32, "batch_size": 2, "gradient_sequences": 2}
JOBS: list[dict[str, Any]] = [
    {"method": "sparse", "ratio": 0.3, "refine": 1, "iterations": 1},
    {"method": "sparse", "ratio": 0.4, "refine": 0, "iterations": 1},
    {"method": "wanda", "ratio": 0.3},
    {"bits": 5},
    {"bits": 5, "share": "layers:2"},
    {"method": "magnitude", "ratio": 0.3},
]
"""Every way that text runs through the model: refined, compensated, neither, over several blocks, not at all. Gradients
are taken of three kinds: the diagonal, all of Gamma, the diagonal with pivots."""


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[JobDirectory]:
    found = JobDirectory(tmp_path / "shared")
    yield found
    found.close()


@pytest.fixture(scope="module")
def mixtral(make_model: Callable[..., Path]) -> Path:
    """Experts that see fewer tokens than they have inputs, whose Grams are filled up from each other's."""
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 260}
    return make_model(MixtralConfig(**sizes, **more, max_position_embeddings=64))


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_bytes_are_those_of_a_job_alone_and_the_dense_model_is_calibrated_once(
    kind: str,
    request: pytest.FixtureRequest,
    text_file: Path,
    shared: JobDirectory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = request.getfixturevalue("dense_folder" if kind == "llama" else "mixtral")
    some, kinds = (JOBS, 3) if kind == "llama" else (JOBS[:3], 2)
    jobs = [Recipe.build(job, calibration=str(text_file), **SHORT) for job in some]
    alone = []
    for number, recipe in enumerate(jobs):
        cospadi.compress(folder, recipe, tmp_path / f"alone-{number}")
        alone.append(hashes(tmp_path / f"alone-{number}"))
    counted: dict[str, int] = {}
    for module, name in (
        (sys.modules["cospadi.stages.text"], "token_sequences"),
        (measure.walk, "grams"),
        (costs, "gradient_grams_by_blocks"),
    ):
        whole = getattr(module, name)

        def counting(*args: Any, name: str = name, whole: Any = whole, **more: Any) -> Any:
            counted[name] = counted.get(name, 0) + (1 if name != "grams" else bool(args[4]))
            return whole(*args, **more)

        monkeypatch.setattr(module, name, counting)
    for number, recipe in enumerate(jobs):
        cospadi.compress(folder, recipe, tmp_path / f"shared-{number}", shared=shared)
        assert hashes(tmp_path / f"shared-{number}") == alone[number], recipe
    assert counted == {"token_sequences": 1, "grams": 2, "gradient_grams_by_blocks": kinds}  # of two blocks


def test_no_method_sets_what_jobs_must_have_in_common() -> None:
    assert set(CALIBRATED) <= set(Recipe.model_fields)
    for method in METHODS.values():
        assert not set(CALIBRATED) & set(method.fields)


def test_what_is_of_another_text_or_model_is_refused(
    dense_folder: Path, make_llama: Callable[..., Path], text_file: Path, shared: JobDirectory, tmp_path: Path
) -> None:
    fields = {"method": "wanda", "calibration": str(text_file)} | SHORT
    cospadi.compress(dense_folder, fields, tmp_path / "one", shared=shared)
    for model, other, why in (
        (dense_folder, fields | {"sequences": 3}, "sequences 4, not 3"),
        (make_llama(num_hidden_layers=3), fields, "weights"),
    ):
        with pytest.raises(cospadi.UserError, match=f"shared holds an unfinished job with {why}"):
            cospadi.compress(model, other, tmp_path / "other", shared=shared)
    assert not (tmp_path / "other").exists()
