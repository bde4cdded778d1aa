"""What is in a compressed checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from cospadi.commands import tables
from cospadi.format import safetensors, verify
from cospadi.format.form import dense_bytes
from cospadi.format.safetensors import StoredTensor
from cospadi.format.schema import StoredProjection


def inspect(folder: Path) -> dict[str, Any]:
    """A compressed checkpoint's projections and totals.

    Raises:
        CheckpointError: no checkpoint of ours, or a damaged one.
    """
    return inspect_json(*verify.read_checkpoint(folder), safetensors.stored_tensors(folder))


def inspect_json(
    entries: Mapping[str, StoredProjection],
    manifest: Mapping[str, Any] | None,
    tensors: Mapping[str, StoredTensor],
) -> dict[str, Any]:
    """What is in a checkpoint: a mapping a projection, those that the budget left dense included, and totals."""
    recorded = (manifest or {}).get("projections", {})
    projections: dict[str, dict[str, Any]] = {
        name: {
            "layout": entry.form.layout,
            "values": entry.values,
            "d1": entry.d1,
            "d2": entry.d2,
            "k": entry.k,
            "nnz": entry.nnz,
            "value_bits": entry.form.codec.bits,
            "dictionary": entry.owner,
            "dense_bytes": dense_bytes(entry.d1, entry.d2),
            "bytes": sum(tensors[tensor].nbytes for tensor in entry.tensors(name)),
            "relative_error": recorded.get(name, {}).get("relative_error"),
            "loss": recorded.get(name, {}).get("loss"),
        }
        for name, entry in entries.items()
    }
    for name, nbytes in (manifest or {}).get("dense", {}).items():
        d2, d1 = tensors[f"{name}.weight"].shape
        projections[name] = {
            "layout": "dense", "values": None, "d1": d1, "d2": d2, "k": None, "nnz": 0, "value_bits": None,
            "dictionary": None, "dense_bytes": nbytes, "bytes": nbytes, "relative_error": None,
            "loss": None,
        }  # fmt: skip
    dense = sum(item["dense_bytes"] for item in projections.values())
    compressed = sum(item["bytes"] for item in projections.values())
    return {
        "projections": projections,
        "dense_bytes": dense,
        "compressed_bytes": compressed,
        "ratio": (dense - compressed) / dense if dense else 0.0,
        "checkpoint_bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "recipe": (manifest or {}).get("recipe"),
    }


def memory_line(memory: Mapping[str, Any]) -> str:
    """What `bench.memory_of_layers` found, for people."""
    return (
        f"In memory here: {tables.megabytes(memory['model_bytes'])}, of which compressed layers take "
        f"{tables.megabytes(memory['layers_bytes'])}, {memory['layers_bits']:.2f} bits a weight."
    )


def inspect_table(report: Mapping[str, Any]) -> Table:
    """A line a projection: layout, codec, shape, bytes, ratio, error; totals."""
    table = tables.new_table(
        "projection", "layout", "values", "d1 x d2", "k", "nonzeros", "dense bytes", "bytes", "ratio", "error"
    )
    for name, item in report["projections"].items():
        error = item["relative_error"]
        shared = "" if item["dictionary"] in (name, None) else " (shared)"
        table.add_row(
            name,
            item["layout"] + shared,
            item["values"] or "-",
            f"{item['d1']} x {item['d2']}",
            str(item["k"] or "-"),
            f"{item['nnz']:,}" if item["nnz"] else "-",
            f"{item['dense_bytes']:,}",
            f"{item['bytes']:,}",
            f"{1 - item['bytes'] / item['dense_bytes']:.4f}",
            "-" if error is None else f"{error:.4f}",
        )
    table.add_section()
    dense, compressed = f"{report['dense_bytes']:,}", f"{report['compressed_bytes']:,}"
    table.add_row("all", "", "", "", "", "", dense, compressed, f"{report['ratio']:.4f}")
    return table
