"""A job that is done on several engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from killed import hashes

import cospadi
from cospadi.jobs.pool import Engine


@pytest.fixture(scope="session")
def short_recipe(text_file: Path) -> dict[str, Any]:
    """All stages of the default recipe with few short solves; every group's last one is independent of the others'."""
    fields: dict[str, Any] = {"ratio": 0.3, "iterations": 3, "rho": 2.2, "fisher_sequences": 1, "compensate": False}
    return fields | {"calibration": str(text_file), "sequences": 4, "length": 32}


@pytest.fixture(scope="session")
def alone(dense_folder: Path, short_recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of what one process makes."""
    output = tmp_path_factory.mktemp("alone") / "out"
    cospadi.compress(dense_folder, short_recipe, output, engine=Engine(threads_per_task=1))
    return hashes(output)
