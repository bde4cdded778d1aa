"""Compressed experts in vLLM: decoded while they are loaded, since its kernels multiply stacks of dense weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.utils.torch_utils import set_default_torch_dtype

from cospadi.errors import CheckpointError, UserError
from cospadi.experts import SEPARATE
from cospadi.format.schema import SENTINEL
from cospadi.integrations.vllm.config import CospadiConfig
from cospadi.runtime.swap import build_layer

STACKS = {"gate_up_proj", "down_proj"}
"""The stacked parameters whose experts vLLM knows by names of their own."""


class ExpertsLoader:
    """Loads a layer of experts, some of which are compressed.

    Args:
        layer: vLLM's layer of all experts.
        prefix: its name, under which the projections of the experts are.

    Raises:
        UserError: experts of a kind that is not known here.
    """

    def __init__(self, config: CospadiConfig, layer: Any, prefix: str) -> None:
        self.config, self.layer, self.prefix = config, layer, prefix
        self.tensors: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self.load_dense = layer.load_weights
        for name in (name for name in config.projections if name.startswith(f"{prefix}.")):
            stack = name.removeprefix(f"{prefix}.").split(".")[:2]
            if layer.is_fused_checkpoint_transposed or (stack[0] == SEPARATE and stack[1] not in STACKS):
                raise UserError(
                    f"{name} is an expert of a kind that this cospadi cannot load in vLLM. Use transformers"
                )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[str]:
        """In place of the layer's: names within it and tensors, as stored."""
        found: Iterable[str] = self.load_dense(self._dense(weights))
        return found

    def _dense(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same with dense weights, (d2, d1), in place of all tensors of a compressed projection."""
        for inner, tensor in weights:
            name, _, leaf = f"{self.prefix}.{inner}".rpartition(".")
            entry = self.config.projections.get(name)
            if entry is None:
                yield from self._named(name, tensor) if leaf == SENTINEL else [(inner, tensor)]
                continue
            if leaf == entry.form.names.dictionary:
                self.config.dictionaries[name] = tensor.to("cpu", copy=True)
            elif leaf != SENTINEL:
                self.tensors[name][leaf] = tensor.to("cpu", copy=True)
            for ready in [name for name in self.tensors if self._is_whole(name)]:
                yield from self._named(ready, self._decoded(ready))

    def _is_whole(self, name: str) -> bool:
        entry = self.config.projections[name]
        own = {tensor.rpartition(".")[2] for tensor in entry.tensors(name)} - {entry.form.names.dictionary}
        stored = entry.form.dictionary_kind.shape(entry.d1, entry.k) is not None
        return own <= self.tensors[name].keys() and (not stored or entry.owner in self.config.dictionaries)

    def _decoded(self, name: str) -> Tensor:
        """W (d2, d1), float32."""
        entry = self.config.projections[name]
        tensors = self.tensors.pop(name)
        if entry.owner in self.config.dictionaries:
            tensors[entry.form.names.dictionary] = self.config.dictionaries[entry.owner]
        with set_default_torch_dtype(torch.float32):  # which is the model's here
            layer = build_layer(entry, torch.float32, "cpu")
            layer.load_state_dict(tensors)
            return layer.dense_weight()

    def _named(self, name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        """A dense weight of one expert, by the names that vLLM's layer knows."""
        inner = name.removeprefix(f"{self.prefix}.")
        if not inner.startswith(f"{SEPARATE}."):
            yield f"{inner}.{SENTINEL}", weight
            return
        _, stack, expert = inner.split(".")
        known = [self.layer.ckpt_down_proj_name]
        if stack != "down_proj":
            known = [self.layer.ckpt_gate_proj_name, self.layer.ckpt_up_proj_name]
        for leaf, part in zip(known, weight.chunk(len(known)), strict=True):
            yield f"{expert}.{leaf}.{SENTINEL}", part


class DenseExpertsMethod(UnquantizedFusedMoEMethod):
    """vLLM's own for dense experts, of a layer that takes compressed ones, too."""

    def __init__(self, loader: ExpertsLoader) -> None:
        super().__init__(loader.layer.moe_config)
        self.loader = loader
        loader.layer.load_weights = loader.load_weights

    def process_weights_after_loading(self, layer: Any) -> None:
        """
        Raises:
            CheckpointError: tensors of an expert were not among the weights that vLLM read.
        """
        if self.loader.tensors:
            name = next(iter(self.loader.tensors))
            raise CheckpointError(f"not all tensors of {name} are in the files that vLLM read")
        super().process_weights_after_loading(layer)
