"""Models whose projections have any form, with random factors, beside the dense ones that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from codes import random_code
from torch import Tensor
from transformers import AutoModelForCausalLM

from cospadi.format.form import Form
from cospadi.format.schema import StoredProjection
from cospadi.model.projections import find_projections
from cospadi.runtime.swap import mark_compressed, swap_in_layers

K = 13
"""Atoms of a stored dictionary."""


def random_part(
    form: Form, d2: int, k: int, generator: torch.Generator, scale: float = 1.0
) -> tuple[dict[str, Tensor], Tensor, int]:
    """Tensors of a random S as they are stored, S transposed in float64 as rounded, and its number of values."""
    kind, codec = form.support_kind, form.codec
    if codec.levels:
        stored = (
            random_code(d2, k, generator, scale) if codec.coded else random_integers(codec, d2, k, generator, scale)
        )
        return {form.names.values: stored}, codec.decode(stored, [d2, k]).double(), d2 * k
    dense = scale * torch.randn(d2, k, generator=generator)
    chosen = torch.rand(d2, k, generator=generator) < 0.4 if kind.chosen else None
    values = kind.gather(chosen, dense)
    support, stored = kind.pack(chosen), codec.encode(values)
    tensors = {form.names.values: stored} | ({} if support is None else {form.names.support: support})
    rounded = codec.decode(codec.encode(dense.flatten()), [d2, k]).double()
    return tensors, rounded if chosen is None else rounded * chosen, values.numel()


def random_integers(codec: Any, d2: int, k: int, generator: torch.Generator, scale: float) -> Tensor:
    """Levels, scales and zeros, as they are stored, that stand for numbers of about a scale."""
    most, groups = 2**codec.bits - 1, codec.groups(k)
    levels = torch.randint(0, most + 1, (d2, k), generator=generator)
    zeros = torch.randint(most // 2, most // 2 + 2, (d2, groups), generator=generator)
    scales = 4 * scale / most * (0.5 + torch.rand(d2, groups, generator=generator))
    stored: Tensor = codec.encode_levels(levels, scales, zeros)
    return stored


def entry_of(form: Form, d1: int, d2: int, k: int, count: int, owner: str, nbytes: int) -> StoredProjection:
    return StoredProjection(
        dictionary=form.dictionary, support=form.support, values=form.values, d1=d1, d2=d2, k=k,
        nnz=count if form.support_kind.chosen else 0, owner=owner, nbytes=nbytes if form.codec.coded else 0,
    )  # fmt: skip


def write(form: Form, dense: Path, folder: Path) -> Any:
    """A model of one form with random factors, q, k and v over one dictionary if there is one; returns the dense one it
    stands for."""
    return write_mixed(lambda _kind: form, dense, folder)


def write_mixed(form_of: Callable[[str], Form | None], dense: Path, folder: Path) -> Any:
    """The same with a form for each kind of projection; None leaves it dense."""
    expected = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    model: Any = AutoModelForCausalLM.from_pretrained(dense)
    generator = torch.Generator().manual_seed(0)
    entries, tensors, atoms = {}, {}, {}
    for p in find_projections(model):
        form = form_of(p.kind)
        if form is None:
            continue
        kind = form.dictionary_kind
        k, owner, scale = kind.atoms(p.d1), p.name, p.d1**-0.5
        if k is None:
            k, scale = K, 1.0
            owner = p.name.replace("k_proj", "q_proj").replace("v_proj", "q_proj")
            if owner == p.name:
                stored = kind.encode(torch.randn(p.d1, k, generator=generator) * (p.d1 * k) ** -0.5)
                tensors[f"{owner}.{form.names.dictionary}"] = stored
                atoms[owner] = kind.decode(stored).double()
        own, coefficients, count = random_part(form, p.d2, k, generator, scale)
        tensors |= {f"{p.name}.{part}": tensor for part, tensor in own.items()}
        nbytes = own[form.names.values].nbytes
        entries[p.name] = entry_of(form, p.d1, p.d2, k, count, owner, nbytes)
        expected.get_submodule(p.name).weight.data.copy_(
            coefficients @ atoms[owner] if owner in atoms else coefficients
        )
    swap_in_layers(model, entries, torch.bfloat16, "cpu")
    with torch.no_grad():
        for name, tensor in tensors.items():
            getattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]).copy_(tensor)
    mark_compressed(model, entries)
    model.save_pretrained(folder)
    return expected.eval()
