"""Where tensors wait that are too many for memory: in RAM up to a limit, in files beyond it."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass
class Spilled:
    """A tensor in a spill: itself, or the file that holds it."""

    nbytes: int
    tensor: Tensor | None
    path: Path | None


class Spill:
    """Keeps tensors until they are dropped, in memory as long as there is room.

    Args:
        limit: bytes kept in memory; what comes after them goes to files.
        folder: for the files; None makes one when it is needed. It is removed by `close`.
    """

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        self.limit, self.used = limit, 0
        self._folder = folder
        self._files = 0

    def put(self, tensor: Tensor) -> Spilled:
        """Keep a tensor, on the CPU."""
        nbytes = tensor.numel() * tensor.element_size()
        if self.used + nbytes <= self.limit:
            self.used += nbytes
            return Spilled(nbytes, tensor.detach().cpu(), None)
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="cospadi-"))
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{self._files}.safetensors"
        self._files += 1
        save_file({"tensor": tensor.detach().cpu().contiguous()}, path)
        return Spilled(nbytes, None, path)

    def get(self, item: Spilled, device: torch.device) -> Tensor:
        """The tensor, on a device."""
        if item.tensor is not None:
            return item.tensor.to(device)
        assert item.path is not None
        with safe_open(item.path, framework="pt") as file:
            tensor: Tensor = file.get_tensor("tensor").to(device, copy=True)
        return tensor

    def drop(self, item: Spilled) -> None:
        """Keep a tensor no longer."""
        if item.path is not None:
            item.path.unlink(missing_ok=True)
        elif item.tensor is not None:
            self.used -= item.nbytes
        item.tensor = item.path = None

    def close(self) -> None:
        """Remove the files."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
