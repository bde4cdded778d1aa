"""Memory in large pages, for what kernels read as fast as they can: finding the place of small pages takes a part of
the time, a tenth to a third on an AMD EPYC.

And what is left of files whose tensors were copied there.

Linux gives large pages to who asks (transparent huge pages, of 2 MB on x86); where it does not, nothing is lost.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import torch
from torch import Tensor

LEAST = 1 << 21
"""Bytes of a page, and of the smallest tensor that gets some."""


def zeros(nbytes: int) -> Tensor:
    """Zeros, uint8 (nbytes,), on CPU."""
    if nbytes < LEAST or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(nbytes, dtype=torch.uint8)
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them; or there is no memory, which torch tells
        return torch.zeros(nbytes, dtype=torch.uint8)
    return torch.frombuffer(memory, dtype=torch.uint8)


def moved(tensor: Tensor) -> Tensor:
    """A copy in large pages; the tensor itself where it is small, not contiguous or not on CPU."""
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes < LEAST or tensor.device.type != "cpu" or not tensor.is_contiguous() or type(tensor) is not Tensor:
        return tensor
    return zeros(nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)


def mapped_files(suffix: str) -> list[range]:
    """Addresses where files with this suffix are mapped into this process; none where the system does not tell."""
    maps = Path("/proc/self/maps")
    lines = maps.read_bytes().split(b"\n") if maps.exists() else []  # names may have any other character
    found = [line.split(b" ", 1)[0].split(b"-") for line in lines if line.endswith(suffix.encode())]
    return [range(int(start, 16), int(end, 16)) for start, end in found]


def release(tensor: Tensor, files: list[range]) -> None:
    """Take the whole pages that a tensor lies in out of this process's memory, if they are a mapped file's; they are
    read again by who looks at them."""
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
    if end - start >= LEAST and any(file.start <= start and end <= file.stop for file in files):
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
