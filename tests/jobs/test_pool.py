"""The same tasks in this process, in processes of this machine and on a Ray cluster, some of which are lost."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cospadi import CheckpointError, UserError
from cospadi.jobs import pool
from cospadi.jobs.pool import Engine, Pool, Report, Site, Task, check_same, device_model, site
from cospadi.solvers import Problem, SolverOptions
from cospadi.solvers.mod_htp import mod_htp

CPU = torch.device("cpu")


def products(seed: int, size: int, report: Report) -> Tensor:
    """Float32 products, each of the one before."""
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    for step in range(4):
        matrix = torch.nn.functional.normalize(matrix @ matrix.T)
        report(step / 4, f"step {step}")
    return matrix


def solve(target: Tensor, k: int, s: int, report: Report) -> tuple[Tensor, Tensor, list[float]]:
    """What the package itself would run."""
    options = SolverOptions(iterations=8, on_iteration=lambda step, error: report(step / 8, f"error {error:.4f}"))
    solution = mod_htp(Problem(target), k, s, options)
    return solution.dictionary, solution.coefficients, solution.errors


def threads(report: Report) -> int:
    return torch.get_num_threads()


def raises(error: Exception, report: Report) -> None:
    raise error


def reports(folder: Path, report: Report) -> str:
    """Tells things until it has been heard."""
    for _ in range(600):
        report(0.5, "half")
        if (folder / "heard").exists():
            return "heard"
        time.sleep(0.1)
    return "not heard"


def dies(marker: Path, times: int, report: Report) -> str:
    """Its process is killed so many times; then it returns."""
    for attempt in range(times):
        try:
            (marker / f"death {attempt}").touch(exist_ok=False)
        except FileExistsError:
            continue
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def waits(folder: Path, index: int, seed: int, report: Report) -> Tensor:
    """Tells on which node of the Ray cluster it runs, and goes on once it may."""
    import ray

    report(0.0, ray.get_runtime_context().get_node_id())
    wait_for(folder / f"go {index}")
    result = products(seed, 300, report)
    (folder / f"done {index} {time.monotonic_ns()}").touch()
    return result


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"nobody made {path.name}"
        time.sleep(0.02)


def problems() -> list[Task]:
    generator = torch.Generator().manual_seed(0)
    targets = [torch.randn(48, 64, generator=generator, dtype=dtype) for dtype in (torch.float64, torch.float32)]
    return [Task((target, 30, 5), nbytes=2**20) for target in targets]


def contents(value: Any) -> Any:
    """A result as something whose equality means equal bytes."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().numpy().tobytes()
    return [contents(item) for item in value] if isinstance(value, (list, tuple)) else value


def run(pool: Pool, function: Callable[..., Any], tasks: list[Task]) -> list[Any]:
    results = dict(pool.map(function, tasks))
    assert sorted(results) == list(range(len(tasks)))
    return [contents(results[index]) for index in range(len(tasks))]


def here(function: Callable[..., Any], tasks: list[Task], threads: int = 1) -> list[Any]:
    with Engine(threads_per_task=threads).open(CPU) as pool:
        return run(pool, function, tasks)


@pytest.fixture(scope="module")
def processes() -> Iterator[Pool]:
    with Engine(workers=2, threads_per_task=2).open(CPU) as pool:
        yield pool


# Anywhere.


def test_requests_that_mean_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="--engine slurm is not known"):
        Engine(kind="slurm")
    with pytest.raises(UserError, match="--workers 0"):
        Engine(workers=0)
    with pytest.raises(UserError, match="--threads-per-task 0"):
        Engine(threads_per_task=0)


def test_threads_are_set_around_each_call_only() -> None:
    torch.set_num_threads(1)
    assert here(threads, [Task(())], threads=2) == [2]
    assert torch.get_num_threads() == 1
    with Engine(threads_per_task=2).open(CPU) as pool, pytest.raises(ZeroDivisionError):
        run(pool, raises, [Task((ZeroDivisionError(),))])
    assert torch.get_num_threads() == 1
    with Engine().open(CPU) as pool:
        assert pool.threads == 1


def test_this_process_draws_a_task_when_it_runs_it() -> None:
    seen: list[Any] = []

    def tasks() -> Iterator[Task]:
        for seed in range(3):
            seen.append(f"draw {seed}")
            yield Task((seed, 8))

    with Engine(threads_per_task=1).open(CPU) as pool:
        for index, _ in pool.map(products, tasks(), lambda *progress: seen.append(progress)):
            seen.append(f"result {index}")
    first = ["draw 0", *((0, step / 4, f"step {step}") for step in range(4)), "result 0", "draw 1"]
    assert seen[: len(first)] == first
    assert seen[-1] == "result 2"


def test_tensors_travel_with_their_strides_and_alignment() -> None:
    memory = torch.arange(100, dtype=torch.float32)
    tensors = [
        torch.randn(7, 9).T[1:],
        memory[3:].view(torch.int32),
        torch.randn(12).bfloat16()[1::2],
        torch.ones(1, dtype=torch.float64).expand(4, 5),
        torch.empty(0, 3),
        torch.tensor(2.5),
        torch.tensor([True, False]),
        torch.randn(3, dtype=torch.complex64).conj(),
    ]
    parcel = pool._pack({"tensors": tensors, "parameter": torch.nn.Parameter(torch.ones(2))})
    assert sum(part.nbytes for part in parcel.parts) < 1000  # of a view only what it spans
    value = pool._unpack(parcel)
    assert isinstance(value["parameter"], torch.nn.Parameter)
    for sent, received in zip(tensors, value["tensors"], strict=True):
        assert torch.equal(sent, received)
        assert (sent.dtype, sent.stride()) == (received.dtype, received.stride())
        assert (received.data_ptr() - sent.data_ptr()) % pool.ALIGNMENT == 0 or sent.is_conj()
    value["tensors"][0].zero_()  # memory of its own
    assert tensors[0].any()


def test_the_device_is_named() -> None:
    assert device_model(CPU).endswith(torch.backends.cpu.get_cpu_capability().lower())
    assert len(device_model(CPU).split()) > 1


def test_another_machine_is_refused() -> None:
    ours = Site("AMD EPYC 9354 avx512", "2.13.0", "0.1.0")
    check_same("node-7", ours, ours)
    for theirs in (
        Site("Intel Xeon 8480 avx512", "2.13.0", "0.1.0"),
        Site(ours.model, "2.12.0", "0.1.0"),
        Site(ours.model, ours.torch, "0.2.0"),
    ):
        with pytest.raises(UserError, match=r"node-7 .* --allow-mixed") as refused:
            check_same("node-7", theirs, ours)
        assert str(theirs) in str(refused.value)
        assert str(ours) in str(refused.value)


def test_a_task_says_on_which_other_machine_it_would_have_run() -> None:
    ours = site(CPU)
    parcel = pool._pack((products, (0, 8)))
    answer = pool._on_node(parcel, 1, CPU, Site("Intel Xeon 8480 avx512", ours.torch, ours.cospadi), None, 0)
    with pytest.raises(UserError, match="Intel Xeon 8480"):
        pool._open_answer(answer)
    assert (
        contents(pool._open_answer(pool._on_node(parcel, 1, CPU, ours, None, 0)))
        == here(products, [Task((0, 8))]).pop()
    )


def test_ray_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'cospadi\[ray\]'"), Engine("ray").open(CPU):
        pass


# Processes of this machine.


def test_processes_give_the_same_bytes(processes: Pool) -> None:
    tasks = [Task((seed, 300)) for seed in range(3)]
    assert run(processes, products, tasks) == here(products, tasks, threads=2)
    assert run(processes, solve, problems()) == here(solve, problems(), threads=2)


def test_processes_draw_few_tasks_ahead(processes: Pool) -> None:
    drawn = 0

    def tasks() -> Iterator[Task]:
        nonlocal drawn
        for seed in range(8):
            drawn += 1
            yield Task((seed, 16))

    for done, _ in enumerate(processes.map(products, tasks())):
        assert drawn <= done + 1 + 2 + 1 + 1  # those done, one in each process, one at hand, one that is also done
    assert drawn == 8


def test_processes_report(processes: Pool, tmp_path: Path) -> None:
    def hear(index: int, share: float, note: str) -> None:
        assert (index, share, note) == (0, 0.5, "half")
        (tmp_path / "heard").touch()

    assert list(processes.map(reports, [Task((tmp_path,))], hear)) == [(0, "heard")]


@pytest.mark.parametrize("error", [UserError("no such thing"), CheckpointError("damaged"), ValueError(1, 2)])
def test_errors_keep_their_type(processes: Pool, error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        list(processes.map(raises, [Task((error,))]))
    assert type(raised.value) is type(error)
    assert raised.value.args == error.args
    assert "in raises" in raised.value.__notes__[0]


class Unportable(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def raises_unportable(report: Report) -> None:
    raise Unportable("left ", "right")


def test_an_error_that_cannot_be_pickled_is_told(processes: Pool) -> None:
    with pytest.raises(RuntimeError, match="Unportable: left right"):
        list(processes.map(raises_unportable, [Task(())]))


def test_a_killed_process_is_replaced(processes: Pool, tmp_path: Path) -> None:
    assert run(processes, dies, [Task((tmp_path, 1)), Task((tmp_path, 0))]) == ["alive", "alive"]
    assert [path.name for path in tmp_path.iterdir()] == ["death 0"]


def test_a_process_ends_when_its_parent_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is once the one that started it has been killed."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        worker = pool._start_worker(threads=1)
    assert worker.process.wait(20) == 1


def test_ctrl_c_ends_the_processes() -> None:
    running: list[subprocess.Popen[bytes]] = []
    # A shell starts its background jobs, of which this may be one, with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def tasks() -> Iterator[Task]:
        running.extend(worker.process for worker in pool._workers)
        signal.raise_signal(signal.SIGINT)
        yield Task(())

    try:
        with Engine(workers=2).open(CPU) as pool, pytest.raises(KeyboardInterrupt):
            list(pool.map(threads, tasks()))
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(running) == 2
    assert all(process.returncode is not None for process in running)


def test_a_task_that_always_kills_its_process_ends_the_others(
    processes: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "RETRIES", 0)
    running: list[subprocess.Popen[bytes]] = []

    def hear(index: int, share: float, note: str) -> None:
        running.extend(worker.process for worker in processes._workers if worker.job is not None)
        (tmp_path / "go").touch()

    tasks = [Task((tmp_path, False)), Task((tmp_path, True))]
    with pytest.raises(RuntimeError, match=r"task 1 was run 1 times .* signal 9 \(Killed\). .* fewer workers"):
        list(processes.map(reports_or_dies, tasks, hear))
    assert {process.returncode for process in running} == {-signal.SIGKILL}


def reports_or_dies(folder: Path, deadly: bool, report: Report) -> None:
    if deadly:
        wait_for(folder / "go")
        os.kill(os.getpid(), signal.SIGKILL)
    reports(folder, report)


# A Ray cluster.


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three nodes of one processor each, and their own folder in place of Ray's."""
    pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a short name: sockets are made in it
    soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 200, "health_check_failure_threshold": 3}
    size = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    head = size | {"include_dashboard": False, "temp_dir": folder, "_system_config": soon}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # tasks of this file are imported on the nodes
        nodes = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(2):
                nodes.add_node(wait=False, **size)
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
        assert drawn <= done + 1 + 3 + pool.AHEAD
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
    with pytest.raises(UserError, match=r"task 0 needs 1000.00 GB of memory"):
        list(on_ray.map(products, [Task((0, 8), nbytes=10**12)]))


def test_ray_that_does_not_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(pool, "CONNECT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match=f"{address} cannot be reached: timed out"):
            Engine("ray", ray_address=address).open(CPU).__enter__()
    with pytest.raises(UserError, match=f"{address} cannot be reached: .*refused"):
        Engine("ray", ray_address=address).open(CPU).__enter__()
    with pytest.raises(UserError, match="nowhere cannot be reached: it is no host:port"):
        Engine("ray", ray_address="nowhere").open(CPU).__enter__()


def test_ray_runs_tasks_of_a_lost_node_again(
    cluster: Any, on_ray: Pool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The node goes while it runs a task: once all three nodes do."""
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


def lose_a_node(cluster: Any) -> None:
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
