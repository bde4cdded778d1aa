"""The package's C++ library, called with raw pointers through ctypes, on the threads of torch's own OpenMP."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cospadi.errors import UserError

load_errors: list[str] = []
"""Why a library that is there is not used."""

_NAMES = {"win32": "cospadi_cpu.dll", "darwin": "libcospadi_cpu.dylib"}


@cache
def library() -> ctypes.CDLL | None:
    """The library where the package's installation built one, set to run on torch's threads."""
    name = _NAMES.get(sys.platform, "libcospadi_cpu.so")
    places = [Path(__file__).parent / "runtime" / name]
    with suppress(PackageNotFoundError):  # an editable installation leaves it where packages are installed
        places.append(Path(str(distribution("cospadi").locate_file(f"cospadi/runtime/{name}"))))
    path = next((path for path in places if path.exists()), None)
    if path is None:
        return None
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:  # of another machine, or damaged
        load_errors.append(f"{path} cannot be loaded: {error}")
        return None
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    # support, values and their bytes, offsets, d2, k, value_bits
    stored: list[Any] = [pointer, pointer, size, pointer, *[number] * 3]
    found.cospadi_multiply.argtypes = [pointer, pointer, ctypes.c_int64, number, *stored, number, number]
    found.cospadi_unpack.argtypes = [pointer, number, number, number, *stored, number, number]
    # support, offsets, d2, k, threads
    masked: list[Any] = [pointer, pointer, *[number] * 3]
    found.cospadi_scatter.argtypes = [pointer, pointer, *masked]
    found.cospadi_scatter.restype = None
    found.cospadi_gather.argtypes = [pointer, number, pointer, *masked]
    found.cospadi_gather.restype = None
    found.cospadi_multiply_dense.argtypes = [pointer, pointer, ctypes.c_int64, pointer, number, number, number, number]
    found.cospadi_gram.argtypes = [pointer, pointer, *[number] * 4]
    # packed levels, their places, what is beside them
    levels: list[Any] = [pointer] * 5
    found.cospadi_multiply_levels.argtypes = [
        *(pointer, pointer, ctypes.c_int64, number),
        *levels,
        *(number, number, pointer, pointer, number, number),
    ]
    found.cospadi_unpack_levels.argtypes = [pointer, *[number] * 3, *levels, *[number] * 3]
    found.cospadi_unpack_levels.restype = None
    found.cospadi_count_large.argtypes = [pointer, number, number, pointer, number]
    found.cospadi_count_large.restype = None
    found.cospadi_pack_levels.argtypes = [pointer, number, number, *[pointer] * 5, number]
    found.cospadi_pack_levels.restype = None
    found.cospadi_quantize.argtypes = [*[pointer] * 7, number, number, pointer, pointer, *[number] * 4]
    # d2, d1, rows, cols, block_rows
    shape: list[Any] = [ctypes.c_int64, ctypes.c_int64, pointer, pointer, ctypes.c_int64]
    found.cospadi_rans_encode.argtypes = [pointer, *shape, number, *[pointer] * 4, number]
    found.cospadi_rans_decode.argtypes = [
        pointer,
        pointer,
        number,
        number,
        *shape,
        number,
        pointer,
        pointer,
        *[number] * 2,
    ]
    found.cospadi_level_name.restype = ctypes.c_char_p
    found.cospadi_use_openmp.argtypes = [pointer]
    runtime = openmp_runtime()
    if runtime is not None:
        found.cospadi_use_openmp(ctypes.cast(ctypes.CDLL(str(runtime)).GOMP_parallel, pointer))
    return found


@cache
def openmp_runtime() -> Path | None:
    """The OpenMP library that torch has loaded, if it can start threads for others."""
    torch_folder = Path(torch.__file__).parent
    folders = [torch_folder / "lib", torch_folder.parent / "torch.libs", torch_folder / ".dylibs"]
    found = [path for folder in folders for path in sorted(folder.glob("lib*omp[.-]*")) if _starts_threads(path)]
    maps = Path("/proc/self/maps")
    if not found and maps.exists():  # a torch of the system's links the system's
        loaded = {Path(line.split()[-1]) for line in maps.read_text().splitlines() if "omp." in line.rpartition("/")[2]}
        found = [path for path in sorted(loaded) if _starts_threads(path)]
    return found[0] if found else None


def _starts_threads(path: Path) -> bool:
    try:
        return hasattr(ctypes.CDLL(str(path)), "GOMP_parallel")
    except OSError:
        return False


@cache
def levels() -> dict[str, int]:
    """Instruction sets that were built and that this machine has: name -> the library's number, best last."""
    found = library()
    if found is None:
        return {}
    usable = [level for level in range(found.cospadi_levels()) if found.cospadi_level_supported(level)]
    return {found.cospadi_level_name(level).decode(): level for level in usable}


@cache
def best_level() -> int:
    """The level in use: the best there is, or what the environment variable COSPADI_CPU names."""
    wanted = os.environ.get("COSPADI_CPU")
    if wanted is None:
        return list(levels().values())[-1]
    if wanted not in levels():
        raise UserError(f"COSPADI_CPU is {wanted!r}, which this machine does not have. Use {', '.join(levels())}")
    return levels()[wanted]


GRAM_TOKENS = 512
"""Rows that `gram` sums in one go: as exact as torch's float32 products, and a tile of them fits the second cache."""


@cache
def takes_grams() -> bool:
    """Whether there is a kernel for `gram`: with AVX-512 BF16."""
    found = library()
    return found is not None and bool(found.cospadi_level_multiplies_tiles(best_level()))


def gram(x: Tensor) -> Tensor:
    """X^T X, float32 (d, d), of X in bf16 (rows, d), where `takes_grams`: half of the products, at the rate of bf16."""
    found, d = library(), x.shape[1]
    assert found is not None, "callers ask `takes_grams` first"
    sums = torch.zeros(d, d, dtype=torch.float32)
    for start in range(0, len(x), GRAM_TOKENS):
        part = x[start : start + GRAM_TOKENS]
        turned = part.T.contiguous()
        given = turned.data_ptr(), sums.data_ptr(), d, len(part), torch.get_num_threads(), best_level()
        if found.cospadi_gram(*given):
            raise MemoryError("there is not enough memory for a Gram matrix")
    upper = sums.triu_()
    return upper + upper.triu(1).T


def quantize(
    target: Tensor,
    feedback: Tensor,
    steps: Tensor,
    scales: Tensor,
    cols: Tensor,
    rows: Tensor,
    prices: Tensor,
    block_rows: int,
) -> tuple[Tensor, Tensor]:
    """Levels of some inputs and what is left, with feedback from each to those after it; see `solvers/trellis.py`.

    Args:
        target: float32 (inputs, d2). feedback: of R, upper triangular, float32 (inputs, inputs).
        steps: float32 (inputs,). scales: float32 (d2,).
        cols, rows: int16 (inputs,) and (d2,), whose sum is the index of a class.
        prices: float32 (classes, 2, symbols), in squared steps. block_rows: outputs of a path.

    Returns:
        Levels int16 and errors over the feedback's diagonal, float32, both (inputs, d2).
    """
    found = library()
    assert found is not None, "callers ask first"
    inputs, d2 = target.shape
    work = target.contiguous().clone()
    levels, errors = torch.empty(inputs, d2, dtype=torch.int16), torch.empty(inputs, d2, dtype=torch.float32)
    given = [tensor.contiguous() for tensor in (feedback, steps, scales, cols, rows, prices)]
    status = found.cospadi_quantize(
        work.data_ptr(), *(tensor.data_ptr() for tensor in given), prices.shape[0], prices.shape[2],
        levels.data_ptr(), errors.data_ptr(), inputs, d2, block_rows, torch.get_num_threads(),
    )  # fmt: skip
    if status:
        raise MemoryError("there is not enough memory to quantize")
    return levels, errors
