"""The recipe: everything a user can ask of `compress`. Its fields are the command's flags.

`cospadi.cli` makes a flag of each field: of its name and type, of its description and range, of its default, and of its
title as the name of what the flag takes. What a field that is None stands for is said at the end of its description,
in parentheses that begin with "default:".
"""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cospadi.errors import UserError

MOST = 2**31
"""Bound of every count: beyond what anybody has, within what torch can count."""

CACHE_BYTES = 4 * 10**9
"""What a job keeps in memory rather than on disk or computed again, half of it hidden states and half of it whitenings,
unless told otherwise (`--cache-gb`). It is no field of the recipe: the result does not depend on it."""


class Recipe(BaseModel):
    """What to compress, how far, and how. Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ratio: float = Field(0.2, gt=0, lt=1, description="fraction of the selected projections' bytes to remove")
    solver: str = Field(
        "mod-htp",
        description="mod-htp (ours), ksvd (the paper's), procrustes (COMPOT), eigen (ROCKET); svd-llm, svd (low-rank)",
    )
    accounting: Literal["exact", "eq10", "eq11"] = Field(
        "exact", description="exact: real bytes; eq10, eq11: the paper's own k and s"
    )
    value_bits: Literal[12, 14, 16] | None = Field(
        None, description="bits a stored coefficient: 16 is bf16 (default: 14; 16 with eq10)"
    )
    rho: float | None = Field(
        None,
        ge=1,
        allow_inf_nan=False,
        description="k / s (default: chosen with the budgets; 2 where they are uniform)",
    )
    allocate: Literal["fisher", "output", "uniform"] | None = Field(
        None,
        description="how the byte budget is spread: by what an error costs in the loss (fisher) or in the projection's "
        "output, or the same ratio everywhere (uniform) (default: fisher; uniform without text and with eq10, eq11)",
    )
    weight_columns: Literal["fisher", "none"] | None = Field(
        None,
        description="weigh outputs by what they cost in the loss "
        "(default: fisher; none without text and with --allocate output)",
    )
    compensate: bool | None = Field(
        None,
        description="each projection makes up for the errors of those before it "
        "(default: yes; no without text and with --share layers:N)",
    )
    fisher_sequences: int = Field(
        16, ge=1, le=MOST, description="calibration sequences from which the costs in the loss are estimated"
    )

    budget_iterations: int = Field(
        8,
        ge=1,
        le=MOST,
        exclude_if=lambda value: value == 8,  # recipes written before there was this field say the same
        description="alternations T of the short solver runs that budgets are measured by",
    )

    update: Literal["power", "pca", "mod"] = Field("power", description="dictionary update of ksvd")
    iterations: int = Field(60, ge=1, le=MOST, description="alternations T of mod-htp, ksvd and procrustes")
    tolerance: float = Field(0.0, ge=0, lt=1, description="stop once an iteration gains less than this; 0: never")
    seed: int = Field(42, ge=0, lt=2**63, description="of the initial dictionary and the choice of calibration text")
    share: str = Field(
        "input", description="which projections share a dictionary: none, input, layers:N, input,layers:N"
    )
    data_free: bool = Field(False, description="no calibration: minimise the error of the weights themselves")
    damping: float = Field(1e-6, gt=0, lt=1, description="diagonal shift of a singular Gram, in mean diagonals")

    include: tuple[str, ...] = Field((), title="GLOB", description="names of projections to compress (default: all)")
    exclude: tuple[str, ...] = Field(
        (), title="GLOB", description="names of projections to leave dense (default: none)"
    )
    target: tuple[str, ...] = Field(
        (), title="TYPES", description="projection types to compress; up,gate is the paper's UG (default: all)"
    )

    calibration: str | None = Field(
        None,
        title="SOURCE",
        description="a .txt, .jsonl or .parquet file, a hub data set, or 'builtin' (default: a public web text)",
    )
    calibration_config: str | None = Field(None, description="configuration of a hub data set (default: its only one)")
    calibration_split: str = Field("train", description="split of a hub data set")
    calibration_field: str | None = Field(None, description="text field (default: text, else content)")
    sequences: int = Field(256, ge=1, le=MOST, description="calibration sequences")
    length: int | None = Field(
        None, ge=2, le=MOST, description="tokens a sequence (default: 1024, or the model's positions)"
    )
    batch_size: int = Field(4, ge=1, le=MOST, description="calibration sequences in one forward pass")

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model (default: main)")

    @field_validator("include", "exclude", "target", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        """One string is a list separated by commas."""
        return _words(value) if isinstance(value, str) else value

    @field_validator("target")
    @classmethod
    def _types(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """No type's name has a comma in it."""
        return _words(",".join(value))

    @field_validator("share")
    @classmethod
    def _sharing(cls, value: str) -> str:
        """Spaces and order do not matter."""
        words = sorted(word.strip() for word in value.split(","))
        layers = [word.removeprefix("layers:") for word in words if word.startswith("layers:")]
        known = words in (["none"], ["input"]) or (
            len(layers) == 1 and words in ([f"layers:{layers[0]}"], ["input", f"layers:{layers[0]}"])
        )
        if not known or not all(count.isdecimal() and len(count) < 10 and int(count) >= 2 for count in layers):
            raise ValueError("use none, input, layers:N or input,layers:N, where N is at least 2")
        return ",".join(words)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.accounting == "eq11" and self.uniform_rho != 2:
            raise ValueError(
                "accounting eq11 holds only at rho 2, where the dropped value bits pay for the mask; "
                f"rho is {self.rho:g}. Use accounting exact"
            )
        if self.accounting != "exact" and self.allocate in ("fisher", "output"):
            raise ValueError(f"allocate {self.allocate} spreads real bytes. Use accounting exact, or allocate uniform")
        if self.data_free and (self.allocate in ("fisher", "output") or self.weight_columns == "fisher"):
            raise ValueError(
                "data_free leaves no text to allocate or weigh by. Use allocate uniform, weight_columns none"
            )
        if self.accounting == "eq11" and self.value_bits not in (None, 14):
            raise ValueError("accounting eq11 means 14-bit values. Leave value_bits out, or use accounting eq10")
        if self.accounting == "eq10" and self.value_bits not in (None, 16):
            raise ValueError("accounting eq10 means bf16 values. Leave value_bits out, or use accounting eq11 or exact")
        return self

    def settled(self) -> Recipe:
        """The same recipe with a value for every field that another one decides: the one place where that happens.

        `data_free` also tells that the solver takes no text. `rho` stays None where it is chosen with the budgets, and
        what only the model knows (`length`) or the data set (`calibration_field`) stays open.

        Raises:
            UserError: no such solver, or a field that asks for what the others rule out.
        """
        from cospadi.solvers import find_solver  # torch: not for who only reads recipes

        text = not self.data_free and find_solver(self.solver).whitened
        if self.allocate in ("fisher", "output") and not text:
            raise UserError(f"solver {self.solver} uses no calibration text to allocate by. Use --allocate uniform")
        if self.weight_columns == "fisher" and not text:
            raise UserError(f"solver {self.solver} uses no calibration text to weigh by. Use --weight-columns none")
        if self.compensate and (not text or self.layers_shared > 1):
            why = "a dictionary serves several blocks" if text else "there is no text"
            raise UserError(f"compensate is not possible: {why}. Use --no-compensate, or leave it out")
        weighed = text and self.allocate != "output"
        decided = {
            "data_free": not text,
            "allocate": self.allocate or ("fisher" if text and self.accounting == "exact" else "uniform"),
            "weight_columns": self.weight_columns or ("fisher" if weighed else "none"),
            "compensate": text and self.layers_shared == 1 and self.compensate is not False,
            "value_bits": self.stored_value_bits,
        }
        return self.model_copy(update=decided)

    @property
    def wants_fisher(self) -> bool:
        """Whether anything in a settled recipe asks what errors cost in the loss."""
        return "fisher" in (self.allocate, self.weight_columns)

    @property
    def stored_value_bits(self) -> int:
        """Bits a stored coefficient really has."""
        return self.value_bits or (16 if self.accounting == "eq10" else 14)

    @property
    def uniform_rho(self) -> float:
        """k / s where it is not chosen group by group: the paper's 2, unless one was asked for."""
        return 2.0 if self.rho is None else self.rho

    @property
    def shares_input(self) -> bool:
        """Whether projections that read the same tensor share a dictionary."""
        return "input" in self.share.split(",")

    @property
    def layers_shared(self) -> int:
        """Consecutive blocks whose like projections share a dictionary; 1: each block has its own."""
        return int(self.share.partition("layers:")[2] or 1)

    @classmethod
    def build(cls, source: Recipe | Path | str | dict[str, Any] | None = None, **overrides: Any) -> Recipe:
        """A recipe from a YAML file, a mapping or another recipe, with fields replaced by those of `overrides`.

        Raises:
            UserError: a missing or malformed file, an unknown field or a value that is out of range.
        """
        if isinstance(source, Recipe):
            fields = source.model_dump(exclude_unset=True)
        elif isinstance(source, dict) or source is None:
            fields = dict(source or {})
        else:
            fields = _read_yaml(Path(source))
        try:
            return cls.model_validate(fields | overrides)
        except ValidationError as error:
            where = f"recipe {source}: " if isinstance(source, (str, Path)) else ""
            problems = error.errors()
            more = f"; and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
            raise UserError(where + "; ".join(map(_sentence, problems[:MOST_PROBLEMS])) + more) from None

    def to_yaml(self) -> str:
        """The whole recipe as YAML: defaults too, but for `budget_iterations`."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _words(text: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"recipe {path} does not exist") from None
    except Exception as error:  # beside its own errors, yaml raises whatever a malformed scalar or deep nesting meets
        reason = " ".join(str(error).split())
        raise UserError(f"recipe {path} cannot be read as YAML: {reason}") from None
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise UserError(f"recipe {path} is not a mapping of field names to values")
    return fields


MOST_PROBLEMS = 5
"""Wrong fields that one message tells of."""


def _sentence(problem: Any) -> str:
    name = ".".join(part if part in Recipe.model_fields else _shown(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown field {name}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name}: {message} (got {_shown(problem['input'])})" if name else message


def _shown(value: object) -> str:
    """A value in a few words, however large or deep it is."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, 80, 80
    try:
        return short.repr(value)
    except ValueError:  # Python does not write whole numbers of more than some thousand digits
        return "a number of too many digits"
