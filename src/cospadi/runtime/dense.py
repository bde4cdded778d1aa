"""Weights as they are stored where the processor reads them fastest: in large pages, dense ones by a kernel too."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cospadi.runtime import cpu, op
from cospadi.runtime.pages import moved, release


class DenseLinear(nn.Linear):
    """A linear layer that was left dense, most often the one that gives the logits: a few rows are multiplied by the
    library's kernel, which reads the weight faster than torch does."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        return op.dense_matmul(x, self.weight) if self.bias is None else super().forward(x)


def read_fast(model: nn.Module) -> None:
    """Have dense layers without a bias multiply a few rows by the kernel, where there is one for their weights."""
    for module in model.modules():
        if type(module) is nn.Linear and module.bias is None:
            weight = module.weight
            if cpu.can_multiply_dense(weight[:1], weight):
                module.__class__ = DenseLinear


def move_weights(module: nn.Module, done: set[nn.Parameter], files: list[range]) -> None:
    """Put what a module has just read into memory of its own, large tensors into large pages, so that the files need
    not stay mapped; not what is in modules within it.

    Args:
        done: parameters that were moved, of the whole model, which modules may share.
        files: where files are mapped (`pages.mapped_files`), whose pages leave memory at once.
    """

    def own(tensor: Tensor) -> Tensor:
        copy = moved(tensor)
        if copy is tensor:
            return tensor.clone()
        release(tensor, files)
        return copy

    with torch.no_grad():
        for parameter in module.parameters(recurse=False):
            if parameter.is_cpu and parameter not in done:
                done.add(parameter)
                parameter.data = own(parameter.data)
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_cpu:
                setattr(module, name, own(buffer))  # given other data, a view would keep what it is a view of
