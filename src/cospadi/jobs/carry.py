"""Calls on their way to another process, and their results on the way back, with every bit that results depend on."""

from __future__ import annotations

import io
import pickle
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes. Products round differently where a tensor begins elsewhere in a cache line, so that is kept on the way."""

REPORT_SECONDS = 0.5
"""Least time between two reports of a task in another process."""

Report = Callable[[float, str], None]
"""What a task tells while it runs: the fraction of it that is done, 0..1, and a short note."""


def call(function: Callable[..., Any], payload: tuple[Any, ...], threads: int, report: Report) -> Any:
    """The function's result, computed by so many torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return function(*payload, report)
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Parcel:
    """A value on its way to another process: a pickle, with the tensors beside it, which come to GBs.

    Attributes:
        head: the pickle.
        parts: uint8, a copy of the memory that each tensor spans.
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
        self.parts.append(memory[start:end].numpy().copy())
        return len(self.parts) - 1, value.dtype, tuple(value.shape), value.stride(), shift


class _Unpacker(pickle.Unpickler):
    def __init__(self, parcel: Parcel) -> None:
        super().__init__(io.BytesIO(parcel.head))
        self.parts = parcel.parts

    def persistent_load(self, key: Any) -> Tensor:
        index, dtype, shape, stride, shift = key
        part, self.parts[index] = np.frombuffer(self.parts[index], dtype=np.uint8), None
        memory = torch.empty(shift + len(part), dtype=torch.uint8)
        memory[shift:].numpy()[:] = part
        return torch.empty(0, dtype=dtype).set_(memory.untyped_storage(), shift // dtype.itemsize, shape, stride)


def pack(value: Any) -> Parcel:
    """The value as it is now: what becomes of it afterwards is nothing to the receiver."""
    stream = io.BytesIO()
    packer = _Packer(stream)
    packer.dump(value)
    return Parcel(stream.getvalue(), packer.parts)


def unpack(parcel: Parcel) -> Any:
    """The value, its tensors in memory of their own that is aligned as the sender's was. Empties the parcel."""
    return _Unpacker(parcel).load()


def answer(parcel: Parcel, threads: int, tell: Report) -> Parcel:
    """Make the call in a parcel: its result, or what it raised. Reports go on every REPORT_SECONDS at most."""
    last = float("-inf")

    def report(fraction: float, note: str) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= REPORT_SECONDS:
            last = now
            tell(fraction, note)

    try:
        function, payload = unpack(parcel)
        return pack((call(function, payload, threads, report), None))
    except Exception as error:
        return refusal(error)


def refusal(error: Exception) -> Parcel:
    """An answer that raises this error where it is opened."""
    error.add_note("".join(["In the process that ran the task:\n", *traceback.format_exception(error)]).rstrip())
    try:
        unpack(pack((None, error)))
    except Exception:  # an error that holds what cannot be pickled, or that is built from other arguments than its own
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return pack((None, error))


def settle(future: Future[Any], fetch: Callable[[], Parcel]) -> None:
    """Complete a future with the answer that is fetched, or with what that raises."""
    try:
        result, error = unpack(fetch())
    except Exception as failure:
        result, error = None, failure
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def silent(fraction: float, note: str) -> None:
    """A report that nobody reads."""
