"""What modules read, looked at from outside."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def inputs_of(model: nn.Module, name: str, tokens: Tensor) -> Tensor:
    """What a module reads when the whole model runs, float64 (tokens, width)."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    handle.remove()
    return seen[0].flatten(0, -2).double()
