"""Mixtures of experts, whose weights transformers stacks in one parameter: each expert gets linear layers of its own.

A module of experts has parameters (experts, out, in), or (experts, in, out) where `is_transposed`. Here each becomes a
`Stack` in the module `separate`, layer e of which holds weight e, so that experts are projections like any other:
found, calibrated with the tokens that they see, solved, stored and loaded by the name
`...experts.separate.down_proj.3`. (Names that begin as those of the parameters would be taken for them where
transformers converts older checkpoints.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cospadi import compat

IMPLEMENTATION = "cospadi"
"""The name of `forward` among transformers' implementations of experts."""


BATCHED = {"Llama4TextExperts"}
"""Classes of experts that multiply with `torch.bmm`, all tokens with all experts, stacked (experts, d1, d2)."""

SEPARATE = "separate"
"""The module that holds the stacks of a module of experts."""

LAYER = re.compile(rf"(.+)\.{SEPARATE}\.(\w+)\.\d+(\.\w+)?")
"""The name of an expert's layer, or of one of its tensors."""


EXPERT = re.compile(rf"(experts(?:\.{SEPARATE}\.\w+)?)\.\d+")
"""The number of an expert, in the name of a layer of a stack or of a list of experts."""


class Slice(NamedTuple):
    """Where in a stacked parameter of the model a layer's weight lies."""

    parameter: str
    expert: int
    transposed: bool

    def of(self, weights: Any) -> Tensor:
        """The weight (out, in) of stacked weights, a tensor or what reads from one."""
        weight: Tensor = weights[self.expert]
        return weight.T if self.transposed else weight


class Stack(nn.Module):
    """The linear layers of a projection of all experts, children "0", "1", ...

    Attributes:
        shape: of the parameter (experts, d1, d2) that it stands for in `torch.bmm`.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def __getitem__(self, expert: int) -> nn.Module:
        return self.get_submodule(str(expert))

    @classmethod
    def __torch_function__(cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        """`torch.bmm` of inputs (experts, tokens, d1) with a stack, as Llama 4 calls it."""
        if function is not torch.bmm or kwargs or isinstance(args[0], cls):
            raise TypeError(f"layers of experts do not stand for a parameter in {function.__name__}")
        inputs, stack = args
        return torch.stack([stack[expert](each) for expert, each in enumerate(inputs)])


def stacked(module: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Of a module of experts as transformers makes them: name of a stacked parameter -> experts, d1, d2; of any other
    module nothing."""
    if not (_is_dispatched(module) or type(module).__name__ in BATCHED):
        return {}
    found = {}
    for name in _names(module):
        parameter = getattr(module, name, None)
        if isinstance(parameter, Tensor) and parameter.ndim == 3:
            count, *sizes = parameter.shape
            d1, d2 = sizes if _is_transposed(module) else reversed(sizes)
            found[name] = count, d1, d2
    return found


def unstack(model: nn.Module, named: Iterable[str] | None = None) -> dict[str, Slice]:
    """Give experts layers of their own, and have them run through these.

    Args:
        named: names of tensors or layers; only modules of experts that have some of these are changed. None: all.

    Returns:
        Name of a layer's weight -> where it lay.
    """
    wanted = None if named is None else set(map(parameter_of, named))
    slices: dict[str, Slice] = {}
    for path, module in list(model.named_modules()):
        parts = stacked(module)
        if not parts or (wanted is not None and wanted.isdisjoint(f"{path}.{leaf}" for leaf in parts)):
            continue
        separate = nn.Module()
        for leaf, (count, d1, d2) in parts.items():
            weights, stack = getattr(module, leaf), Stack((count, d1, d2))
            for expert in range(count):
                where = Slice(f"{path}.{leaf}", expert, _is_transposed(module))
                layer = nn.Linear(d1, d2, bias=False, device="meta")
                with torch.no_grad():  # a copy, so that nothing keeps the stack
                    weight = where.of(weights).clone(memory_format=torch.contiguous_format)
                layer.weight = nn.Parameter(weight, weights.requires_grad)
                stack.add_module(str(expert), layer)
                slices[f"{path}.{layer_name(leaf, expert)}.weight"] = where
            delattr(module, leaf)
            separate.add_module(leaf, stack)
            vars(module)[leaf] = stack  # by the name that the module's own code knows
        module.add_module(SEPARATE, separate.train(module.training))
        if _is_dispatched(module):
            _dispatch(module)
    return slices


def restack(model: nn.Module) -> None:
    """Give experts the stacked parameters back. All of their layers are ordinary ones."""
    for module in list(model.modules()):
        separate = getattr(module, SEPARATE, None)
        if not isinstance(separate, nn.Module) or not all(isinstance(one, Stack) for one in separate.children()):
            continue
        for leaf, stack in separate.named_children():
            weights = torch.stack([layer.get_parameter("weight").detach() for layer in stack.children()])
            del vars(module)[leaf]
            weights = weights.mT.contiguous() if _is_transposed(module) else weights
            module.register_parameter(leaf, nn.Parameter(weights))
        delattr(module, SEPARATE)
        if _is_dispatched(module):
            compat.experts_implementation(module, "eager")


def is_adapted(module: nn.Module) -> bool:
    """Whether something was put around a layer of a stack."""
    return isinstance(module, Stack) and any(hasattr(layer, "base_layer") for layer in module.children())


def layer_name(parameter: str, expert: int) -> str:
    """The name in a module of experts of the layer that holds an expert's part of a stacked parameter."""
    return f"{SEPARATE}.{parameter}.{expert}"


def all_beside(name: str) -> str | None:
    """What the names of a projection of all experts of a module have in common, by the name of one's; None for what is
    no expert's."""
    return EXPERT.sub(r"\1.*", name) if EXPERT.search(name) else None


def parameter_of(name: str) -> str | None:
    """The stacked parameter of which an expert's layer holds a part, by the name of the layer or of one of its tensors;
    None for any other name."""
    found = LAYER.fullmatch(name)
    return found and f"{found[1]}.{found[2]}"


def _is_dispatched(module: Any) -> bool:
    """Whether transformers lets somebody else compute what a module of experts does (`use_experts_implementation`)."""
    return hasattr(module, "is_transposed") and compat.gate_of(module) is not None


def _is_transposed(module: Any) -> bool:
    return bool(getattr(module, "is_transposed", True))


def _names(module: Any) -> tuple[str, str]:
    """The names of the first and the second projection of experts."""
    return ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"), "down_proj"


def _dispatch(module: Any) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)
    compat.experts_implementation(module, IMPLEMENTATION)


def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What a module of experts computes: hidden states (tokens, width), each through the experts (tokens, chosen) that
    the router chose, times their weights (tokens, chosen), added up."""
    first, second = _names(self)
    gate = compat.gate_of(self) if self.has_gate else self.act_fn
    assert gate is not None
    result = torch.zeros_like(hidden_states)
    for expert in torch.unique(top_k_index).tolist():
        if expert >= self.num_experts:  # stands for none
            continue
        tokens, places = torch.where(top_k_index == expert)
        inner = getattr(self, first)[expert](hidden_states[tokens])
        inner = inner + getattr(self, f"{first}_bias")[expert] if self.has_bias else inner
        outer = getattr(self, second)[expert](gate(inner))
        outer = outer + getattr(self, f"{second}_bias")[expert] if self.has_bias else outer
        outer = outer * top_k_weights[tokens, places, None]
        result.index_add_(0, tokens, outer.to(result.dtype))  # no token twice: the same sums in the same order
    return result
