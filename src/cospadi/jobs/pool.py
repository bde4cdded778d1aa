"""Where independent tasks run: in this process, in processes of this machine, or on a Ray cluster; the same bytes."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import platform
import signal
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_until
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from cospadi.compat import blank_main
from cospadi.errors import UserError
from cospadi.jobs.carry import REPORT_SECONDS, Parcel, Report, answer, call, pack, settle, silent

RETRIES = 3
"""How often a task is run again whose process, or whose node, is lost."""

OVERSUBSCRIBED = 16
"""Most processes, and most threads, for each processor of this machine."""

Kind = Literal["local", "ray"]

OnProgress = Callable[[int, float, str], None]
"""What a task of a map reports: its index, the share of it that is done, and a note."""


@dataclass(frozen=True)
class Task:
    """Arguments of one call.

    Attributes:
        payload: the arguments; their tensors on the CPU, unless tasks run in this process.
        nbytes: host memory it needs while it runs, bytes; 0 where unknown. Ray keeps as much free for it.
    """

    payload: tuple[Any, ...]
    nbytes: int = 0


class Pool:
    """What runs tasks.

    Attributes:
        threads: torch threads a task.
        allow_mixed: whether results may come from nodes that differ from this machine.
        here: whether tasks run in this process.
    """

    here = False

    def __init__(self, threads: int, allow_mixed: bool) -> None:
        self.threads, self.allow_mixed = threads, allow_mixed

    def submit(self, function: Callable[..., Any], task: Task, on_progress: Report | None = None) -> Future[Any]:
        """Have `function(*payload, report)` called; returns when there was room for the task.

        Args:
            function: of a module, importable where the tasks run, and pure: it seeds its own random numbers.
            task: copied if it leaves this process.
            on_progress: told what the task reports; in this thread, within `submit` and `completed`, and at most
                twice a second from another process.

        Returns:
            What `completed` waits for. Its result raises what the function raised, RuntimeError if RETRIES + 1
            processes or nodes ended under the task, UserError if a node differs from this machine.

        Raises:
            UserError: the Ray cluster cannot run the task.
            RuntimeError: no node is left that could.
        """
        raise NotImplementedError

    def completed(self, futures: Iterable[Future[Any]]) -> Iterator[Future[Any]]:
        """This pool's futures in the order in which they are done; tasks that were lost are run again meanwhile."""
        pending = list(futures)
        del futures
        while pending:
            done = next((number for number, future in enumerate(pending) if future.done()), None)
            if done is None:
                self._step()
            else:
                yield pending.pop(done)

    def map(
        self, function: Callable[..., Any], tasks: Iterable[Task], on_progress: OnProgress | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Submit each task.

        Args:
            tasks: drawn one by one, one more than there is room for, so that only those are in memory.

        Yields:
            The index of a task and its result, in the order of completion.

        Raises:
            Exception: what `submit` or a result raises; tasks that still run are ended.
        """
        indices: dict[Future[Any], int] = {}
        numbers = itertools.count()

        def results(done: Iterator[Future[Any]]) -> Iterator[tuple[int, Any]]:
            for future in done:
                result = indices.pop(future), future.result()
                del future  # nothing here holds on to a result that was handed over
                yield result
                del result

        try:
            for task in tasks:
                index = next(numbers)
                future = self.submit(function, task, on_progress and partial(on_progress, index))
                indices[future] = index
                del task, future  # before the next one is drawn, which enumerate() would not do
                yield from results(self.completed([future for future in indices if future.done()]))
            yield from results(self.completed(indices))
        finally:
            self.abandon(indices)

    def abandon(self, futures: Collection[Future[Any]]) -> None:
        """End those of these tasks that still run."""

    def close(self) -> None:
        """End everything."""

    def _step(self) -> None:
        """Wait a little: pass on what tasks report, see which are done, run lost ones again."""
        raise NotImplementedError


@dataclass(frozen=True)
class Engine:
    """Where tasks shall run.

    Attributes:
        kind: on this machine, or on a Ray cluster.
        workers: local processes; 1 solves in this process.
        threads_per_task: torch threads, which results depend on in their last bits. None: as many as torch has here,
            divided by `workers` where there are several.
        ray_address: host:port of the cluster; None: RAY_ADDRESS, else the one that runs on this machine, else one that
            is started here for the time being.
        allow_mixed: let nodes differ from this machine in processor or versions, which results then depend on.

    Raises:
        UserError: no such engine.
    """

    kind: Kind = "local"
    workers: int = 1
    threads_per_task: int | None = None
    ray_address: str | None = None
    allow_mixed: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"--engine {self.kind} is not known. Use {' or '.join(get_args(Kind))}")
        if self.workers < 1:
            raise UserError(f"--workers {self.workers} cannot do anything. Use 1 or more")
        if self.threads_per_task is not None and self.threads_per_task < 1:
            raise UserError(f"--threads-per-task {self.threads_per_task} cannot do anything. Use 1 or more")
        most = OVERSUBSCRIBED * (os.cpu_count() or 1)
        threads = self.threads_per_task or 1
        if self.kind == "local" and max(self.workers, threads) > most:
            name = "--workers" if self.workers > most else "--threads-per-task"
            raise UserError(
                f"{name} {max(self.workers, threads)} is far more than this machine's {os.cpu_count()} processors. "
                f"Use {most} or fewer"
            )

    @contextmanager
    def open(self, device: torch.device) -> Iterator[Pool]:
        """A pool for tasks on a device; processes start with its first task, and end with the block.

        Raises:
            UserError: no Ray, no such cluster, or none of its nodes can run a task on `device`.
        """
        here = torch.get_num_threads() // (self.workers if self.kind == "local" else 1)
        threads = self.threads_per_task or max(1, here)
        if self.kind == "ray":
            from cospadi.jobs.ray import RayPool, cluster

            with cluster(self.ray_address), closing(RayPool(threads, self.allow_mixed, device)) as ray_pool:
                yield ray_pool
        elif self.workers == 1:
            yield ThisProcess(threads, self.allow_mixed)
        else:
            with closing(Processes(threads, self.allow_mixed, self.workers)) as processes:
                yield processes


def device_model(device: torch.device) -> str:
    """What computes, as far as results may depend on it: "AMD EPYC 9354 family 25 model 17 avx512", or a GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()} {torch.backends.cpu.get_cpu_capability().lower()}"


@cache
def _processor() -> str:
    """The processor's name. Virtual machines may hide which one it is; its family and model number say so."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for key, colon, value in (line.partition(":") for line in lines) if colon}
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    numbers = [f"{name} {fields[key]}" for name, key in (("family", "cpu family"), ("model", "model")) if key in fields]
    return " ".join([fields["model name"], *numbers])


# In this process.


class ThisProcess(Pool):
    """A task runs when it is submitted."""

    here = True

    def submit(self, function: Callable[..., Any], task: Task, on_progress: Report | None = None) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(call(function, task.payload, self.threads, on_progress or silent))
        except Exception as error:
            future.set_exception(error)
        return future


# In processes of this machine.


class _Worker:
    """One process, in an executor of its own: when it ends, no task is lost but the one that it has."""

    def __init__(self, threads: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.reports, theirs = spawn.Pipe(duplex=False)
        self.executor = ProcessPoolExecutor(1, spawn, _begin, (theirs,))
        # OpenMP reads these when torch is loaded. Idle threads of one worker would otherwise spin on another's cores.
        ours = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # this process hears Ctrl-C, and ends that one
        before = multiprocessing.active_children()
        try:
            os.environ.update(OMP_NUM_THREADS=str(threads), OMP_WAIT_POLICY="PASSIVE")
            with blank_main():
                self.executor.submit(os.getpid)  # the process starts with its first task
        finally:
            for name, value in ours.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        (self.process,) = set(multiprocessing.active_children()) - set(before)

    def end(self) -> str:
        """End the process, if it runs; how it ended."""
        self.process.kill()
        self.executor.shutdown()
        self.reports.close()
        status = self.process.exitcode or 0
        return f"by signal {-status} ({signal.strsignal(-status)})" if status < 0 else f"with exit code {status}"


@dataclass
class _Run:
    """A task that a process has.

    Attributes:
        parcel: the call, as each process that tries it gets it.
        losses: processes that ended under it.
    """

    parcel: Parcel
    future: Future[Any]
    on_progress: Report | None
    worker: _Worker
    losses: int = 0


class Processes(Pool):
    """As many processes as there are tasks, up to `count`."""

    def __init__(self, threads: int, allow_mixed: bool, count: int) -> None:
        super().__init__(threads, allow_mixed)
        self._count = count
        self._idle: list[_Worker] = []
        self._running: dict[Future[Parcel], _Run] = {}  # by what the executor completes

    def submit(self, function: Callable[..., Any], task: Task, on_progress: Report | None = None) -> Future[Any]:
        while len(self._running) >= self._count:
            self._step()
        future: Future[Any] = Future()
        self._start(_Run(pack((function, task.payload)), future, on_progress, self._worker()))
        return future

    def _worker(self) -> _Worker:
        return self._idle.pop() if self._idle else _Worker(self.threads)

    def _start(self, run: _Run) -> None:
        try:
            self._running[run.worker.executor.submit(_in_worker, run.parcel, self.threads)] = run
        except BrokenExecutor:  # it ended while it had nothing to do
            self._lose(run)

    def _lose(self, run: _Run) -> None:
        """The process has ended: another one gets its task."""
        how = run.worker.end()
        run.losses += 1
        if run.losses <= RETRIES:
            run.worker = self._worker()
            self._start(run)
        else:
            told = (
                f"a task was run {run.losses} times and its process ended each time, at last {how}. If memory ran out, "
                "use fewer workers"
            )
            run.future.set_exception(RuntimeError(told))

    def _step(self) -> None:
        done, _ = wait(self._running, REPORT_SECONDS / 4, FIRST_COMPLETED)
        for run in self._running.values():
            while run.worker.reports.poll():
                report = run.worker.reports.recv()
                if run.on_progress is not None:
                    run.on_progress(*report)
        for done_one in done:
            run = self._running.pop(done_one)
            if isinstance(done_one.exception(), BrokenExecutor):
                self._lose(run)
            else:
                self._idle.append(run.worker)
                settle(run.future, done_one.result)

    def abandon(self, futures: Collection[Future[Any]]) -> None:
        for key, run in list(self._running.items()):
            if run.future in futures:
                del self._running[key]
                run.worker.end()

    def close(self) -> None:
        self.abandon([run.future for run in self._running.values()])
        while self._idle:
            self._idle.pop().end()


_reports: Connection
"""In a worker process: where reports go."""


def _begin(reports: Connection) -> None:
    """What a worker process does first."""
    global _reports
    _reports = reports
    os.set_blocking(reports.fileno(), False)
    os.dup2(2, 1)  # standard output belongs to the process that started this one
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    """End this process when the one that started it is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_until([parent.sentinel])
    os._exit(1)


def _in_worker(parcel: Parcel, threads: int) -> Parcel:
    return answer(parcel, threads, _tell)


def _tell(share: float, note: str) -> None:
    with suppress(OSError):  # a report is left out where nobody has read those before
        _reports.send((share, note[:1000]))  # what a pipe takes whole or not at all
