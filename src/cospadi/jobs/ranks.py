"""Several processes of one program, as `accelerate launch` starts them; or one, without anything between them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among `count` of them.

    Attributes:
        rank: its number; 0 is the one that reads and writes the job directory.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def agreed(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        found: list[Any] = broadcast_object_list([value])
        return found[0]

    def gathered(self, values: list[Any]) -> list[Any]:
        """All processes' values, in the order of their ranks."""
        if self.count == 1:
            return values
        from accelerate.utils import gather_object

        found: list[Any] = gather_object(values)
        return found

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors."""
        if self.count == 1:
            return tensor
        from accelerate.utils import reduce

        found: Tensor = reduce(tensor, reduction="sum")
        return found


def ranks(device: torch.device) -> tuple[Ranks, torch.device]:
    """This process among those that `accelerate launch` has started, and its device: of several processes each its own;
    of one the device that is given."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks(), device
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu")
    return Ranks(state.process_index, state.num_processes), state.device


def is_first() -> bool:
    """Whether this process is the one that tells what all of them have done."""
    return int(os.environ.get("RANK", "0")) == 0
