"""A model whose weights are in memory only while they are needed: its decoder blocks come and go one at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from cospadi.errors import CheckpointError, UserError
from cospadi.experts import Slice, unstack
from cospadi.format import safetensors
from cospadi.model.projections import decoder_blocks

log = logging.getLogger("cospadi")


@dataclass(frozen=True)
class StoredWeight:
    """Where a parameter lies: under `name` in a safetensors file, or in a slice of what lies there, to be cast."""

    path: Path
    name: str
    dtype: torch.dtype
    slice: Slice | None = None


@dataclass
class Blocks:
    """A causal language model, seen as a list of decoder blocks with something before and after them.

    Calling `model` works at any time: a block that is away is loaded when it runs and leaves afterwards. `loaded` keeps
    one for as long as it is worked on.

    Attributes:
        model: the parameters of its blocks are on the meta device while they are away.
        device: where it computes.
        stored: parameter name -> where it lies on disk; None for a model that is in memory whole.
        unknown: tensors that the model has no place for -> their files.
        unstacked: whether experts have layers of their own.
        seconds_reading: what reading weights has taken so far.
        folder: that the model was loaded from, if any.
    """

    model: nn.Module
    device: torch.device
    stored: Mapping[str, StoredWeight] | None = None
    unknown: Mapping[str, Path] = field(default_factory=dict)
    unstacked: bool = False
    seconds_reading: float = 0.0
    folder: Path | None = None

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: a parameter that is in memory is not finite. The others are checked when they are first read.
        """
        self._finite: set[str] = set()
        for name, parameter in self.model.named_parameters():
            if not parameter.is_meta:
                check_finite(name, parameter, self.folder)
        self.prefix, modules = decoder_blocks(self.model)
        self.modules = list(modules)
        self._passed_by = False
        self._kept: set[str] = set()
        self._away: dict[str, Tensor] = {}
        if self.stored is not None:
            for index, module in enumerate(self.modules):
                self._load_when_called(self.name_of(index), module)

    def unstack_experts(self) -> None:
        """Give experts that are stacked in one parameter layers of their own (`cospadi.experts`)."""
        slices, self.unstacked = unstack(self.model), True
        if self.stored is not None:
            whole = dict(self.stored)
            for name, part in slices.items():
                if part.parameter in whole:
                    whole[name] = replace(whole[part.parameter], slice=part)
            self.stored = whole

    def __len__(self) -> int:
        return len(self.modules)

    def name_of(self, index: int) -> str:
        """The module name of a block."""
        return f"{self.prefix}.{index}"

    @contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """A block with its weights, which leave again at the end."""
        name, module = self.name_of(index), self.modules[index]
        if self.stored is None or name in self._kept:
            yield module
            return
        self._load(name, module)
        self._kept.add(name)
        try:
            yield module
        finally:
            self.release(index)

    def release(self, index: int) -> None:
        """Have the weights of a block that is `loaded` leave at once."""
        name = self.name_of(index)
        if name in self._kept:
            self._kept.discard(name)
            self._release(name, self.modules[index])

    @contextmanager
    def passed_by(self) -> Iterator[None]:
        """Inside this block calling a decoder block loads nothing: its `forward` is somebody else's."""
        self._passed_by = True
        try:
            yield
        finally:
            self._passed_by = False

    def weight(self, name: str) -> Tensor:
        """The weight (d2, d1) of a linear layer, wherever it is.

        Raises:
            UserError: it is not finite.
        """
        parameter = self.model.get_submodule(name).weight
        assert isinstance(parameter, Tensor)
        if parameter.is_meta:
            return self.read(f"{name}.weight")
        return parameter.detach()

    def read(self, name: str) -> Tensor:
        """A parameter that is away, by its full name."""
        return self._read([name])[name]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a linear layer's weight."""
        weight = self.model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return weight.dtype

    def _tensors(self, name: str, module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
        """Full name of a parameter or buffer that is away, or was -> (the module that holds it, its name there)."""
        return {
            f"{path}.{leaf}": (owner, leaf)
            for path, owner in module.named_modules(prefix=name)
            for leaf, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False))
            if (tensor.is_meta and f"{path}.{leaf}" in (self.stored or {})) or f"{path}.{leaf}" in self._away
        }

    def _load_when_called(self, name: str, module: nn.Module) -> None:
        def skipped() -> bool:
            return name in self._kept or self._passed_by

        def before(_module: nn.Module, _args: object) -> None:
            if not skipped():
                self._load(name, module)

        def after(_module: nn.Module, _args: object, _output: object) -> None:
            if not skipped():
                self._release(name, module)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after, always_call=True)

    def _load(self, name: str, module: nn.Module) -> None:
        start, places = time.perf_counter(), self._tensors(name, module)
        for full, tensor in self._read(list(places)).items():
            owner, leaf = places[full]
            self._away[full] = getattr(owner, leaf)
            held = isinstance(self._away[full], nn.Parameter)
            setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if held else tensor)
        self.seconds_reading += time.perf_counter() - start

    def _release(self, name: str, module: nn.Module) -> None:
        for full, (owner, leaf) in self._tensors(name, module).items():
            if full in self._away:
                setattr(owner, leaf, self._away.pop(full))

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        assert self.stored is not None
        by_file: dict[Path, list[str]] = {}
        for name in names:
            if name not in self.stored:
                raise CheckpointError(f"tensor {name} is in none of the model's files")
            by_file.setdefault(self.stored[name].path, []).append(name)
        tensors: dict[str, Tensor] = {}
        for path, inside in by_file.items():
            with safetensors.open_file(path) as file:
                for name in inside:
                    stored = self.stored[name]
                    part = stored.slice
                    tensor = file.get_tensor(stored.name) if part is None else part.of(file.get_slice(stored.name))
                    # A copy, so that nothing keeps the file mapped.
                    tensors[name] = tensor.to(self.device, stored.dtype, copy=True)
        for name in set(names) - self._finite:
            check_finite(name, tensors[name], self.stored[name].path)
            self._finite.add(name)
        return tensors


def check_finite(name: str, tensor: Tensor, place: Path | None = None) -> None:
    """Refuse what would make all that follows not a number.

    Args:
        place: the file or folder that it comes from, where that is known.

    Raises:
        UserError: it is not finite.
    """
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        where = f" of {place}" if place else ""
        raise UserError(f"tensor {name}{where} holds NaN or infinity. Mend the model, or download it again")
