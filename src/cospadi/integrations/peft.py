"""LoRA on compressed layers.

Imported where `peft` is imported already: when a compressed model is loaded, and when PEFT asks one for its config.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import Linear
from torch import nn

from cospadi import compat
from cospadi.errors import UserError
from cospadi.experts import parameter_of
from cospadi.runtime.layer import CompressedLinear

KEEPS_THE_WEIGHT = (True, False, "gaussian", "eva", "orthogonal")
"""The `init_lora_weights` that leave the layer under an adapter as it is."""


class CompressedLoraLinear(Linear):
    """PEFT's LoRA of `nn.Linear` on a compressed layer, y = layer(x) + scale B A x, of which A and B are trained.

    Raises:
        UserError: an initialisation that rewrites the layer's weight; the same of merging, as long as the layer is
            compressed.
    """

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features  # type: ignore[return-value]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        if isinstance(base_layer, CompressedLinear):  # without its dense weight
            return base_layer.device, base_layer.dtype
        return super()._get_base_layer_device_and_dtype(base_layer)  # type: ignore[no-any-return]

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """Plain LoRA, and DoRA, which reads the weight and does not write to it."""
        return {names: variant for names, variant in super().lora_variants.items() if names in ((), ("use_dora",))}

    def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
        if config.init_lora_weights not in KEEPS_THE_WEIGHT:
            known = ", ".join(map(str, KEEPS_THE_WEIGHT))
            raise UserError(
                f"init_lora_weights {config.init_lora_weights!r} rewrites the weight under an adapter, and the values "
                f"of a compressed layer cannot take it. Use one of {known}"
            )
        super().update_layer(adapter_name, *args, config=config, **kwargs)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        refuse_to_merge(self)
        super().merge(*args, **kwargs)


def refuse_to_merge(model: nn.Module) -> None:
    """
    Raises:
        UserError: adapters of the model stand on compressed layers.
    """
    for module in model.modules():
        if isinstance(module, CompressedLoraLinear) and isinstance(module.get_base_layer(), CompressedLinear):
            raise UserError(
                "an adapter cannot be merged into the stored values of compressed layers, which would no longer fit "
                "their bits. Keep the adapter beside the model, or make the layers dense first: "
                "peft_model.get_base_model().dequantize(), then peft_model.merge_and_unload()"
            )


# "all-linear" leaves experts out, as PEFT does where they are one parameter; their names end in numbers, as blocks' do.
compat.attach_lora(
    CompressedLinear, CompressedLoraLinear, refuse_to_merge, left_out=lambda name: parameter_of(name) is not None
)
