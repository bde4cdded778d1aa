"""What `config.json` says of a compressed model: one entry a projection, enough to build its layer (docs/format.md)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cospadi.budget import accounting
from cospadi.errors import CheckpointError, UserError
from cospadi.files import read_json

FORMAT_VERSION = 1

QUANT_METHOD = "cospadi"

CONFIG_FIELDS = ("quant_method", "format_version", "projections")
"""What our `quantization_config` holds."""

DICTIONARY, SUPPORT, VALUES, LEFT, RIGHT, SENTINEL = "dictionary", "support", "values", "left", "right", "weight"

BIAS = "bias"

LARGEST = 2**28
"""Most features or atoms that are believed: products of two such sizes, in bytes, still are numbers to torch."""


class StoredProjection(BaseModel):
    """What `config.json` says of one compressed projection; enough to build its layer.

    Attributes:
        layout: which tensors it has.
        d1, d2: in and out features. k: atoms, or the rank.
        nnz: nonzeros of S, and value_bits: bits each takes (both only in the sparse layout).
        dictionary: the projection under whose name the dictionary (or left factor) is stored.
        bias: whether the layer has one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layout: Literal["sparse-dictionary", "low-rank"]
    d1: int = Field(gt=0, le=LARGEST)
    d2: int = Field(gt=0, le=LARGEST)
    k: int = Field(gt=0, le=LARGEST)
    nnz: int = Field(0, ge=0)
    value_bits: Literal[14, 16] = 16
    dictionary: str
    bias: bool = False

    @model_validator(mode="after")
    def _possible(self) -> StoredProjection:
        if self.nnz > self.k * self.d2:
            raise ValueError(f"nnz {self.nnz} is more than k * d2 = {self.k * self.d2}")
        return self

    def tensors(self, name: str) -> dict[str, tuple[str, list[int]]]:
        """Tensors stored under this projection's name: full name -> (safetensors dtype, shape); bias and sentinel
        are not among them."""
        shared = [self.k, self.d1]
        if self.layout == "low-rank":
            own = {RIGHT: ("BF16", [self.d2, self.k])}
            first = {LEFT: ("BF16", shared)}
        else:
            nbytes = accounting.value_stream_bytes(self.nnz, self.value_bits)
            own = {
                SUPPORT: ("U8", [self.d2, accounting.support_row_bytes(self.k)]),
                VALUES: ("BF16", [self.nnz]) if self.value_bits == 16 else ("U8", [nbytes]),
            }
            first = {DICTIONARY: ("BF16", shared)}
        return {f"{name}.{part}": what for part, what in ((first | own) if self.dictionary == name else own).items()}


def parse_projections(raw: object) -> dict[str, StoredProjection]:
    """The `projections` of `config.json`, checked on their own and against each other.

    Raises:
        CheckpointError: a malformed entry, or an owner of a dictionary that does not fit.
    """
    if not isinstance(raw, Mapping):
        raise CheckpointError("config.json: projections is not a mapping of names to entries")
    projections: dict[str, StoredProjection] = {}
    for name, fields in raw.items():
        try:
            projections[name] = StoredProjection.model_validate(fields)
        except ValidationError as error:
            raise CheckpointError(f"config.json: projection {name}: {first_problem(error)}") from None
    for name, entry in projections.items():
        owner = projections.get(entry.dictionary)
        same = owner is not None and (owner.layout, owner.d1, owner.k) == (entry.layout, entry.d1, entry.k)
        if owner is None or not same or owner.dictionary != entry.dictionary:
            raise CheckpointError(
                f"config.json: projection {name} names {entry.dictionary} as the owner of its dictionary, "
                "which has none that fits"
            )
    return projections


def first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    field = ".".join(map(str, problem["loc"]))
    message = problem["msg"].removeprefix("Value error, ")
    return f"{field}: {message}" if field else message


def read_config(folder: Path) -> dict[str, StoredProjection]:
    """The compressed projections of a checkpoint folder, from its config.json.

    Raises:
        UserError: not a CoSpaDi checkpoint. CheckpointError: another version, or malformed.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    config = read_json(folder / "config.json").get("quantization_config")
    if not isinstance(config, dict) or config.get("quant_method") != QUANT_METHOD:
        raise UserError(f"{folder} is not a CoSpaDi checkpoint: its config.json has no quantization_config of ours")
    check_version(config.get("format_version"), "config.json")
    check_fields(config)
    return parse_projections(config.get("projections", {}))


def check_fields(names: Iterable[str]) -> None:
    """Refuse fields of a quantization_config that are not ours."""
    unknown = [name for name in names if name not in CONFIG_FIELDS]
    if unknown:
        raise CheckpointError(f"config.json: quantization_config has unknown fields: {', '.join(unknown)}")


def check_version(version: object, file: str) -> None:
    """Refuse a format version that is not ours."""
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} says format version {version!s:.40}; this cospadi reads version {FORMAT_VERSION}. "
            "Install a matching release"
        )
