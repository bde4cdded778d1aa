"""A model of random weights in a real model's shape, dense and compressed at equal bytes: enough to measure speed.

    python benchmarks/random_model.py Llama-3.2-1B OUT --ratio 0.4 --bits 3

writes OUT/dense, OUT/sparse-0.4 (the default, D = I), OUT/stored-0.4 (mod-htp, dictionaries shared by what reads the
same) and OUT/low-rank-0.4, and OUT/coded-3 (levels in a code). Perplexity of such a model means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from cospadi.budget import accounting
from cospadi.budget.plan import Group, outlook
from cospadi.format import packing, rans
from cospadi.format.codecs.ec import EC, block_rows
from cospadi.format.schema import StoredProjection
from cospadi.model.projections import Projection
from cospadi.recipe import Recipe
from cospadi.runtime.layer import CompressedLinear
from cospadi.runtime.swap import mark_compressed, swap_in_layers

app = typer.Typer(add_completion=False)

KINDS = {"sparse": "sparse", "stored": "mod-htp", "low-rank": "svd-llm"}
"""What is written of a ratio, and the method whose form it has."""

LLAMA_3 = {
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
}
CONFIGS: dict[str, PretrainedConfig] = {
    "tiny": LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, max_position_embeddings=1024,
    ),
    "Llama-3.2-1B": LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        head_dim=64, tie_word_embeddings=True, **LLAMA_3,
    ),
    "Llama-3-8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, **LLAMA_3,
    ),
    "Qwen3-8B": Qwen3Config(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=40960,
    ),
}  # fmt: skip


@app.command()
def main(
    shape: Annotated[str, typer.Argument(help=", ".join(CONFIGS))],
    output: Annotated[Path, typer.Argument(metavar="OUT")],
    ratio: Annotated[list[float] | None, typer.Option(help="repeatable  [default: 0.4 without bits]")] = None,
    bits: Annotated[list[float] | None, typer.Option(help="of levels in a code, a weight; repeatable")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="of a ratio, repeatable  [default: all]")] = None,
    layers: Annotated[int | None, typer.Option(help="decoder blocks, if not all")] = None,
    value_bits: int = 14,
) -> None:
    """Write the folders that are not there yet."""
    if shape not in CONFIGS:
        raise typer.BadParameter(f"{shape} is not known. Use {', '.join(CONFIGS)}")
    for one in ratio or []:
        if not 0 < one < 1:
            raise typer.BadParameter(f"--ratio {one:g} is not between 0 and 1")
    for one in bits or []:
        if not 1 <= one < 16:
            raise typer.BadParameter(f"--bits {one:g} is not between 1 and 16")
    for one_kind in kind or []:
        if one_kind not in KINDS:
            raise typer.BadParameter(f"--kind {one_kind} is not known. Use {', '.join(KINDS)}")
    config: Any = CONFIGS[shape]
    if layers is not None:
        config.num_hidden_layers = layers
        config.layer_types = None
    dense = output / "dense"
    if not dense.exists():
        model = _empty(config)
        _fill(model)
        model.save_pretrained(dense)
        del model
    wanted: dict[str, dict[str, Any]] = {
        f"{name}-{one:g}": {"ratio": one, "method": KINDS[name], "value_bits": value_bits}
        for one in ratio or ([] if bits else [0.4])
        for name in kind or KINDS
    }
    for name, fields in (wanted | {f"coded-{one:g}": {"bits": one} for one in bits or []}).items():
        if (output / name).exists():
            continue
        plan = outlook(dense, Recipe.build(fields | {"allocate": "uniform"})).plan
        model = _empty(config)
        codes = {member.name: code for group in plan.groups for member, code in _codes(group)}
        entries = {member: entry for group in plan.groups for member, entry in _entries(group, codes).items()}
        swap_in_layers(model, entries, torch.bfloat16, "meta")
        _fill(model)
        for member, code in codes.items():
            model.get_submodule(member).codes.copy_(code)
        mark_compressed(model, entries)
        model.save_pretrained(output / name)
        del model
        taken = sum(map(len, codes.values())) or plan.bytes  # random codes are not to the byte
        print(f"{output / name}: ratio {1 - taken / plan.dense_bytes:.4f}", flush=True)


def _empty(config: PretrainedConfig) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def _codes(group: Group) -> Iterator[tuple[Projection, Tensor]]:
    """Each member and levels in a code of about its bytes."""
    if not group.stored.codec.coded:
        return
    bits = 8 * group.parts.total / sum(group.d1 * member.d2 for member in group.members)
    deviation = 2 ** (bits + 1) / math.sqrt(2 * math.pi * math.e)  # of a Gaussian whose halves have this entropy
    for member in group.members:
        generator = torch.Generator().manual_seed(0)
        symbols = (deviation / 2 * torch.randn(member.d2, member.d1, generator=generator)).round().to(torch.int16)
        levels = rans.levels_of(symbols, block_rows(member.d2, member.d1))
        zeros = [torch.zeros(size, dtype=torch.int16) for size in (member.d2, member.d1)]
        widths = torch.full_like(zeros[1], round(4 * math.log2(deviation)))
        yield member, EC.encode_levels(levels, 0.02 / deviation, zeros[0], zeros[1], zeros[0], widths)


def _entries(group: Group, codes: Mapping[str, Tensor]) -> dict[str, StoredProjection]:
    """What a checkpoint would say of a group; every member has its part of the nonzeros."""
    form = group.stored
    shared = form.dictionary_kind.shape(group.d1, group.k) is not None
    spent, entries = 0, {}
    for index, member in enumerate(group.members):
        last = index == len(group.members) - 1
        nnz = (
            group.nonzeros - spent
            if last
            else round(group.s * member.d2) // accounting.VALUE_UNIT * accounting.VALUE_UNIT
        )
        spent += nnz
        entries[member.name] = StoredProjection(
            dictionary=form.dictionary,
            support=form.support,
            values=form.values,
            d1=member.d1,
            d2=member.d2,
            k=group.k,
            nnz=nnz if form.support_kind.chosen else 0,
            owner=group.members[0].name if shared else member.name,
            nbytes=len(codes.get(member.name, ())),
        )
    return entries


def _fill(model: Any) -> None:
    """Random numbers of a trained model's size, on CPU; supports uniform over the matrix."""
    model.to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
            else:
                parameter.normal_(0, 0.02, generator=generator)
        for module in model.modules():
            if isinstance(module, CompressedLinear) and module.form.support_kind.chosen:
                _fill_coefficients(module, generator)


def _fill_coefficients(layer: CompressedLinear, generator: torch.Generator) -> None:
    size = layer.out_features * layer.k
    drawn = torch.rand(size, generator=generator)
    threshold = drawn.kthvalue(layer.nnz).values if layer.nnz < size else 1.0
    support = (drawn <= threshold).view(layer.out_features, layer.k)
    exact = int(support.sum())
    if exact > layer.nnz:  # equal draws at the threshold
        extra = (drawn.view_as(support) == threshold).nonzero()[: exact - layer.nnz]
        support[extra[:, 0], extra[:, 1]] = False
    assert layer.support is not None
    layer.support.copy_(packing.pack_support(support))
    layer.codes.copy_(layer.form.numbers.encode(torch.randn(layer.nnz, generator=generator) * 0.1))


if __name__ == "__main__":
    app()
