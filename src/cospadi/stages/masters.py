"""The numbers of a compressed model that training moves, in float32, each beside what it is rounded to when stored.

A step runs the model on what would be stored, and its gradients move the float32 numbers (masters). So what is measured
on the way is what will be written, and steps smaller than a rounding add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cospadi.format import safetensors
from cospadi.format.kinds import Tuned, narrowed, root_mean_square
from cospadi.format.schema import StoredProjection
from cospadi.recipe import Trained
from cospadi.runtime import op
from cospadi.runtime.swap import quantizer_of


class TunedLinear(nn.Module):
    """A compressed layer whose weight is made, once a step, of numbers that are parameters, rounded as they are stored.

    Attributes:
        leaves: the numbers of `Tuned`, by name.
        atoms: D transposed, (k, d1), one parameter for the layers of a group; None for I.
        support: its tensor, or None.
        weight: W (d2, d1) in the model's dtype, as `put` has made it of them.
    """

    def __init__(
        self,
        entry: StoredProjection,
        tuned: Tuned,
        support: Tensor | None,
        atoms: nn.Parameter | None,
        bias: Any,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.entry, self.tuned = entry, tuned
        self.leaves = nn.ParameterDict({name: nn.Parameter(one.clone()) for name, one in tuned.numbers.items()})
        self.atoms, self.bias = atoms, bias
        self.register_buffer("support", support, persistent=False)
        self.register_buffer("offsets", entry.form.support_kind.offsets(support), persistent=False)
        device = next(iter(self.leaves.values())).device
        self.weight = torch.empty(entry.d2, entry.d1, dtype=dtype, device=device).requires_grad_()  # no parameter

    support: Tensor | None
    offsets: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d1) -> (..., d2), in x's dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)

    @torch.no_grad()
    def put(self) -> None:
        """Make the weight of the numbers as they are now."""
        self.weight.copy_(self._made())

    def carry(self) -> None:
        """Add the weight's gradient to those of the numbers that it is made of, and drop it."""
        if self.weight.grad is not None:
            self._made().backward(self.weight.grad.float())  # type: ignore[no-untyped-call]
        self.weight.grad = None

    def _made(self) -> Tensor:
        """W (d2, d1), float32."""
        values = self.tuned.values(dict(self.leaves.items()))
        codes: Tensor = _Coefficients.apply(values, self.support, self.offsets, self.entry)  # type: ignore[no-untyped-call]
        return codes if self.atoms is None else codes @ self.atoms


class _Coefficients(torch.autograd.Function):
    """Values in their shape -> S transposed, a dense (d2, k) matrix."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, support: Tensor | None, offsets: Tensor | None, entry: StoredProjection
    ) -> Tensor:
        ctx.of, ctx.shape = (support, offsets, entry.form.support), values.shape
        return op.coefficients(support, values, offsets, entry.d2, entry.k, entry.form.support, None, values.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        support, offsets, kind = ctx.of
        return op.entries(support, grad, offsets, kind).view(ctx.shape), None, None, None


@dataclass
class Master:
    """One tensor of numbers.

    Attributes:
        numbers: float32, in units, as training moves them.
        leaf: what the model runs on: the same, rounded.
        unit: of the numbers, the size that a step is a fraction of; of each, or of all.
        rounded: what numbers come back as once they were stored.
    """

    numbers: Tensor
    leaf: nn.Parameter
    unit: Tensor
    rounded: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, leaf: nn.Parameter, unit: Tensor, rounded: Callable[[Tensor], Tensor]) -> Master:
        """Of what a parameter is now; a unit of 0 is taken for 1."""
        unit = torch.where(unit > 0, unit, torch.ones_like(unit))
        return cls(leaf.detach().float() / unit, leaf, unit, rounded)


@dataclass(frozen=True)
class Student:
    """A compressed model that is trained.

    Attributes:
        masters: name in the model -> its numbers.
        layers: projection -> its layer.
        plain: tensors of the checkpoint that are stored as they are -> name of a master, and their dtype.
    """

    model: Any
    masters: dict[str, Master]
    layers: dict[str, TunedLinear]
    plain: dict[str, tuple[str, torch.dtype]]

    @torch.no_grad()
    def put(self, numbers: Mapping[str, Tensor] | None = None) -> None:
        """Have the model run on these numbers, rounded, or on those of the masters."""
        for name, master in self.masters.items():
            now = master.numbers if numbers is None else numbers[name]
            master.leaf.copy_(master.rounded(now * master.unit))
        for layer in self.layers.values():
            layer.put()

    def gradients(self) -> Iterator[tuple[Master, Tensor]]:
        """Every master and the gradient of the numbers that the model runs on, float32, which is then dropped."""
        for layer in self.layers.values():
            layer.carry()
        for master in self.masters.values():
            grad = torch.zeros_like(master.leaf) if master.leaf.grad is None else master.leaf.grad
            master.leaf.grad = None
            yield master, grad.float()

    def numbers(self) -> dict[str, Tensor]:
        """The masters' numbers, copied."""
        return {name: master.numbers.clone() for name, master in self.masters.items()}

    @torch.no_grad()
    def stored(self, numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the checkpoint that these numbers change, as they are stored."""
        self.put(numbers)
        tensors = {
            f"{name}.{layer.entry.form.names.values}": layer.tuned.stored(dict(layer.leaves.items()))
            for name, layer in self.layers.items()
        }
        tensors |= {tensor: self.masters[name].leaf.to(dtype) for tensor, (name, dtype) in self.plain.items()}
        return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def student_of(model: Any, folder: Path, trained: Trained) -> Student:
    """A compressed model in memory, its layers replaced by such that train.

    Args:
        folder: that it was loaded from.
    """
    entries: dict[str, StoredProjection] = quantizer_of(model).quantization_config.parsed()
    model.requires_grad_(False)
    device, where = model.device, safetensors.stored_tensors(folder)
    layers: dict[str, TunedLinear] = {}
    atoms: dict[str, nn.Parameter] = {}
    masters: dict[str, Master] = {}
    plain: dict[str, tuple[str, torch.dtype]] = {}

    def read(name: str) -> Tensor:
        with safetensors.open_file(where[name].path) as file:
            return file.get_tensor(name).to(device)  # type: ignore[no-any-return]

    for name, entry in entries.items():
        form, shared = entry.form, entry.dictionary_tensor
        support = read(f"{name}.{form.names.support}") if f"{name}.{form.names.support}" in where else None
        if shared in where and shared not in atoms:
            dtype = form.dictionary_kind.dtype
            atoms[shared] = nn.Parameter(read(shared).float())
            # What an input is worth to atoms differs as inputs do: they were solved in the metric of these.
            unit = atoms[shared].detach().square().mean(0, keepdim=True).sqrt() * narrowed(entry.d1)
            masters[shared] = Master.of(atoms[shared], unit, partial(_cast, dtype))
            plain[shared] = (shared, dtype)
        tuned = form.codec.tuned(read(f"{name}.{form.names.values}"), entry.values_shape, entry.k)
        layer = TunedLinear(entry, tuned, support, atoms.get(shared), model.get_submodule(name).bias, model.dtype)
        layers[name] = layer
        model.set_submodule(name, layer)
        for part, size in tuned.units.items():
            of_all = torch.tensor(size, device=device)
            masters[f"{name}.{part}"] = Master.of(layer.leaves[part], of_all, partial(tuned.rounded, part))
    known = {id(master.leaf) for master in masters.values()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in where or id(parameter) in known or trained == "values":
            continue
        if parameter.is_floating_point() and (parameter.ndim < 2 or trained == "all"):
            known.add(id(parameter))
            dtype = safetensors.SAFETENSORS_TYPES[where[name].dtype]
            size = root_mean_square(parameter.detach().float())
            size *= narrowed(parameter.shape[-1]) if parameter.ndim > 1 else 1
            of_all = torch.tensor(size, device=device)
            masters[name] = Master.of(parameter, of_all, partial(_cast, dtype))
            plain[name] = (name, dtype)
    for master in masters.values():
        master.leaf.requires_grad_()
    return Student(model, masters, layers, plain)


def _cast(dtype: torch.dtype, numbers: Tensor) -> Tensor:
    """Numbers as they come back from a dtype."""
    return numbers.to(dtype).float()
