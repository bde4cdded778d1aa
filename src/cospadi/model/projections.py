"""Which linear projections a model has, which of them read the same input, in which order they run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from cospadi import compat
from cospadi.errors import UserError
from cospadi.experts import all_beside, layer_name, stacked

ROUTERS = {"gate", "router", "shared_expert_gate"}
"""Names of the small projections that choose experts: never compressed (an MLP's own gate is `gate_proj`)."""

OTHER_SENSES = ("vision", "visual", "image", "audio")
"""Words in the names of blocks that do not read text."""

LINEAR = {"FalconLinear"}
"""Subclasses of `nn.Linear` whose forward pass is that of `nn.Linear` in other words."""


@dataclass(frozen=True)
class Projection:
    """One `nn.Linear` of a decoder block.

    Attributes:
        name: its module's name in the model.
        block: index of its decoder block.
        kind: its name inside the block, the same in every block.
        d1: in_features. d2: out_features (the weight in `nn.Linear` is (d2, d1)).
    """

    name: str
    block: int
    kind: str
    d1: int
    d2: int


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks and its name in the model: the longest `nn.ModuleList` of its text decoder that holds
    linear layers.

    Raises:
        UserError: there is none.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    inside = next((name for name, module in model.named_modules() if module is decoder), "")
    best: tuple[str, nn.ModuleList] | None = None
    for where in dict.fromkeys((inside, "")):  # some models' decoder is their head
        for name, module in model.get_submodule(where).named_modules(prefix=where):
            if (
                isinstance(module, nn.ModuleList)
                and (best is None or len(module) > len(best[1]))
                and any(hasattr(inner, "in_features") for inner in module.modules())  # compressed ones too
                and not (best is not None and name.startswith(best[0] + "."))
                and not any(word in name for word in OTHER_SENSES)
            ):
                best = name, module
        if best is not None:
            return best
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    longest: nn.Module = max(lists, key=len, default=nn.ModuleList())
    kinds = {type(one).__name__ for one in longest.modules() if getattr(one, "weight", torch.empty(0)).ndim == 2}
    instead = f"; its longest list holds {', '.join(sorted(kinds))}" if kinds else ""
    raise UserError(f"{type(model).__name__} has no list of decoder blocks with nn.Linear projections in it{instead}")


def find_projections(model: nn.Module) -> list[Projection]:
    """Every plain `nn.Linear` of the decoder blocks with weights of its own, in the order of definition, but for
    routers of experts; and each expert's part of stacked weights, as if it had been unstacked (`cospadi.experts`).

    Raises:
        UserError: one has no features at all.
    """
    prefix, blocks = decoder_blocks(model)
    shared = set(shared_weights(model))
    found = []
    for block, layer in enumerate(blocks):
        for kind, module in layer.named_modules():
            name = f"{prefix}.{block}.{kind}"
            if _is_plain(module) and not _is_router(kind) and name not in shared:
                found.append(Projection(name, block, kind, module.in_features, module.out_features))
            for leaf, (count, d1, d2) in stacked(module).items():
                for expert in range(count):
                    part = layer_name(leaf, expert)
                    found.append(Projection(f"{name}.{part}", block, f"{kind}.{part}", d1, d2))
    for projection in found:
        if min(projection.d1, projection.d2) < 1:
            raise UserError(f"{projection.name}, a projection of {projection.d1} x {projection.d2}, has no weights")
    return found


def _is_router(kind: str) -> bool:
    """Whether a projection of that kind chooses experts."""
    parts = kind.split(".")
    return parts[-1] in ROUTERS or "router" in parts


def _is_plain(module: nn.Module) -> bool:
    """Whether a module multiplies with its weight, and does nothing else but add its bias."""
    kind = type(module)
    return isinstance(module, nn.Linear) and (kind.forward is nn.Linear.forward or kind.__name__ in LINEAR)


def shared_weights(model: nn.Module) -> list[str]:
    """Names of linear layers in the decoder blocks whose weight is that of another module too."""
    prefix, blocks = decoder_blocks(model)
    tied = compat.tied_weights(model)
    named = tied.keys() | set(tied.values())
    return [
        f"{prefix}.{name}"
        for name, module in blocks.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and f"{prefix}.{name}.weight" in named
    ]


def select(
    projections: Sequence[Projection],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    target: Sequence[str] = (),
) -> list[Projection]:
    """The projections a recipe asks for.

    A projection is selected when it matches any `include` pattern (or none is given), no `exclude` pattern, and any
    `target` (or none is given). Patterns are globs over the whole name; a target `up` means a last name part `up` or
    `up_...`, so `up,gate` is up_proj and gate_proj.

    Raises:
        UserError: a pattern or target that matches nothing, or an empty selection.
    """

    def is_target(projection: Projection, word: str) -> bool:
        leaf = projection.kind.rpartition(".")[2]
        return leaf == word or leaf.startswith(word + "_")

    if not projections:
        raise UserError(
            "the decoder blocks have no plain nn.Linear projections with weights of their own; other layers are not "
            "compressed"
        )
    kinds = ", ".join(dict.fromkeys(projection.kind for projection in projections))
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(projection.name, pattern) for projection in projections):
                raise UserError(f"--{option} {pattern} matches no projection; there are {kinds} in each block")
    for word in target:
        if not any(is_target(projection, word) for projection in projections):
            raise UserError(f"--target {word} matches no projection; there are {kinds} in each block")
    selected = [
        projection
        for projection in projections
        if (not include or any(fnmatchcase(projection.name, pattern) for pattern in include))
        and not any(fnmatchcase(projection.name, pattern) for pattern in exclude)
        and (not target or any(is_target(projection, word) for word in target))
    ]
    if not selected:
        raise UserError(f"the selection leaves nothing to compress; there are {kinds} in each block")
    return selected


def running(projections: Sequence[Projection], owner: Mapping[str, str]) -> list[Projection]:
    """Those that run, by what `shared_inputs` found.

    Raises:
        UserError: none does.
    """
    found = [projection for projection in projections if projection.name in owner]
    if not found:
        raise UserError(f"none of {kinds_of([p.name for p in projections])} runs on text alone")
    return found


def what_stays_dense(model: nn.Module, idle: Sequence[Projection]) -> list[str]:
    """What no recipe compresses, in sentences without a stop; `idle` does not run on text."""
    parts = {
        "experts in a form of their own": dense_experts(model),
        "projections whose weights are used in several places": shared_weights(model),
        "projections that do not run on text alone": [projection.name for projection in idle],
    }
    return [f"{what} stay dense: {kinds_of(names)}" for what, names in parts.items() if names]


def dense_experts(model: nn.Module) -> list[str]:
    """Names of modules in the decoder blocks that hold experts in a form of their own, which stay dense."""
    prefix, blocks = decoder_blocks(model)
    return [
        f"{prefix}.{name}"
        for name, module in blocks.named_modules()
        if "expert" in f"{name}.{type(module).__name__}".lower()
        and any(leaf not in stacked(module) and p.ndim == 3 for leaf, p in module.named_parameters(recurse=False))
    ]


def kinds_of(names: Sequence[str]) -> str:
    """Module names with their numbers replaced by stars, each once: for messages."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))


def read_by_linear(args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Tensor:
    """What a linear layer that was called so reads."""
    return args[0] if args else kwargs["input"]


@torch.no_grad()
def shared_inputs(
    model: nn.Module, projections: Sequence[Projection], device: torch.device | None = None
) -> dict[str, str]:
    """Which projections run, and which of them read the same tensor, found by running the model once on four tokens.

    Args:
        device: where the model computes; None is where its parameters are.

    Returns:
        For each projection that ran, in running order: name -> name of the first projection that read its input. Those
        of experts that got no token, where one beside them did, come last, each reading its own.
    """
    owner_of: dict[str, str] = {}
    first_reader: dict[tuple[int, int | None], str] = {}
    alive: list[Tensor] = []  # keeps every input alive, so that no id is given twice

    def hook(name: str) -> Any:
        def before(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = read_by_linear(args, kwargs)
            alive.append(x)
            state = id(x), compat.version_of(x)  # one that changed in place is another
            owner_of[name] = first_reader.setdefault(state, name)

        return before

    modules = dict(model.named_modules())  # without experts that are stacked
    handles = [
        modules[p.name].register_forward_pre_hook(hook(p.name), with_kwargs=True)
        for p in projections
        if p.name in modules
    ]
    try:
        device = device or next(model.parameters()).device
        model(input_ids=torch.arange(4, device=device).unsqueeze(0), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    ran = set(map(all_beside, owner_of)) - {None}
    names = [projection.name for projection in projections if projection.name not in owner_of]
    return owner_of | {name: name for name in names if name not in modules or all_beside(name) in ran}
