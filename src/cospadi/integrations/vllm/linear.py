"""vLLM's linear layers, merged or cut for tensor parallel, over projections as the checkpoint stores them.

A layer of vLLM holds one or several projections (`qkv_proj` those of queries, keys and values), and a device holds some
outputs of each, or of a row-parallel layer some inputs. What is stored cannot be narrowed while it is read, since a
stream of bits has no rows: each projection is kept whole until all are there, then cut and packed again.

Of column-parallel layers S is cut by its columns, and D is whole. Of row-parallel ones S is cut by its rows where D is
the identity. Where D is stored, D is cut by its inputs and S is whole: y is the sum of the devices' (x D) S, which is
what vLLM adds up anyway, so that no byte more moves than in a dense layer. (To cut S, too, z would have to be added up
first.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.utils.torch_utils import set_default_torch_dtype

from cospadi.errors import CheckpointError, UserError
from cospadi.format.codecs.ec import EC
from cospadi.format.cut import cut
from cospadi.format.schema import SENTINEL, StoredProjection
from cospadi.integrations.vllm.config import CospadiConfig
from cospadi.runtime import op
from cospadi.runtime.levels import Levels, hold_levels

SHARDS = {"q": 0, "k": 1, "v": 2}
"""What vLLM calls the projections of a merged layer of attention; those of others have numbers."""


class Dense(nn.Module):
    """z -> z W^T, of W (outputs, inputs) in the model's dtype."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        return op.dense_matmul(z, self.weight)


class Packed(nn.Module):
    """z -> z S, straight from the stored form.

    Args:
        support, values: uint8, as stored.
        offsets: int32 (outputs + 1,), where each output's values begin.
        k: inputs.
        kind, codec: of support and values, by name.
    """

    support: Tensor
    values: Tensor
    offsets: Tensor

    def __init__(self, support: Tensor, values: Tensor, offsets: Tensor, k: int, kind: str, codec: str) -> None:
        super().__init__()
        for name, tensor in (("support", support), ("values", values), ("offsets", offsets)):
            self.register_buffer(name, tensor, persistent=False)
        self.k, self.kind, self.codec = k, kind, codec

    def forward(self, z: Tensor) -> Tensor:
        sizes = len(self.support), self.k
        return op.sparse_matmul(z, self.support, self.values, self.offsets, *sizes, self.kind, self.codec)


class Leveled(nn.Module):
    """z -> z S, of S as integers with steps."""

    def __init__(self, levels: Levels) -> None:
        super().__init__()
        for name, tensor in zip(Levels._fields, levels, strict=True):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        return op.level_matmul(z, Levels(*(getattr(self, name) for name in Levels._fields)))


@dataclass
class Part:
    """What a device holds of one projection of a layer.

    Attributes:
        name: of the projection.
        entry: what config.json says of it; None where it is dense.
        outputs: bool (d2,). inputs: bool (d1,). Those that the device has.
        tensors: what was loaded, by the last part of its name, on CPU, dictionaries not among it; of a dense one the
            weight, cut already.
    """

    name: str
    entry: StoredProjection | None
    outputs: Tensor
    inputs: Tensor
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def owner(self) -> str | None:
        """The projection whose dictionary it multiplies with; None where there is none."""
        entry = self.entry
        return entry.owner if entry is not None and entry.form.dictionary_kind.shape(entry.d1, entry.k) else None

    def own_tensors(self) -> dict[str, torch.dtype]:
        """Its tensors but a dictionary, by the last part of their names."""
        if self.entry is None:
            return {SENTINEL: torch.bfloat16}
        form, names = self.entry.form, self.entry.form.names
        found = {names.values: form.codec.dtype}
        return found if not form.support_kind.chosen else found | {names.support: torch.uint8}

    def take(self, leaf: str, loaded: Tensor) -> None:
        """Keep a tensor, in memory of its own."""
        if self.entry is None:
            loaded = loaded[self.outputs.to(loaded.device)][:, self.inputs.to(loaded.device)]
        self.tensors[leaf] = loaded.to("cpu", copy=True)

    def product(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """z -> y, of its part of the outputs, z being x, its part of x, or a product with the dictionary.

        Raises:
            CheckpointError: levels in a code are damaged.
        """
        if self.entry is None:
            return Dense(self.tensors[SENTINEL].to(device, dtype))
        entry, form = self.entry, self.entry.form
        support, values = self.tensors.get(form.names.support), self.tensors[form.names.values]
        atoms = self.inputs if self.owner is None else _all(entry.k)
        whole = bool(self.outputs.all() and atoms.all())
        like = torch.empty(0, dtype=dtype, device=device)
        if form.codec.coded and op.takes_levels(like):
            try:
                numbers, outputs, inputs = EC.decode_levels(values)
            except CheckpointError as error:
                raise CheckpointError(f"{self.name}: {error}") from None
            if not whole:
                numbers = numbers[self.outputs][:, atoms].contiguous()
                outputs, inputs = outputs[self.outputs], inputs[atoms]
            levels = hold_levels(*(part.to(device) for part in (numbers, outputs, inputs)))
            return Leveled(levels) if isinstance(levels, Levels) else Dense(levels.to(dtype))
        if support is not None and op.has_kernel(
            like, support.new_empty(0, device=device), values.new_empty(0, device=device), form.support, form.values
        ):
            if not whole:
                support, values = cut(entry, support, values, self.outputs, atoms)
            offsets = form.support_kind.offsets(support)
            assert offsets is not None
            packed = Packed(support, values, offsets, int(atoms.sum()), form.support, form.values)
            return packed.to(device)
        matrix = op.coefficients(support, values, None, entry.d2, entry.k, form.support, form.values, dtype)
        return Dense((matrix if whole else matrix[self.outputs][:, atoms]).contiguous().to(device))


class CospadiLinearMethod(LinearMethodBase):
    """Of one layer, which holds compressed projections and perhaps dense ones.

    Once its tensors are loaded, the layer has the modules `products`, for each dictionary that it reads, and `factors`,
    for each projection.

    Args:
        names: of its projections.
    """

    def __init__(self, config: CospadiConfig, names: Sequence[str]) -> None:
        self.config, self.names = config, names
        self.parts: list[Part] = []
        self.reads: list[int | None] = []
        """For each projection the product that it multiplies; None: x."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Give the layer parameters that have no size, and whose loaders keep what the checkpoint has.

        Raises:
            CheckpointError: the projections are not of the layer's sizes.
        """
        self.dtype = params_dtype
        outputs = _outputs_here(layer, output_partition_sizes)
        if len(self.names) == 1:  # stored merged as the layer is, or all there is
            outputs = [torch.cat(outputs)]
        inputs = _all(input_size)
        if isinstance(layer, RowParallelLinear):
            inputs = _some(input_size, input_size_per_partition, layer.tp_rank)
        sizes = dict(zip(self.names, outputs, strict=False))
        for name in self.names:
            entry = self.config.projections.get(name)
            fits = entry is None or (name in sizes and (entry.d1, entry.d2) == (input_size, len(sizes[name])))
            if len(self.names) != len(outputs) or not fits:
                shape = f"{entry.d1} x {entry.d2}" if entry else "its size"
                raise CheckpointError(f"config.json: {layer.prefix} in vLLM has no linear layer {name} of {shape}")
            self.parts.append(Part(name, entry, sizes[name], inputs))
        dtypes = {SENTINEL: torch.bfloat16}
        for part in self.parts:
            dtypes |= part.own_tensors()
            if part.entry is not None and part.owner == part.name:
                dtypes[part.entry.form.names.dictionary] = part.entry.form.dictionary_kind.dtype
        self.leaves = list(dtypes)
        for leaf, dtype in dtypes.items():
            parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            parameter.weight_loader = partial(self._take, leaf)  # type: ignore[attr-defined]
            layer.register_parameter(leaf, parameter)

    def _take(self, leaf: str, _: Tensor, loaded: Tensor, shard: str | int | None = None) -> None:
        """What vLLM calls with each tensor of the checkpoint."""
        part = self.parts[SHARDS.get(shard, shard) if shard is not None else 0]  # type: ignore[arg-type]
        if part.entry is not None and leaf == SENTINEL:
            return
        if part.entry is not None and leaf == part.entry.form.names.dictionary:
            self.config.dictionaries[part.name] = loaded.to("cpu", copy=True)
        else:
            part.take(leaf, loaded)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Replace what was loaded by what is multiplied with.

        Raises:
            UserError: a tensor was not among the weights that vLLM read, or is damaged.
        """
        device = layer.get_parameter(SENTINEL).device
        for part in self.parts:
            missing = [leaf for leaf in part.own_tensors() if leaf not in part.tensors]
            if missing:
                raise CheckpointError(
                    f"tensor {part.name}.{missing[0]} is in none of the files that vLLM read (with --load-format dummy "
                    "it reads none, which a compressed model needs)"
                )
        owners = list(dict.fromkeys(part.owner for part in self.parts if part.owner is not None))
        layer.products = nn.ModuleList(Dense(self._dictionary(owner, device)) for owner in owners)
        with set_default_torch_dtype(torch.float32):  # which is the model's here
            layer.factors = nn.ModuleList(part.product(self.dtype, device) for part in self.parts)
        self.reads = [None if part.owner is None else owners.index(part.owner) for part in self.parts]
        for leaf in self.leaves:
            if leaf != SENTINEL:  # which tells adapters the layer's device
                delattr(layer, leaf)
        self.parts = []

    def _dictionary(self, owner: str, device: torch.device) -> Tensor:
        """The inputs of a dictionary that this device has, (k, inputs): one tensor for all layers that read it so."""
        inputs, config = self.parts[0].inputs, self.config
        if owner not in config.dictionaries:
            raise UserError(
                f"{self.names[0]} shares the dictionary of {owner}, which is in another stage of the pipeline. Use "
                "tensor parallel in place of pipeline parallel"
            )
        known = owner, bool(inputs.all())
        if known not in config.placed:
            config.placed[known] = config.dictionaries[owner][:, inputs].to(device, self.dtype)
        return config.placed[known]

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., inputs here) -> (..., outputs here)."""
        products = [product(x) for product in layer.products]
        parts = [
            factor(x if read is None else products[read])
            for factor, read in zip(layer.factors, self.reads, strict=True)
        ]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return y if bias is None else y + bias


def _outputs_here(layer: Any, sizes: Sequence[int]) -> list[Tensor]:
    """Of each projection that a layer merges, which of its outputs this device has: bool (d2,).

    Args:
        sizes: how many it has of each.
    """
    if not isinstance(layer, ColumnParallelLinear):
        return [_all(size) for size in sizes]
    if isinstance(layer, QKVParallelLinear):
        kv_heads, kv_rank = layer.total_num_kv_heads, layer.tp_rank // layer.num_kv_head_replicas
        heads = layer.total_num_heads * layer.head_size
        alls = [heads, kv_heads * layer.head_size, kv_heads * layer.v_head_size]
        ranks = [layer.tp_rank, kv_rank, kv_rank]
    else:
        alls = getattr(layer, "output_sizes", [layer.output_size])
        ranks = [layer.tp_rank] * len(alls)
    return [_some(*each) for each in zip(alls, sizes, ranks, strict=True)]


def _all(count: int) -> Tensor:
    """bool (count,), set. On CPU, while vLLM makes layers' own tensors on their device."""
    return torch.ones(count, dtype=torch.bool, device="cpu")


def _some(count: int, size: int, rank: int) -> Tensor:
    """bool (count,), set for the part of this size that a rank has."""
    some = torch.zeros(count, dtype=torch.bool, device="cpu")
    some[rank * size : (rank + 1) * size] = True
    return some
