"""The same tasks in this process and in processes of this machine, some of which are lost."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from tasks import (
    CPU,
    contents,
    dies,
    here,
    problems,
    products,
    raises,
    raises_unportable,
    reports,
    reports_or_dies,
    run,
    solve,
    surroundings,
    tells_its_process,
    tells_much,
    threads,
    wait_for,
)

from cospadi import CheckpointError, UserError
from cospadi.jobs import pool
from cospadi.jobs.pool import Engine, Pool, Task, device_model


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


def test_the_device_is_named() -> None:
    assert device_model(CPU).endswith(torch.backends.cpu.get_cpu_capability().lower())
    assert len(device_model(CPU).split()) > 1


def test_ray_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "cospadi.jobs.ray", raising=False)
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


def test_an_error_that_cannot_be_pickled_is_told(processes: Pool) -> None:
    with pytest.raises(RuntimeError, match="Unportable: left right"):
        list(processes.map(raises_unportable, [Task(())]))


def test_a_killed_process_is_replaced(processes: Pool, tmp_path: Path) -> None:
    assert run(processes, dies, [Task((tmp_path, 1)), Task((tmp_path, 0))]) == ["alive", "alive"]
    assert [path.name for path in tmp_path.iterdir()] == ["death 0"]


def test_an_idle_process_that_is_killed_is_replaced(processes: Pool) -> None:
    tasks = [Task((seed, 8)) for seed in range(2)]
    wanted = run(processes, products, tasks)
    process = multiprocessing.active_children()[0]
    process.kill()
    process.join()
    assert run(processes, products, tasks) == wanted
    assert process not in multiprocessing.active_children()


def test_futures_are_completed_in_any_order(processes: Pool, tmp_path: Path) -> None:
    told: list[str] = []
    first = processes.submit(reports, Task((tmp_path,)), lambda share, note: told.append(note))
    second = processes.submit(products, Task((1, 8)))
    done = processes.completed([first, second])
    assert next(done) is second
    (tmp_path / "heard").touch()
    assert next(done) is first
    assert first.result() == "heard"
    assert set(told) == {"half"}
    assert contents(second.result()) == here(products, [Task((1, 8))], threads=2).pop()


def test_processes_find_what_they_need_and_no_more(processes: Pool) -> None:
    before = dict(os.environ)
    ((_, found),) = processes.map(surroundings, [Task(())])
    assert found == {
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "PASSIVE",
        "main module": None,
        "Ctrl-C is kept away": True,
        "prints on stderr": True,
    }
    assert os.environ == before


def test_reports_that_nobody_reads_do_not_stop_a_task(processes: Pool, tmp_path: Path) -> None:
    future = processes.submit(tells_much, Task((tmp_path,)))
    wait_for(tmp_path / "told")
    assert [done.result() for done in processes.completed([future])] == ["told"]


def test_processes_end_when_the_one_that_started_them_is_killed(tmp_path: Path) -> None:
    parent = os.fork()
    if parent == 0:
        try:
            with Engine(workers=2).open(CPU) as pool:
                list(pool.map(tells_its_process, [Task((tmp_path, index)) for index in range(2)]))
        finally:
            os._exit(1)
    for index in range(2):
        wait_for(tmp_path / f"runs {index}")
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    processes = [Path("/proc", (tmp_path / f"runs {index}").read_text()) for index in range(2)]
    deadline = time.monotonic() + 20
    while any(process.exists() and "zombie" not in (process / "status").read_text() for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_ends_the_processes() -> None:
    running: list[BaseProcess] = []
    others = set(multiprocessing.active_children())
    # A shell starts its background jobs, of which this may be one, with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def tasks() -> Iterator[Task]:
        for matrix in (torch.ones(3000, 3000), torch.ones(3000, 3000)):  # more than the way to a process holds
            yield Task((ValueError(matrix),))
        running.extend(set(multiprocessing.active_children()) - others)
        signal.raise_signal(signal.SIGINT)

    try:
        with Engine(workers=3).open(CPU) as pool, pytest.raises(KeyboardInterrupt):
            list(pool.map(raises, tasks()))
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(running) == 2
    assert {process.exitcode for process in running} == {-signal.SIGKILL}


def test_a_task_that_always_kills_its_process_ends_the_others(
    processes: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "RETRIES", 0)
    running: list[BaseProcess] = []

    def hear(index: int, share: float, note: str) -> None:
        running[:] = multiprocessing.active_children()
        (tmp_path / "go").touch()

    tasks = [Task((tmp_path, False)), Task((tmp_path, True))]
    with pytest.raises(RuntimeError, match=r"a task was run 1 times .* signal 9 \(Killed\). .* fewer workers"):
        list(processes.map(reports_or_dies, tasks, hear))
    assert len(running) == 2
    assert {process.exitcode for process in running} == {-signal.SIGKILL}
