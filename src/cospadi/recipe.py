"""The recipe: everything a user can ask of `compress`. Its fields are the command's flags.

`cospadi.cli` makes a flag of each field: of its name and type, of its description and range, of its default, and of its
title as the name of what the flag takes. What a field that is None stands for is said at the end of its description,
in parentheses that begin with "default:".
"""

from __future__ import annotations

import math
import reprlib
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cospadi.errors import UserError

MOST = 2**31
"""Bound of every count: beyond what anybody has, within what torch can count."""

REFINE = 128
"""Steps of refinement, unless told otherwise."""

CACHE_BYTES = 4 * 10**9
"""Bytes of hidden states that a job keeps in memory rather than on disk, and of Grams that it takes in one pass of a
model that runs whole, unless told otherwise (`--cache-gb`). It is no field of the recipe: the result does not depend on
it."""


PLAIN: dict[str, Any] = {"share": "none", "allocate": "uniform", "metric": "output", "compensate": False, "refine": 0}
"""The frame that the peers' papers measure in: each projection alone, the same ratio everywhere, plain calibration."""


class Method(NamedTuple):
    """A named recipe.

    Attributes:
        says: what it is, in a line.
        fields: what it sets of the fields that are not given.
    """

    says: str
    fields: dict[str, Any]


METHODS: dict[str, Method] = {
    "sparse": Method("D = I, the metric of the loss, blocks refined: the default", {}),
    "coded": Method("levels of few bits in an entropy code, trellis-coded", {"solver": "trellis"}),
    "paper": Method("K-SVD, a dictionary a projection (CoSpaDi, arXiv 2509.22075)", PLAIN | {"solver": "ksvd"}),
    "mod-htp": Method(
        "dictionaries by MOD, shared by what reads the same, outputs weighed", {"solver": "mod-htp", "refine": 0}
    ),
    "compot": Method("an orthogonal dictionary (arXiv 2602.15200)", PLAIN | {"solver": "procrustes", "iterations": 20}),
    "rocket": Method("leading eigenvectors as dictionary (arXiv 2602.11008)", PLAIN | {"solver": "eigen"}),
    "svd-llm": Method(
        "low rank: truncated SVD in the metric of the outputs (ICLR 2025)", PLAIN | {"solver": "svd-llm"}
    ),
    "svd": Method("low rank: truncated SVD of the weights", PLAIN | {"solver": "svd", "metric": "weights"}),
    "sparsegpt": Method("one pass with error feedback (arXiv 2301.00774)", PLAIN | {"solver": "sparsegpt"}),
    "wanda": Method("the largest |w| times the norm of its input (arXiv 2306.11695)", PLAIN | {"solver": "wanda"}),
    "alps": Method("ADMM on the layer's problem (NeurIPS 2024)", PLAIN | {"solver": "alps", "iterations": 300}),
    "magnitude": Method("the largest |w|", PLAIN | {"solver": "magnitude", "metric": "weights"}),
    "rtn": Method("integers of few bits, rounded to nearest", PLAIN | {"solver": "rtn", "metric": "weights"}),
    "gptq": Method("integers of few bits with error feedback (arXiv 2210.17323)", PLAIN | {"solver": "gptq"}),
}
"""All of them, the default first."""

CALIBRATED = (
    *("calibration", "calibration_config", "calibration_split", "calibration_field", "sequences", "length"),
    *("batch_size", "gradient_sequences", "seed", "include", "exclude", "target", "text_only", "device", "revision"),
)
"""Fields that a dense model's tokens, Grams and gradients follow from, of which no method sets one: jobs that have them
in common can share what they calibrate."""


class Recipe(BaseModel):
    """What to compress, how far, and how. Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ratio: float = Field(0.2, gt=0, lt=1, description="fraction of the selected projections' bytes to remove")
    bits: float | None = Field(
        None, ge=1, lt=16, description="bits a weight, all told, in place of the ratio (default: 16 less 16 times that)"
    )
    method: str = Field(
        "sparse",
        description="a named recipe, which sets what is not given; see cospadi methods; with bits the default is coded",
    )
    solver: str = Field(
        "htp",
        description="htp (D = I), mod-htp, ksvd (the paper's), procrustes (COMPOT), eigen (ROCKET), svd-llm, svd, "
        "sparsegpt, wanda, alps, magnitude, trellis (levels in a code), rtn, gptq (integers of few bits)",
    )
    accounting: Literal["exact", "eq10", "eq11"] = Field(
        "exact", description="exact: real bytes; eq10, eq11: the paper's own k and s"
    )
    value_bits: Literal[10, 12, 14, 16] | None = Field(
        None, description="bits a stored coefficient: 16 is bf16 (default: 14; 16 with eq10)"
    )
    rho: float = Field(2.0, ge=1, allow_inf_nan=False, description="k / s, where a dictionary is stored")
    allocate: Literal["pooled", "uniform"] | None = Field(
        None,
        description="how the bytes are spread: by what weights are worth to the loss (pooled), or the same ratio "
        "everywhere (uniform) (default: pooled where D = I and the metric is of the loss)",
    )
    metric: Literal["two-sided", "fisher", "output", "weights"] | None = Field(
        None,
        description="what an error is measured in: of the weights (no text is needed), of the projection's output, of "
        "the outputs weighed by what they cost in the loss (fisher), or of that with all their products (two-sided) "
        "(default: the best that the solver knows: fisher; two-sided for htp where blocks are not refined)",
    )
    compensate: bool | None = Field(
        None,
        description="each projection makes up for the errors of those before it "
        "(default: yes where blocks are not refined; no without text and with --share layers:N)",
    )
    gradient_sequences: int = Field(
        16, ge=1, le=MOST, description="calibration sequences on which gradients of the loss are taken"
    )
    refine: int | None = Field(
        None,
        ge=0,
        le=MOST,
        description="steps by which the values of each block are tuned to its output, supports fixed "
        "(default: 128; 0 without text, with --share layers:N and with --bits)",
    )

    update: Literal["power", "pca", "mod"] = Field("power", description="dictionary update of ksvd")
    iterations: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="iterations T of the solver (default: 12 for htp, 300 for alps, 8 for trellis, else 60)",
    )
    tolerance: float = Field(0.0, ge=0, lt=1, description="stop once an iteration gains less than this; 0: never")
    seed: int = Field(42, ge=0, lt=2**63, description="of the initial dictionary and the choice of calibration text")
    share: str = Field(
        "input", description="which projections share a dictionary or budget: none, input, layers:N, input,layers:N"
    )
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
        description="a .txt, .jsonl, .json or .parquet file, a hub data set, or 'builtin' (default: a public web text)",
    )
    calibration_config: str | None = Field(None, description="configuration of a hub data set (default: its only one)")
    calibration_split: str = Field("train", description="split of a hub data set")
    calibration_field: str | None = Field(
        None, description="field that is text or a chat (default: text, content, messages or conversations)"
    )
    sequences: int = Field(256, ge=1, le=MOST, description="calibration sequences")
    length: int | None = Field(
        None, ge=2, le=MOST, description="tokens a sequence (default: 1024, or the model's positions)"
    )
    batch_size: int = Field(4, ge=1, le=MOST, description="calibration sequences in one forward pass")

    text_only: bool = Field(
        False, description="of a model that reads images or sound too, keep only what the text-only class knows"
    )
    merge_adapter: bool = Field(False, description="merge the PEFT adapter that lies in the model's folder")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model (default: main)")

    @model_validator(mode="before")
    @classmethod
    def _named(cls, fields: Any) -> Any:
        """What the method sets of the fields that are not given."""
        if not isinstance(fields, dict):
            return fields
        bits = fields.get("bits")
        if bits is not None:
            fields = {"method": "coded"} | fields
            if isinstance(bits, (int, float)) and not isinstance(bits, bool) and math.isfinite(bits):
                ratio = float(1 - Fraction(str(bits)) / 16)
                if not 0 < ratio < 1:
                    ratio = fields.get("ratio", 0.5)  # which bits is told to be wrong
                if fields.get("ratio", ratio) != ratio:
                    raise ValueError(f"ratio {fields['ratio']} and bits {bits} are two sizes. Give one of them")
                fields |= {"ratio": ratio}
        method = fields.get("method", "sparse")
        if not isinstance(method, str) or method not in METHODS:
            raise ValueError(f"method {method!s:.40} is not known. Use one of {', '.join(METHODS)}")
        return METHODS[method].fields | fields

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
        if self.accounting == "eq11" and self.rho != 2:
            raise ValueError(
                "accounting eq11 holds only at rho 2, where the dropped value bits pay for the mask; "
                f"rho is {self.rho:g}. Use accounting exact"
            )
        if self.accounting != "exact" and self.allocate == "pooled":
            raise ValueError("allocate pooled spreads real bytes. Use accounting exact, or allocate uniform")
        if self.accounting == "eq11" and self.value_bits not in (None, 14):
            raise ValueError("accounting eq11 means 14-bit values. Leave value_bits out, or use accounting eq10")
        if self.accounting == "eq10" and self.value_bits not in (None, 16):
            raise ValueError("accounting eq10 means bf16 values. Leave value_bits out, or use accounting eq11 or exact")
        return self

    def settled(self) -> Recipe:
        """The same recipe with a value for every field that another one decides: the one place where that happens.

        A solver that takes no text makes the metric `weights`. What only the model knows (`length`) or the data set
        (`calibration_field`) stays open.

        Raises:
            UserError: no such solver, or a field that asks for what the others rule out.
        """
        from cospadi.solvers import find_solver  # torch: not for who only reads recipes

        solver = find_solver(self.solver)
        single, wanted = self.layers_shared == 1, REFINE if self.refine is None else self.refine
        if solver.levels and self.refine:
            raise UserError("refine is not possible: levels stay as they were solved. Use --refine 0, or leave it out")
        wanted = 0 if solver.levels else wanted
        refined = single and wanted > 0
        metric: str = self.metric or ("fisher" if refined and "fisher" in solver.metrics else solver.metrics[0])
        if metric not in solver.metrics:
            raise UserError(
                f"solver {self.solver} does not measure errors in metric {metric}. Use --metric "
                + " or ".join(solver.metrics)
            )
        if self.accounting != "exact" and solver.identity:
            raise UserError(
                f"accounting {self.accounting} counts a dictionary, and solver {self.solver} stores none. "
                "Use --accounting exact, or a solver that stores one, as --method paper does"
            )
        text = metric != "weights"
        by_loss = metric in ("fisher", "two-sided")
        if self.allocate == "pooled" and not (by_loss and solver.identity):
            what = f"metric {metric} takes no gradients" if solver.identity else f"solver {self.solver} stores D"
            raise UserError(f"allocate pooled is not possible: {what}. Use --allocate uniform")
        alone = text and single
        for name, asked in (("compensate", self.compensate), ("refine", self.refine)):
            if asked and not alone:
                why = "groups span several blocks" if text else "there is no text"
                no = "--no-compensate" if name == "compensate" else "--refine 0"
                raise UserError(f"{name} is not possible: {why}. Use {no}, or leave it out")
        spread = by_loss and solver.identity
        refine = wanted if alone else 0
        decided = {
            "metric": metric,
            "allocate": self.allocate or ("pooled" if spread else "uniform"),
            "compensate": alone and (not refine if self.compensate is None else self.compensate),
            "refine": refine,
            "value_bits": self.stored_value_bits,
            "iterations": self.iterations or solver.iterations,
        }
        return self.model_copy(update=decided)

    @property
    def data_free(self) -> bool:
        """Whether a settled recipe needs no text."""
        return self.metric == "weights"

    @property
    def wants_gradients(self) -> bool:
        """Whether a settled recipe's errors are measured by what they cost in the loss."""
        return self.metric in ("fisher", "two-sided")

    @property
    def spreads_levels(self) -> bool:
        """Whether a settled recipe gives levels one step everywhere, in the loss, which asks for inputs' pivots."""
        from cospadi.solvers import find_solver  # torch, as in `settled`

        return self.allocate == "pooled" and find_solver(self.solver).coded

    @property
    def stored_value_bits(self) -> int:
        """Bits a stored coefficient really has."""
        return self.value_bits or (16 if self.accounting == "eq10" else 14)

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
            if "method" in overrides:  # what the old one has set goes with it
                preset = METHODS[source.method].fields
                fields = {name: value for name, value in fields.items() if preset.get(name, cls) != value}
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

    def flags(self) -> list[str]:
        """The flags of `cospadi compress` that ask for this recipe: its ratio or bits, and what is not as it is by
        default or by its method. The device, which is the machine's, is none of them."""
        usual = Recipe().model_dump(mode="json") | METHODS[self.method].fields
        usual |= {"method": "sparse" if self.bits is None else "coded", "device": self.device}
        usual["ratio"] = None if self.bits is None else self.ratio
        words: list[str] = []
        for name, value in self.model_dump(mode="json").items():
            flag = name.replace("_", "-")
            if value is None or value == usual[name]:
                continue
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
                continue
            for one in value if isinstance(value, list) else [value]:
                words += [f"--{flag}", str(one).removesuffix(".0") if isinstance(one, float) else str(one)]
        return words

    def to_yaml(self) -> str:
        """The whole recipe as YAML: defaults too."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


Trained = Literal["norms", "values", "all"]


class Healing(BaseModel):
    """How a compressed model is healed. Its fields are the flags of `cospadi heal`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    minutes: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="that all of it may take (default: none, with steps)"
    )
    steps: int | None = Field(
        None,
        ge=1,
        lt=MOST,
        description="of the optimizer, in place of a time: equal runs then give equal bytes (default: as time allows)",
    )
    learning_rate: float = Field(
        0.012,
        gt=0,
        allow_inf_nan=False,
        description="largest step, in root mean squares of the tensor it moves, of matrices times 64 / their inputs",
    )
    trained: Trained = Field(
        "norms",
        description="values (all that is stored of compressed projections), norms (biases and these, too) or all "
        "(embeddings and dense layers, too)",
    )
    top: int = Field(64, ge=0, description="likeliest tokens of the teacher that are learned; 0 takes the text alone")
    length: int | None = Field(None, ge=2, description="tokens a sequence (default: min(256, positions))")
    batch: int = Field(2048, ge=1, lt=MOST, description="tokens a step, at least one sequence")
    seed: int = Field(42, ge=0, lt=2**63, description="of the order of the text")

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.minutes is None) == (self.steps is None):
            raise ValueError("healing takes a time or a number of steps. Give --minutes or --steps, and not both")
        return self

    @classmethod
    def build(cls, **fields: Any) -> Self:
        """
        Raises:
            UserError: unknown fields, or values that are out of range.
        """
        try:
            return cls(**fields)
        except ValidationError as error:
            raise UserError("; ".join(map(_sentence, error.errors()[:MOST_PROBLEMS]))) from None


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
