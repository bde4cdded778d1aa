"""What we use of other libraries without their promise that it stays: every such thing stands here, and nowhere else.

Each function says which public way it waits for; when that way is there, the function goes.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def blank_main() -> Iterator[None]:
    """Processes that multiprocessing spawns in this block do not import the main module of this one.

    So that scripts need no guard against that. Waits for a spawn context that can be told to leave it out.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def quiet_workers() -> Iterator[None]:
    """Ray does not print, on this process's standard output, that one of its own was lost.

    Waits for a switch of `ray.init` for that: `log_to_driver` is none.
    """
    from ray._private import worker

    worker._worker_logs_enabled = False
    try:
        yield
    finally:
        worker._worker_logs_enabled = True
