"""Serving with vLLM: what its plugin group `vllm.general_plugins` calls in every process."""

from __future__ import annotations


def register() -> None:
    """Have vLLM know `quant_method: cospadi`. Calling it again changes nothing."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from cospadi.format.schema import QUANT_METHOD
    from cospadi.integrations.vllm.config import CospadiConfig

    register_quantization_config(QUANT_METHOD)(CospadiConfig)
