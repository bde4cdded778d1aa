from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

Kind = Literal["local", "ray"]


@dataclass(frozen=True)
class Engine:
    kind: Kind = "local"
    workers: int = 1
    threads_per_task: int | None = None
    ray_address: str | None = None
    allow_mixed: bool = False

    @contextmanager
    def open(self, device: torch.device) -> Iterator[Pool]:
        yield Pool(self.threads_per_task or torch.get_num_threads())


@dataclass(frozen=True)
class Task:
    payload: tuple[Any, ...]
    nbytes: int = 0


class Pool:
    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.allow_mixed = False

    def map(
        self,
        function: Callable[..., Any],
        tasks: Iterable[Task],
        on_progress: Callable[[int, float, str], None] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        for index, task in enumerate(tasks):

            def report(share: float, note: str, index: int = index) -> None:
                if on_progress:
                    on_progress(index, share, note)

            before = torch.get_num_threads()
            torch.set_num_threads(self.threads)
            try:
                result = function(*task.payload, report)
            finally:
                torch.set_num_threads(before)
            yield index, result


def device_model(device: torch.device) -> str:
    return "cpu"
