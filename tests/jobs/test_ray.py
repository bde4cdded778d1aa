"""Whole jobs on local processes and on a Ray cluster that loses a node: the same bytes as in one process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import hashes

import cospadi
from cospadi.jobs.ledger import JobDirectory, Piece
from cospadi.jobs.pool import Engine


@pytest.fixture(scope="module")
def recipe(text_file: Path) -> dict[str, Any]:
    """All stages of the default recipe with few short solves; every group's last one is independent of the others'."""
    fields: dict[str, Any] = {"ratio": 0.3, "iterations": 3, "rho": 2.2, "fisher_sequences": 1, "compensate": False}
    return fields | {"calibration": str(text_file), "sequences": 4, "length": 32}


@pytest.fixture(scope="module")
def alone(dense_folder: Path, recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of what one process makes."""
    output = tmp_path_factory.mktemp("alone") / "out"
    cospadi.compress(dense_folder, recipe, output, engine=Engine(threads_per_task=1))
    return hashes(output)


def test_two_processes_make_the_same_bytes(
    dense_folder: Path, recipe: dict[str, Any], alone: dict[str, str], tmp_path: Path
) -> None:
    engine = Engine(workers=2, threads_per_task=1)
    cospadi.compress(dense_folder, recipe, tmp_path / "out", engine=engine)
    assert hashes(tmp_path / "out") == alone


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A Ray cluster of three nodes on this machine, one processor each."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'cospadi[ray]'")
    from ray.cluster_utils import Cluster

    size = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    made = Cluster(initialize_head=True, head_node_args=size)
    made.others = [made.add_node(**size) for _ in range(2)]
    made.wait_for_nodes()
    yield made
    made.shutdown()


def test_a_cluster_of_three_nodes_that_loses_one_makes_the_same_bytes(
    cluster: Any,
    dense_folder: Path,
    recipe: dict[str, Any],
    alone: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put: Callable[..., Piece] = JobDirectory.put
    done: list[str] = []

    def put_and_kill(self: JobDirectory, key: str, *rest: Any) -> Piece:
        done.append(key)
        if key.startswith("curve/") and len(cluster.others) == 2:  # others of that stage are at work everywhere
            cluster.remove_node(cluster.others.pop(), allow_graceful=False)
        return put(self, key, *rest)

    monkeypatch.setattr(JobDirectory, "put", put_and_kill)
    engine = Engine("ray", threads_per_task=1, ray_address=cluster.address)
    cospadi.compress(dense_folder, recipe, tmp_path / "out", engine=engine)
    assert len(cluster.others) == 1
    assert hashes(tmp_path / "out") == alone
    assert sum(key.startswith("factors/") for key in done) >= 4


def test_a_job_goes_on_with_another_engine_but_not_with_other_threads(
    dense_folder: Path, recipe: dict[str, Any], alone: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put: Callable[..., Piece] = JobDirectory.put

    def stop_after_some(self: JobDirectory, key: str, *rest: Any) -> Piece:
        piece = put(self, key, *rest)
        if key.startswith("factors/"):
            raise KeyboardInterrupt
        return piece

    with monkeypatch.context() as patch:
        patch.setattr(JobDirectory, "put", stop_after_some)
        with pytest.raises(KeyboardInterrupt):
            cospadi.compress(dense_folder, recipe, tmp_path / "out", engine=Engine(workers=2, threads_per_task=1))
    with pytest.raises(cospadi.UserError, match="unfinished job with threads per task 1, not 2"):
        cospadi.compress(dense_folder, recipe, tmp_path / "out", engine=Engine(threads_per_task=2))
    cospadi.compress(dense_folder, recipe, tmp_path / "out", engine=Engine(threads_per_task=1))
    assert hashes(tmp_path / "out") == alone


def test_another_device_model_is_refused_unless_mixing_is_allowed(
    dense_folder: Path, recipe: dict[str, Any], alone: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    module = sys.modules["cospadi.compress"]  # the name in the package is the function
    with monkeypatch.context() as patch:
        patch.setattr(module, "write", stop)
        patch.setattr(module, "device_model", lambda device: f"abacus of {device}")
        with pytest.raises(KeyboardInterrupt):
            cospadi.compress(dense_folder, recipe, tmp_path / "out", engine=Engine(threads_per_task=1))
    with pytest.raises(cospadi.UserError, match="unfinished job with device abacus of cpu, not "):
        cospadi.compress(dense_folder, recipe, tmp_path / "out", engine=Engine(threads_per_task=1))
    assert torch.get_num_threads() == 1
    cospadi.compress(dense_folder, recipe, tmp_path / "out", engine=Engine(threads_per_task=1, allow_mixed=True))
    assert hashes(tmp_path / "out") == alone
