"""Tasks on a Ray cluster."""

from __future__ import annotations

import itertools
import logging
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cospadi.__about__ import __version__
from cospadi.compat import quiet_workers
from cospadi.errors import UserError, first_line
from cospadi.jobs.carry import REPORT_SECONDS, Parcel, Report, answer, pack, refusal, settle, silent
from cospadi.jobs.pool import RETRIES, Pool, Task, device_model

try:
    import ray
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError:
    raise UserError("--engine ray needs Ray, which is not installed: pip install 'cospadi[ray]'") from None

AHEAD = 2
"""Tasks that a Ray cluster holds beyond those that it can run, so that none of its processors waits for the next."""

CONNECT_SECONDS = 10.0
"""How long a Ray cluster may take to accept a connection. `ray status`, a process of its own, gets three times that."""

PATIENCE_SECONDS = 60.0
"""How long tasks wait for a node that could run them after the last such node is lost."""


def site(device: torch.device) -> str:
    """What results of this process depend on besides the task and its threads."""
    return f"{device_model(device)} (torch {torch.__version__}, cospadi {__version__})"


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Connected to a Ray cluster, which is left as it was found.

    Raises:
        UserError: there is no such cluster.
    """
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
    try:
        with quiet_workers():
            yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """See whether Ray listens at host:port. `ray.init` would try for minutes.

    Raises:
        OSError, ValueError, OverflowError: it does not, or that is no address.
    """
    if address in ("", "auto", "local"):
        return
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        raise ValueError("it is no host:port")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS):
        pass
    if "://" in address:  # a proxy, which gives up by itself
        return
    status = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", f"{host}:{port}"]  # `ray status`
    try:
        subprocess.run(status, stdin=subprocess.DEVNULL, capture_output=True, timeout=3 * CONNECT_SECONDS)
    except subprocess.TimeoutExpired:
        raise TimeoutError("timed out: what listens there does not answer as Ray does") from None


@dataclass
class _Run:
    """A task that the cluster has, and the number it reports by."""

    future: Future[Any]
    on_progress: Report | None
    number: int


class RayPool(Pool):
    """Tasks on the nodes of the cluster that this process is connected to.

    Ray itself runs a task again whose node is lost, also where that happens between its end and the transfer of its
    result.

    Raises:
        UserError: no node can run a task of so many threads on such a device.
    """

    def __init__(self, threads: int, allow_mixed: bool, device: torch.device) -> None:
        super().__init__(threads, allow_mixed)
        self._gpus = 1 if device.type == "cuda" else 0
        self._device = torch.device(device.type)  # a task sees no other GPU than its own
        self._remote = ray.remote(
            num_cpus=threads, num_gpus=self._gpus, max_retries=RETRIES, scheduling_strategy="SPREAD"
        )(_on_node)
        self._letters: Any = None
        self._numbers = itertools.count()
        self._running: dict[Any, _Run] = {}  # by the reference to the answer
        self._seen = time.monotonic()  # when a task was done, or could be
        if not self._slots():
            most = max((node.get("CPU", 0) for node in self._nodes()), default=0)
            if self._gpus and not any(node.get("GPU", 0) >= 1 for node in self._nodes()):
                raise UserError("no node of the Ray cluster has a GPU. Use --device cpu, or add such a node")
            raise UserError(
                f"a task of {threads} threads fits no node of the Ray cluster: the largest has {most:g} CPUs. Use "
                f"--threads-per-task {max(1, int(most))} or fewer, or larger nodes"
            )
        self._expected = None if allow_mixed else site(device)

    def submit(self, function: Callable[..., Any], task: Task, on_progress: Report | None = None) -> Future[Any]:
        self._check_memory(task)
        while len(self._running) >= self._slots() + AHEAD:
            self._step()
        run = _Run(Future(), on_progress, next(self._numbers))
        letters = self._mailbox() if on_progress else None
        call = ray.put(pack((function, task.payload)))
        remote = self._remote.options(memory=task.nbytes or None).remote
        self._running[remote(call, self.threads, self._device, self._expected, letters, run.number)] = run
        return run.future

    def close(self) -> None:
        self.abandon([run.future for run in self._running.values()])

    def abandon(self, futures: Collection[Future[Any]]) -> None:
        for reference, run in list(self._running.items()):
            if run.future in futures:
                del self._running[reference]
                if ray.is_initialized():
                    ray.cancel(reference, force=True)

    def _step(self) -> None:
        done, _ = ray.wait(list(self._running), timeout=REPORT_SECONDS)
        self._deliver()
        if done or self._slots():
            self._seen = time.monotonic()
        elif time.monotonic() - self._seen > PATIENCE_SECONDS:
            raise RuntimeError(
                f"no node is left in the Ray cluster that could run the {len(self._running)} tasks under way"
            )
        for reference in done:
            settle(self._running.pop(reference).future, partial(_fetch, reference))

    def _nodes(self) -> list[dict[str, float]]:
        """What each node of the cluster has in all."""
        return [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def _slots(self) -> int:
        """Tasks that the cluster could run at a time."""
        return sum(map(self._room, self._nodes()))

    def _room(self, node: dict[str, float]) -> int:
        """Tasks that a node could run at a time."""
        processors = int(node.get("CPU", 0)) // self.threads
        return min(processors, int(node.get("GPU", 0))) if self._gpus else processors

    def _check_memory(self, task: Task) -> None:
        """Refuse a task that would wait for ever."""
        if not task.nbytes:
            return
        most = max((node.get("memory", 0) for node in self._nodes() if self._room(node)), default=0)
        if task.nbytes > most:
            raise UserError(
                f"a task needs {task.nbytes / 1e9:.2f} GB of memory, and the largest node of the Ray cluster has "
                f"{most / 1e9:.2f} GB for tasks. Use a larger node"
            )

    def _mailbox(self) -> Queue:
        """Where tasks report to: a small process beside this one, which imports neither this package nor torch."""
        if self._letters is None:
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            self._letters = Queue(actor_options={"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here})
        return self._letters

    def _deliver(self) -> None:
        """Pass on the last report of each task."""
        if self._letters is None:
            return
        try:
            last = dict(self._letters.get_nowait_batch(self._letters.qsize()))
        except ray.exceptions.RayError:  # progress is a courtesy
            return
        for run in list(self._running.values()):
            if run.number in last and run.on_progress is not None:
                run.on_progress(*last[run.number])


def _fetch(reference: Any) -> Parcel:
    """A task's answer, in memory of this process."""
    try:
        parcel: Parcel = ray.get(reference)
        return parcel
    except ray.exceptions.RayTaskError as error:  # what the function raises comes in the parcel
        raise UserError(
            f"a node of the Ray cluster cannot run cospadi: {str(error.cause).strip().splitlines()[-1]}. Install "
            "the same version on all of them"
        ) from None
    except ray.exceptions.RayError as error:
        raise RuntimeError(
            f"a task was lost on the Ray cluster, and not to be had in {RETRIES + 1} tries: {first_line(error)}. If "
            "memory ran out, use larger nodes"
        ) from None


def _on_node(parcel: Parcel, threads: int, device: torch.device, expected: str | None, letters: Any, n: int) -> Parcel:
    """What a node of the Ray cluster runs: task number `n`, if results are the same `expected` ones here."""
    if expected is not None and (found := site(device)) != expected:
        told = (
            f"node {platform.node()} of the Ray cluster has {found}, and this machine has {expected}: results would "
            "depend on where a task runs. Use nodes like this machine, or pass --allow-mixed"
        )
        return refusal(UserError(told))

    def tell(fraction: float, note: str) -> None:
        with suppress(ray.exceptions.RayError):
            letters.put_nowait((n, (fraction, note)))

    return answer(parcel, threads, silent if letters is None else tell)
