"""Where independent tasks run: in this process, in processes of this machine, or on a Ray cluster; the same bytes."""

from __future__ import annotations

import io
import itertools
import logging
import os
import pickle
import platform
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from cospadi.__about__ import __version__
from cospadi.errors import UserError, first_line

RETRIES = 3
"""How often a task is run again whose process, or whose node, is lost."""

AHEAD = 2
"""Tasks that a Ray cluster holds beyond those that it can run, so that none of its processors waits for the next."""

REPORT_SECONDS = 0.5
"""Least time between two reports of a task in another process."""

CONNECT_SECONDS = 10.0
"""How long a Ray cluster may take to accept a connection."""

PATIENCE_SECONDS = 60.0
"""How long tasks wait for a node that could run them after the last such node is lost."""

OVERSUBSCRIBED = 16
"""Most processes, and most threads, for each processor of this machine."""

ALIGNMENT = 64
"""Bytes. Products round differently where a tensor begins elsewhere in a cache line, so that is kept on the way."""

Kind = Literal["local", "ray"]

Report = Callable[[float, str], None]
"""What a task tells while it runs: the share of it that is done, 0..1, and a short note."""

OnProgress = Callable[[int, float, str], None]
"""The same with the task's index first."""


@dataclass(frozen=True)
class Task:
    """Arguments of one call.

    Attributes:
        payload: the arguments; their tensors on the CPU, unless tasks run in this process.
        nbytes: host memory it needs while it runs, bytes; 0 where unknown. Ray keeps as much free for it.
    """

    payload: tuple[Any, ...]
    nbytes: int = 0


class Pool(Protocol):
    """What runs tasks.

    Attributes:
        threads: torch threads a task.
        allow_mixed: whether results may come from nodes that differ from this machine.
        here: whether tasks run in this process.
    """

    threads: int
    allow_mixed: bool
    here: bool

    def map(
        self, function: Callable[..., Any], tasks: Iterable[Task], on_progress: OnProgress | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Call `function(*payload, report)` for each task; one map of a pool at a time.

        Args:
            function: of a module, importable where the tasks run, and pure: it seeds its own random numbers.
            tasks: drawn one by one, at most a few more than can run, so that only those are in memory.
            on_progress: told what the tasks report; in this thread, at most twice a second a task from elsewhere.

        Yields:
            The index of a task and its result, in the order of completion.

        Raises:
            UserError: the Ray cluster cannot run a task, or a node of it differs from this machine.
            RuntimeError: a task whose process ended RETRIES + 1 times.
            Exception: what the function raised; tasks that still run are ended.
        """
        ...


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
            with _cluster(self.ray_address):
                yield _RayPool(threads, self.allow_mixed, device)
        elif self.workers == 1:
            yield _ThisProcess(threads, self.allow_mixed)
        else:
            pool = _Processes(threads, self.allow_mixed, self.workers)
            try:
                yield pool
            finally:
                pool.close()


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


@dataclass(frozen=True)
class Site:
    """What results depend on besides the task and its threads."""

    model: str
    torch: str
    cospadi: str

    def __str__(self) -> str:
        return f"{self.model} (torch {self.torch}, cospadi {self.cospadi})"


def site(device: torch.device) -> Site:
    """This process's."""
    return Site(device_model(device), torch.__version__, __version__)


def check_same(node: str, theirs: Site, ours: Site) -> None:
    """Refuse a node whose results may differ from this machine's.

    Raises:
        UserError: it has another processor, torch or cospadi.
    """
    if theirs != ours:
        raise UserError(
            f"node {node} of the Ray cluster has {theirs}, and this machine has {ours}: results would depend on where "
            "a task runs. Use nodes like this machine, or pass --allow-mixed"
        )


# A call, and what it looks like on its way to another process.


def _call(function: Callable[..., Any], payload: tuple[Any, ...], threads: int, report: Report) -> Any:
    """The function's result, computed by so many torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return function(*payload, report)
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _Parcel:
    """A pickled value whose tensors lie beside it: GBs that are neither copied into the pickle nor out of it.

    Attributes:
        head: the pickle.
        parts: uint8, the memory that each tensor spans.
    """

    head: bytes
    parts: list[Any]


class _Packer(pickle.Pickler):
    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=5)
        self.parts: list[Any] = []

    def persistent_id(self, value: Any) -> Any:
        if type(value) is not Tensor or value.device.type != "cpu" or value.layout != torch.strided:
            return None
        if value.requires_grad or value.is_quantized or value.is_conj() or value.is_neg():
            return None
        size, shift = value.element_size(), value.data_ptr() % ALIGNMENT
        if shift % size:
            return None
        last = sum((length - 1) * stride for length, stride in zip(value.shape, value.stride(), strict=True))
        start = value.storage_offset() * size
        end = start + (last + 1) * size if value.numel() else start
        memory = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())
        self.parts.append(memory[start:end].numpy())
        return len(self.parts) - 1, value.dtype, tuple(value.shape), value.stride(), shift


class _Unpacker(pickle.Unpickler):
    def __init__(self, parcel: _Parcel) -> None:
        super().__init__(io.BytesIO(parcel.head))
        self.parts = parcel.parts

    def persistent_load(self, key: Any) -> Tensor:
        index, dtype, shape, stride, shift = key
        part, self.parts[index] = np.frombuffer(self.parts[index], dtype=np.uint8), None
        memory = torch.empty(shift + len(part), dtype=torch.uint8)
        memory[shift:].numpy()[:] = part
        return torch.empty(0, dtype=dtype).set_(memory.untyped_storage(), shift // dtype.itemsize, shape, stride)


def _pack(value: Any) -> _Parcel:
    stream = io.BytesIO()
    packer = _Packer(stream)
    packer.dump(value)
    return _Parcel(stream.getvalue(), packer.parts)


def _unpack(parcel: _Parcel) -> Any:
    """The value, its tensors in memory of their own that is aligned as the sender's was. Empties the parcel."""
    return _Unpacker(parcel).load()


def _answer(parcel: _Parcel, threads: int, report: Report) -> _Parcel:
    """Make the call in a parcel; its result, or what it raised."""
    try:
        function, payload = _unpack(parcel)
        return _pack((_call(function, payload, threads, report), None))
    except Exception as error:
        return _refusal(error)


def _refusal(error: Exception) -> _Parcel:
    """An answer that raises this error where it is opened."""
    error.add_note("".join(["In the process that ran the task:\n", *traceback.format_exception(error)]).rstrip())
    try:
        _unpack(_pack((None, error)))
    except Exception:  # an error that holds what cannot be pickled, or that is built from other arguments than its own
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return _pack((None, error))


def _open_answer(parcel: _Parcel) -> Any:
    """The result. Raises what the function raised."""
    result, error = _unpack(parcel)
    if error is not None:
        raise error
    return result


def _seldom(tell: Report) -> Report:
    """The same report, at most every REPORT_SECONDS."""
    last = float("-inf")

    def report(share: float, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= REPORT_SECONDS:
            last = now
            tell(share, note)

    return report


def _silent(share: float, note: str) -> None:
    """A report that nobody reads."""


# In this process.


@dataclass
class _ThisProcess:
    threads: int
    allow_mixed: bool
    here: bool = True

    def map(
        self, function: Callable[..., Any], tasks: Iterable[Task], on_progress: OnProgress | None = None
    ) -> Iterator[tuple[int, Any]]:
        index, drawn = 0, iter(tasks)
        while (task := next(drawn, None)) is not None:
            report = partial(on_progress, index) if on_progress else _silent
            result = _call(function, task.payload, self.threads, report)
            del task  # before the next one is drawn
            yield index, result
            del result
            index += 1


# In processes of this machine.

_START = """
import os, signal, sys, threading, time
from multiprocessing.connection import Connection
channel, threads, parent = map(int, sys.argv[1:])
signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and ends this process

def follow():
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)

threading.Thread(target=follow, daemon=True).start()
connection = Connection(channel)
try:
    sys.path[:] = connection.recv()
except EOFError:
    os._exit(0)
from cospadi.jobs.pool import _serve
_serve(connection, threads)
"""
"""What a worker process runs. It never imports the main module, so that scripts need no guard against that."""


@dataclass
class _Job:
    index: int
    task: Task
    losses: int = 0


@dataclass
class _Worker:
    """A process, and the task it has.

    Attributes:
        ready: whether it has started to listen.
    """

    process: subprocess.Popen[bytes]
    connection: Connection
    ready: bool = False
    job: _Job | None = None


class _Processes:
    """Fresh Python processes with a connection to each, which carries a task, its reports, and its answer."""

    here = False

    def __init__(self, threads: int, allow_mixed: bool, count: int) -> None:
        self.threads, self.allow_mixed = threads, allow_mixed
        self._count = count
        self._workers: list[_Worker] = []
        self._stillborn = 0

    def map(
        self, function: Callable[..., Any], tasks: Iterable[Task], on_progress: OnProgress | None = None
    ) -> Iterator[tuple[int, Any]]:
        drawn = (_Job(index, task) for index, task in enumerate(tasks))
        waiting: deque[_Job] = deque()
        finished: deque[tuple[int, Any]] = deque()
        try:
            while True:
                self._fill()
                self._draw(drawn, waiting)
                for worker in [worker for worker in self._workers if worker.ready and worker.job is None]:
                    if waiting:
                        self._assign(worker, function, waiting)
                        self._draw(drawn, waiting)
                while finished:
                    yield finished.popleft()
                if not waiting and all(worker.job is None for worker in self._workers):
                    return
                listening = {worker.connection: worker for worker in self._workers}
                for connection in wait(list(listening)):
                    assert isinstance(connection, Connection)
                    self._hear(listening[connection], waiting, finished, on_progress)
        finally:
            for worker in [worker for worker in self._workers if worker.job is not None]:
                self._end(worker)

    def close(self) -> None:
        """End all processes."""
        for worker in list(self._workers):
            self._end(worker)

    def _fill(self) -> None:
        """Start the processes that are missing."""
        while len(self._workers) < self._count:
            self._workers.append(_start_worker(self.threads))

    def _draw(self, drawn: Iterator[_Job], waiting: deque[_Job]) -> None:
        """Have a task at hand for the next process that is free."""
        if not waiting and (job := next(drawn, None)) is not None:
            waiting.append(job)

    def _assign(self, worker: _Worker, function: Callable[..., Any], waiting: deque[_Job]) -> None:
        worker.job = waiting.popleft()
        try:
            _send(worker.connection, "task", _pack((function, worker.job.task.payload)))
        except OSError:
            self._lose(worker, waiting)

    def _hear(
        self,
        worker: _Worker,
        waiting: deque[_Job],
        finished: deque[tuple[int, Any]],
        on_progress: OnProgress | None,
    ) -> None:
        """Take one message of a worker."""
        try:
            kind, parcel = _receive(worker.connection)
        except (OSError, EOFError):
            return self._lose(worker, waiting)
        if kind == "ready":
            worker.ready, self._stillborn = True, 0
        elif kind == "report":
            if on_progress is not None and worker.job is not None:
                on_progress(worker.job.index, *_unpack(parcel))
        else:
            assert worker.job is not None
            job, worker.job = worker.job, None
            finished.append((job.index, _open_answer(parcel)))

    def _lose(self, worker: _Worker, waiting: deque[_Job]) -> None:
        """A process is gone: its task waits for another one.

        Raises:
            RuntimeError: it has been lost too often.
        """
        job, worker.job = worker.job, None
        how = self._end(worker, grace=1.0)
        if job is not None:
            job.losses += 1
            waiting.appendleft(job)
            if job.losses > RETRIES:
                raise RuntimeError(
                    f"task {job.index} was run {job.losses} times and its process ended each time, at last {how}. If "
                    "memory ran out, use fewer workers"
                )
        elif not worker.ready:
            self._stillborn += 1
            if self._stillborn > RETRIES:
                raise RuntimeError(f"{self._stillborn} worker processes ended before their first task, at last {how}")

    def _end(self, worker: _Worker, grace: float = 0.0) -> str:
        """Take a worker away, its process killed unless it ends within `grace` seconds; how it ended."""
        self._workers.remove(worker)
        worker.connection.close()
        try:
            status = worker.process.wait(grace)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            status = worker.process.wait()
        return f"by signal {-status} ({signal.strsignal(-status)})" if status < 0 else f"with exit code {status}"


def _start_worker(threads: int) -> _Worker:
    ours, theirs = Pipe()
    # OpenMP reads these when torch is loaded. Idle threads of one worker would otherwise spin on another's cores.
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, str(theirs.fileno()), str(threads), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=2,  # standard output belongs to this process
            env=environment,
            pass_fds=[theirs.fileno()],
        )
    ours.send(sys.path)
    return _Worker(process, ours)


def _serve(connection: Connection, threads: int) -> None:
    """Answer tasks until the other end is closed."""

    def tell(share: float, note: str) -> None:
        _send(connection, "report", _pack((share, note)))

    try:
        _send(connection, "ready", _pack(None))
        while True:
            _, parcel = _receive(connection)
            _send(connection, "answer", _answer(parcel, threads, _seldom(tell)))
            del parcel
    except (EOFError, OSError):
        return


def _send(connection: Connection, kind: str, parcel: _Parcel) -> None:
    connection.send_bytes(pickle.dumps((kind, parcel.head, len(parcel.parts))))
    for part in parcel.parts:
        connection.send_bytes(part)


def _receive(connection: Connection) -> tuple[str, _Parcel]:
    kind, head, count = pickle.loads(connection.recv_bytes())
    return kind, _Parcel(head, [connection.recv_bytes() for _ in range(count)])


# On a Ray cluster.


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Connected to a Ray cluster, which is left as it was found.

    Raises:
        UserError: Ray is not installed, or there is no such cluster.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray needs Ray, which is not installed: pip install 'cospadi[ray]'") from None
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    name = "Ray on this machine" if address in (None, "auto", "local") else f"the Ray cluster at {address}"
    try:
        _knock(address or "")
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(
            f"{name} cannot be reached: {first_line(error)}. Check that it runs, and that this is its head's address"
        ) from None
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # many kinds, on many lines: another version, no node on this machine
        ray.shutdown()
        raise UserError(f"{name} cannot be used: {' '.join(str(error).split()).rstrip('.')}") from None
    # Otherwise Ray prints on standard output that a process was lost, which is mended and no result of ours.
    ray._private.worker._worker_logs_enabled = False
    try:
        yield
    finally:
        ray.shutdown()
        ray._private.worker._worker_logs_enabled = True


def _knock(address: str) -> None:
    """See whether a server listens at host:port as Ray's do, which speak HTTP/2. Ray itself would try for minutes.

    Raises:
        OSError, ValueError, OverflowError: it does not, or that is no address.
    """
    if address in ("", "auto", "local"):
        return
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        raise ValueError("it is no host:port")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS) as connection:
        if os.environ.get("RAY_USE_TLS", "0") == "0":
            settings = b"\0\0\0\x04\0\0\0\0\0"
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings)
            if connection.recv(9)[3:4] != settings[3:4]:
                raise OSError("what listens there is not Ray")


class _RayPool:
    """Tasks on the nodes of the cluster that this process is connected to.

    Ray itself runs a task again whose node is lost, also where that happens between its end and the transfer of its
    result.
    """

    here = False

    def __init__(self, threads: int, allow_mixed: bool, device: torch.device) -> None:
        import ray

        self._ray = ray
        self.threads, self.allow_mixed = threads, allow_mixed
        self._gpus = 1 if device.type == "cuda" else 0
        self._device = torch.device(device.type)  # a task sees no other GPU than its own
        self._remote = ray.remote(
            num_cpus=threads, num_gpus=self._gpus, max_retries=RETRIES, scheduling_strategy="SPREAD"
        )(_on_node)
        self._letters: Any = None
        self._delivery: Any = None
        self._numbers = itertools.count()
        if not self._slots():
            most = max((node.get("CPU", 0) for node in self._nodes()), default=0)
            if self._gpus and not any(node.get("GPU", 0) >= 1 for node in self._nodes()):
                raise UserError("no node of the Ray cluster has a GPU. Use --device cpu, or add such a node")
            raise UserError(
                f"a task of {threads} threads fits no node of the Ray cluster: the largest has {most:g} CPUs. Use "
                f"--threads-per-task {max(1, int(most))} or fewer, or larger nodes"
            )
        self._expected = None if allow_mixed else site(device)

    def map(
        self, function: Callable[..., Any], tasks: Iterable[Task], on_progress: OnProgress | None = None
    ) -> Iterator[tuple[int, Any]]:
        ray = self._ray
        letters = self._mailbox() if on_progress else None
        running: dict[Any, tuple[int, int]] = {}  # a reference to the answer -> the number it reports by, task's index
        drawn, index, last = iter(tasks), 0, time.monotonic()
        try:
            while True:
                while len(running) < self._slots() + AHEAD and (task := next(drawn, None)) is not None:
                    self._check_memory(index, task)
                    number = next(self._numbers)
                    parcel = ray.put(_pack((function, task.payload)))
                    answer = self._remote.options(memory=task.nbytes or None).remote(
                        parcel, self.threads, self._device, self._expected, letters, number
                    )
                    running[answer] = number, index
                    index += 1
                    del task, parcel, answer
                if not running:
                    return
                ready, _ = ray.wait(list(running), timeout=REPORT_SECONDS)
                if on_progress is not None:
                    self._deliver(dict(running.values()), on_progress)
                if ready:
                    done, last = ready[0], time.monotonic()
                    del ready
                    _, place = running.pop(done)
                    result = self._fetch(place, done)
                    del done
                    yield place, result
                    del result
                elif self._slots():
                    last = time.monotonic()
                elif time.monotonic() - last > PATIENCE_SECONDS:
                    raise RuntimeError(
                        f"no node is left in the Ray cluster that could run the {len(running)} tasks under way"
                    )
        finally:
            if ray.is_initialized():
                for answer in running:
                    ray.cancel(answer, force=True)

    def _nodes(self) -> list[dict[str, float]]:
        """What each node of the cluster has in all."""
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _slots(self) -> int:
        """Tasks that the cluster could run at a time."""
        return sum(map(self._room, self._nodes()))

    def _room(self, node: dict[str, float]) -> int:
        """Tasks that a node could run at a time."""
        processors = int(node.get("CPU", 0)) // self.threads
        return min(processors, int(node.get("GPU", 0))) if self._gpus else processors

    def _check_memory(self, index: int, task: Task) -> None:
        """Refuse a task that would wait for ever."""
        if not task.nbytes:
            return
        most = max((node.get("memory", 0) for node in self._nodes() if self._room(node)), default=0)
        if task.nbytes > most:
            raise UserError(
                f"task {index} needs {task.nbytes / 1e9:.2f} GB of memory, and the largest node of the Ray cluster has "
                f"{most / 1e9:.2f} GB for tasks. Use a larger node"
            )

    def _fetch(self, index: int, answer: Any) -> Any:
        """A task's result, in memory of this process."""
        exceptions = self._ray.exceptions
        try:
            parcel = self._ray.get(answer)
        except exceptions.RayTaskError as error:  # what the function raises comes in the parcel
            raise UserError(
                f"a node of the Ray cluster cannot run cospadi: {str(error.cause).strip().splitlines()[-1]}. Install "
                "the same version on all of them"
            ) from None
        except exceptions.RayError as error:
            raise RuntimeError(
                f"task {index} was lost on the Ray cluster, and not to be had in {RETRIES + 1} tries: "
                f"{first_line(error)}. If memory ran out, use larger nodes"
            ) from None
        return _open_answer(parcel)

    def _mailbox(self) -> Any:
        """A small process beside this one that keeps the last report of each task until it is read."""

        class Mailbox:  # is sent by value: its process imports neither this package nor torch
            def __init__(self) -> None:
                self.last: dict[int, tuple[float, str]] = {}

            def put(self, number: int, share: float, note: str) -> None:
                self.last[number] = share, note

            def take(self) -> dict[int, tuple[float, str]]:
                last, self.last = self.last, {}
                return last

        if self._letters is None:
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            here = NodeAffinitySchedulingStrategy(self._ray.get_runtime_context().get_node_id(), soft=False)
            mailbox = self._ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(Mailbox)
            self._letters = mailbox.remote()
        return self._letters

    def _deliver(self, indices: dict[int, int], on_progress: OnProgress) -> None:
        """Pass on the reports that have arrived, without waiting for any."""
        if self._delivery is None:
            self._delivery = self._letters.take.remote()
        if not self._ray.wait([self._delivery], timeout=0)[0]:
            return
        delivery, self._delivery = self._delivery, None
        try:
            reports = self._ray.get(delivery)
        except self._ray.exceptions.RayError:  # progress is a courtesy
            return
        for number, (share, note) in reports.items():
            if number in indices:
                on_progress(indices[number], share, note)


def _on_node(
    parcel: _Parcel, threads: int, device: torch.device, expected: Site | None, letters: Any, number: int
) -> _Parcel:
    """What a node of the Ray cluster runs."""
    try:
        if expected is not None:
            check_same(platform.node(), site(device), expected)
    except UserError as error:
        return _refusal(error)

    def tell(share: float, note: str) -> None:
        letters.put.remote(number, share, note)

    return _answer(parcel, threads, _seldom(tell) if letters is not None else _silent)
