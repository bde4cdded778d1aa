"""What `config.json` says of a compressed model: one entry a projection, enough to build its layer (docs/format.md)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from cospadi.errors import CheckpointError, UserError
from cospadi.files import read_json
from cospadi.format import version1
from cospadi.format.codecs import CODECS
from cospadi.format.dictionaries import DICTIONARIES
from cospadi.format.form import Form
from cospadi.format.safetensors import dtype_name
from cospadi.format.supports import SUPPORTS

FORMAT_VERSIONS = (1, 2)
"""All that are read. Version 1 is written where it can tell every projection of a model, else version 2."""

QUANT_METHOD = "cospadi"

CONFIG_FIELDS = ("quant_method", "format_version", "projections")
"""What our `quantization_config` holds."""

BIAS, SENTINEL = "bias", "weight"

LARGEST = 2**28
"""Most features or atoms that are believed: products of two such sizes, in bytes, still are numbers to torch."""


class StoredProjection(BaseModel):
    """What `config.json` says of one compressed projection; enough to build its layer.

    Attributes:
        dictionary, support, values: its form: kinds and codec by name.
        d1, d2: in and out features. k: atoms.
        nnz: nonzeros of S; 0 where its support takes every entry.
        nbytes: of the values, where their codes have different lengths; else 0.
        owner: the projection under whose name the dictionary is stored.
        bias: whether the layer has one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dictionary: str
    support: str
    values: str
    d1: int = Field(gt=0, le=LARGEST)
    d2: int = Field(gt=0, le=LARGEST)
    k: int = Field(gt=0, le=LARGEST)
    nnz: int = Field(0, ge=0)
    nbytes: int = Field(0, ge=0)
    owner: str
    bias: bool = False

    @field_validator("dictionary", "support", "values")
    @classmethod
    def _known(cls, name: str, info: ValidationInfo) -> str:
        tables: dict[str | None, Iterable[str]] = {"dictionary": DICTIONARIES, "support": SUPPORTS, "values": CODECS}
        table = tables[info.field_name]
        if name not in table:
            raise ValueError(f"{name:.40} is not known to this cospadi. It knows {', '.join(table)}")
        return name

    @model_validator(mode="after")
    def _possible(self) -> StoredProjection:
        if self.nnz > self.k * self.d2:
            raise ValueError(f"nnz {self.nnz} is more than k * d2 = {self.k * self.d2}")
        if self.nnz and not self.form.support_kind.chosen:
            raise ValueError(f"nnz is {self.nnz}, and support {self.support} has all of S, for which nnz is 0")
        if (atoms := self.form.dictionary_kind.atoms(self.d1)) not in (None, self.k):
            raise ValueError(f"k is {self.k}, and dictionary {self.dictionary} has {atoms} atoms")
        if not self.form.possible:
            raise ValueError(f"values {self.values} have all of S, and support is {self.support}")
        if (self.nbytes > 0) != self.form.codec.coded:
            raise ValueError(f"nbytes is {self.nbytes}, which does not go with values {self.values}")
        return self

    @property
    def form(self) -> Form:
        return Form(self.dictionary, self.support, self.values)

    @property
    def values_shape(self) -> list[int]:
        """Of its values, before they are encoded."""
        return self.form.support_kind.values_shape(self.d2, self.k, self.nnz)

    @property
    def count(self) -> int:
        """Values that are stored."""
        return self.form.support_kind.count(self.d2, self.k, self.nnz)

    def tensors(self, name: str) -> dict[str, tuple[str, list[int]]]:
        """Tensors stored under this projection's name: full name -> (safetensors dtype, shape); bias and sentinel
        are not among them."""
        form, names = self.form, self.form.names
        parts = {
            names.support: (torch.uint8, form.support_kind.shape(self.d2, self.k)),
            names.values: (form.codec.dtype, form.codec.shape(self.values_shape, self.nbytes)),
        }
        if self.owner == name:
            kind = form.dictionary_kind
            parts = {names.dictionary: (kind.dtype, kind.shape(self.d1, self.k))} | parts
        return {f"{name}.{part}": (dtype_name(dtype), shape) for part, (dtype, shape) in parts.items() if shape}

    @property
    def dictionary_tensor(self) -> str:
        """The full name of the dictionary that it multiplies with."""
        return f"{self.owner}.{self.form.names.dictionary}"


def parse_projections(raw: object, version: int) -> dict[str, StoredProjection]:
    """The `projections` of a `config.json` of this version, checked on their own and against each other.

    Raises:
        CheckpointError: a malformed entry, or an owner of a dictionary that does not fit.
    """
    if not isinstance(raw, Mapping):
        raise CheckpointError("config.json: projections is not a mapping of names to entries")
    projections: dict[str, StoredProjection] = {}
    for name, fields in raw.items():
        try:
            fields = version1.Entry.model_validate(fields).fields() if version == 1 else fields
            projections[name] = StoredProjection.model_validate(fields)
        except ValidationError as error:
            raise CheckpointError(f"config.json: projection {name}: {first_problem(error)}") from None
    for name, entry in projections.items():
        owner = projections.get(entry.owner)
        if entry.form.dictionary_kind.shape(entry.d1, entry.k) is None and entry.owner != name:
            raise CheckpointError(
                f"config.json: projection {name} names {entry.owner} as the owner of its dictionary; dictionary "
                f"{entry.dictionary} is stored nowhere, and each projection is its own owner"
            )
        if owner is None or _dictionary(owner) != _dictionary(entry):
            raise CheckpointError(
                f"config.json: projection {name} names {entry.owner} as the owner of its dictionary, "
                "which has none that fits"
            )
    return projections


def _dictionary(entry: StoredProjection) -> tuple[str, str, int, int]:
    """What projections that share a dictionary must agree on; of a projection that owns none, itself."""
    return entry.dictionary_tensor, entry.dictionary, entry.d1, entry.k


def spell(projections: Mapping[str, StoredProjection]) -> tuple[int, dict[str, dict[str, Any]]]:
    """The format version that these are written as, and the `projections` of config.json."""
    old = {name: version1.entry_of(entry) for name, entry in projections.items()}
    told = {name: entry for name, entry in old.items() if entry is not None}
    return (1, told) if len(told) == len(old) else (2, {name: _fields(entry) for name, entry in projections.items()})


def _fields(entry: StoredProjection) -> dict[str, Any]:
    """As version 2 has it in config.json, without what only other codecs tell."""
    told = {field: getattr(entry, field) for field in StoredProjection.model_fields}  # of plain kinds, all of them
    return {field: value for field, value in told.items() if field != "nbytes" or value}


def first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    field = ".".join(map(str, problem["loc"]))
    message = problem["msg"].removeprefix("Value error, ")
    return f"{field}: {message}" if field else message


def is_compressed(folder: Path) -> bool:
    """Whether a model folder's config.json says that this package wrote it.

    Raises:
        UserError: there is no config.json that can be read.
    """
    config = read_json(folder / "config.json").get("quantization_config")
    return isinstance(config, dict) and config.get("quant_method") == QUANT_METHOD


def read_config(folder: Path) -> dict[str, StoredProjection]:
    """The compressed projections of a checkpoint folder, from its config.json.

    Raises:
        UserError: not a CoSpaDi checkpoint. CheckpointError: another version, or malformed.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    if not is_compressed(folder):
        raise UserError(f"{folder} is not a CoSpaDi checkpoint: its config.json has no quantization_config of ours")
    config = read_json(folder / "config.json")["quantization_config"]
    version = check_version(config.get("format_version"), "config.json")
    check_fields(config)
    return parse_projections(config.get("projections", {}), version)


def check_fields(names: Iterable[str]) -> None:
    """Refuse fields of a quantization_config that are not ours."""
    unknown = [name for name in names if name not in CONFIG_FIELDS]
    if unknown:
        raise CheckpointError(f"config.json: quantization_config has unknown fields: {', '.join(unknown)}")


def check_version(version: object, file: str) -> int:
    """A format version that is ours; others are refused."""
    if type(version) is not int or version not in FORMAT_VERSIONS:
        raise CheckpointError(
            f"{file} says format version {version!s:.40}; this cospadi reads versions "
            f"{' and '.join(map(str, FORMAT_VERSIONS))}. Install a matching release"
        )
    return version
