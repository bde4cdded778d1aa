"""Tasks, and a whole job, on a Ray cluster that loses nodes: the same bytes."""

from __future__ import annotations

import copy
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import hashes
from tasks import CPU, contents, here, problems, products, raises, run, solve, waits

import cospadi
from cospadi import CheckpointError, UserError
from cospadi.jobs.carry import pack, settle
from cospadi.jobs.ledger import JobDirectory, Piece
from cospadi.jobs.pool import Engine, Pool, Task

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'cospadi[ray]'")
from cospadi.jobs import ray as jobs_ray  # noqa: E402

NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three nodes of one processor each, and their own folder in place of Ray's."""
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a short name: sockets are made in it
    soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 200, "health_check_failure_threshold": 3}
    head = NODE | {"include_dashboard": False, "temp_dir": folder, "_system_config": soon}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # tasks of this file are imported on the nodes
        patch.setenv("RAY_TMPDIR", folder)  # where the head's address is written, into a folder that has to be there
        Path(folder, "ray").mkdir()
        nodes = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(2):
                nodes.add_node(wait=False, **NODE)
            nodes.wait_for_nodes()
            yield nodes
        finally:
            nodes.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def on_ray(cluster: Any) -> Iterator[Pool]:
    """One connection for all tests: another one would start its own processes."""
    with Engine("ray", threads_per_task=1, ray_address=cluster.address).open(CPU) as pool:
        yield pool


def wait_for_nodes(cluster: Any) -> None:
    """Three nodes, also where a test has lost one."""
    while len(cluster.worker_nodes) < 2:
        cluster.add_node(wait=False, **NODE)
    cluster.wait_for_nodes()


def lose_a_node(cluster: Any) -> None:
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)


def test_a_node_of_another_kind_is_refused() -> None:
    """Unless mixing is allowed."""
    call, ours = pack((products, (0, 8))), jobs_ray.site(CPU)
    wanted = here(products, [Task((0, 8))]).pop()
    for theirs in (f"Intel {ours}", ours.replace("torch 2", "torch 1"), ours.replace("cospadi 0", "cospadi 9")):
        assert theirs != ours
        answer: Future[Any] = Future()
        settle(answer, lambda theirs=theirs: jobs_ray._on_node(copy.deepcopy(call), 1, CPU, theirs, None, 0))
        with pytest.raises(UserError, match=f"node {re.escape(platform.node())} .* --allow-mixed") as refused:
            answer.result()
        assert ours in str(refused.value)
        assert theirs in str(refused.value)
    for expected in (ours, None):
        answer = Future()
        settle(answer, lambda expected=expected: jobs_ray._on_node(copy.deepcopy(call), 1, CPU, expected, None, 0))
        assert contents(answer.result()) == wanted


def test_ray_gives_the_same_bytes(on_ray: Pool, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(on_ray, solve, problems()) == here(solve, problems())
    tasks = [Task((seed, 300)) for seed in range(5)]
    assert run(on_ray, products, tasks) == here(products, tasks)
    assert capfd.readouterr() == ("", "")


def test_ray_draws_few_tasks_ahead(on_ray: Pool) -> None:
    drawn = 0

    def tasks() -> Iterator[Task]:
        nonlocal drawn
        for seed in range(12):
            drawn += 1
            yield Task((seed, 16))

    for done, _ in enumerate(on_ray.map(products, tasks())):
        assert drawn <= done + 1 + 3 + jobs_ray.AHEAD
    assert drawn == 12


def test_ray_keeps_types_of_errors(on_ray: Pool) -> None:
    for error in (UserError("no such thing"), CheckpointError("damaged")):
        with pytest.raises(type(error), match=str(error)) as raised:
            list(on_ray.map(raises, [Task((error,))]))
        assert type(raised.value) is type(error)


def test_ray_refuses_what_no_node_can_hold(on_ray: Pool) -> None:
    with pytest.raises(UserError, match=r"64 threads fits no node .* has 1 CPUs"):
        Engine("ray", threads_per_task=64).open(CPU).__enter__()
    with pytest.raises(UserError, match="has a GPU"):
        Engine("ray", threads_per_task=1).open(torch.device("cuda")).__enter__()
    with pytest.raises(UserError, match=r"a task needs 1000.00 GB of memory"):
        list(on_ray.map(products, [Task((0, 8), nbytes=10**12)]))


def test_ray_that_does_not_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(jobs_ray, "CONNECT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match=f"{address} cannot be reached: timed out"):
            Engine("ray", ray_address=address).open(CPU).__enter__()
    with pytest.raises(UserError, match=f"{address} cannot be reached: .*refused"):
        Engine("ray", ray_address=address).open(CPU).__enter__()
    with pytest.raises(UserError, match="nowhere cannot be reached: it is no host:port"):
        Engine("ray", ray_address="nowhere").open(CPU).__enter__()


def test_a_job_on_a_cluster_that_loses_a_node_makes_the_same_bytes(
    cluster: Any,
    on_ray: Pool,
    dense_folder: Path,
    short_recipe: dict[str, Any],
    alone: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wait_for_nodes(cluster)
    put: Callable[..., Piece] = JobDirectory.put
    done: list[str] = []

    def put_and_kill(self: JobDirectory, key: str, *rest: Any) -> Piece:
        done.append(key)
        if key == "factors/model.layers.0.self_attn.q_proj" and len(cluster.worker_nodes) == 2:
            lose_a_node(cluster)
        return put(self, key, *rest)

    monkeypatch.setattr(JobDirectory, "put", put_and_kill)
    engine = Engine("ray", threads_per_task=1, ray_address=cluster.address)
    cospadi.compress(dense_folder, short_recipe, tmp_path / "out", engine=engine)
    assert len(cluster.worker_nodes) == 1
    assert hashes(tmp_path / "out") == alone
    assert sum(key.startswith("factors/") for key in done) >= 4


def test_ray_runs_tasks_of_a_lost_node_again(
    cluster: Any, on_ray: Pool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The node goes while it runs a task: once all three nodes do."""
    wait_for_nodes(cluster)
    places: dict[int, str] = {}

    def hear(index: int, share: float, note: str) -> None:
        places.setdefault(index, note)
        if len(set(places.values())) == 3 and len(cluster.worker_nodes) == 2:
            lose_a_node(cluster)
            for task in range(4):
                (tmp_path / f"go {task}").touch()

    results = dict(on_ray.map(waits, [Task((tmp_path, index, index)) for index in range(4)], hear))
    assert len(cluster.worker_nodes) == 1
    assert capfd.readouterr() == ("", "")
    assert [contents(results[index]) for index in range(4)] == here(products, [Task((seed, 300)) for seed in range(4)])


def test_ray_makes_a_lost_result_again(cluster: Any, on_ray: Pool, tmp_path: Path) -> None:
    """The node goes after it has run a task, and before its result is fetched."""
    (away,) = (node.node_id for node in cluster.worker_nodes)
    places: dict[int, str] = {}

    def hear(index: int, share: float, note: str) -> None:
        places.setdefault(index, note)
        if len(places) == 2:
            (tmp_path / f"go {next(index for index in places if places[index] != away)}").touch()

    results = on_ray.map(waits, [Task((tmp_path, index, index)) for index in range(2)], hear)
    first, value = next(results)
    second = 1 - first
    assert places[second] == away
    (tmp_path / f"go {second}").touch()
    while not list(tmp_path.glob(f"done {second} *")):
        time.sleep(0.02)
    time.sleep(0.5)
    lose_a_node(cluster)
    values = {first: value} | dict(results)
    assert len(list(tmp_path.glob(f"done {second} *"))) == 2
    assert [contents(values[index]) for index in range(2)] == here(products, [Task((seed, 300)) for seed in range(2)])
