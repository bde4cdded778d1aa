"""What vLLM asks of a `quantization_config`: whether the checkpoint can be used, and who multiplies which layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from cospadi.errors import UserError
from cospadi.format import schema
from cospadi.format.schema import StoredProjection
from cospadi.model import load


class CospadiConfig(QuantizationConfig):
    """The compressed projections of a model, by the names that vLLM's modules have.

    Attributes:
        projections: name -> entry; owners are named likewise.
        dictionaries: owner -> its dictionary as stored, bf16 (k, d1), once it is loaded. Projections of several layers
            may share one.
        placed: the owner of one, and whether all inputs of it are there -> what layers multiply with.
    """

    def __init__(self, projections: Mapping[str, StoredProjection]) -> None:
        super().__init__()
        self.projections = dict(projections)
        self.dictionaries: dict[str, Tensor] = {}
        self.placed: dict[tuple[str, bool], Tensor] = {}

    @classmethod
    def get_name(cls) -> str:
        return schema.QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> CospadiConfig:
        """
        Raises:
            CheckpointError: another format version, or malformed entries.
        """
        version = schema.check_version(config.get("format_version"), "config.json")
        schema.check_fields(config)
        return cls(schema.parse_projections(config.get("projections", {}), version))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Refuse a damaged checkpoint as transformers would, before there are workers. (One of the hub is downloaded.)

        Raises:
            UserError: it cannot be loaded. CheckpointError: it is damaged.
        """
        load.check_compressed(load.resolve(model_name, revision))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Call the projections as vLLM calls their modules."""
        names = {name: hf_to_vllm_mapper.map_name(name) or name for name in self.projections}
        self.projections = {
            names[name]: entry.model_copy(update={"owner": names[entry.owner]})
            for name, entry in self.projections.items()
        }

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """
        Raises:
            UserError: a layer of this kind cannot be compressed in vLLM.
        """
        # Layers import much of vLLM, which a process that only reads configurations does without.
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        if isinstance(layer, LinearBase):
            from cospadi.integrations.vllm.linear import CospadiLinearMethod

            names = self._members(prefix)
            if any(name in self.projections for name in names):
                return CospadiLinearMethod(self, names)
            return UnquantizedLinearMethod()
        if isinstance(layer, RoutedExperts) and any(name.startswith(f"{prefix}.") for name in self.projections):
            from cospadi.integrations.vllm.experts import DenseExpertsMethod, ExpertsLoader

            return DenseExpertsMethod(ExpertsLoader(self, layer, prefix))
        if prefix in self.projections:
            raise UserError(f"{prefix} is compressed, and {type(layer).__name__} in vLLM takes a dense one only")
        return None

    def _members(self, prefix: str) -> list[str]:
        """The projections that a layer of vLLM holds: model.layers.0.mlp.gate_up_proj -> its gate_proj and up_proj."""
        path, _, leaf = prefix.rpartition(".")
        members = self.packed_modules_mapping.get(leaf, [leaf])
        return [f"{path}.{member}" if path else member for member in members]
