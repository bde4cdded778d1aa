"""What a report is made of: what is in the folder, and what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from cospadi.calibration.loss import ByToken
from cospadi.errors import UserError
from cospadi.format import sizes
from cospadi.format.form import DENSE_BITS
from cospadi.format.safetensors import StoredTensor
from cospadi.format.sizes import Part
from cospadi.model.projections import kinds_of
from cospadi.recipe import Recipe
from cospadi.stages import card

USUAL = {
    f"{word}_proj": place for place, word in enumerate(("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down"))
}
"""Kinds of projections -> their place in a block."""


@dataclass(frozen=True)
class Measured:
    """The model beside the dense one on a text.

    Attributes:
        text, against: the text's file and the dense model, by their names.
        perplexities: the model's, the dense one's.
        pieces: window -> the text of each of its tokens, of those windows that the page shows or quotes.
        words: token -> its text, of those that the page quotes.
    """

    text: str
    against: str
    perplexities: tuple[float, float]
    divergence: float
    tokens: ByToken
    pieces: Mapping[int, Sequence[str]]
    words: Mapping[int, str]


class Score(NamedTuple):
    """What `eval --card` or `bench --card` has measured: the command, and its table."""

    command: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Content:
    """All that a report says.

    Attributes:
        name: the folder's, or the repository's.
        inspected: what `cospadi inspect --json` prints.
        manifest: of the folder; None where it has none.
        config: its config.json.
        tensors: of the folder. before: tensor name -> bytes, of the dense model where it is at hand; else None.
        scores: that the folder's card holds.
    """

    name: str
    inspected: Mapping[str, Any]
    manifest: Mapping[str, Any] | None
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    before: Mapping[str, int] | None
    measured: Measured | None
    scores: Sequence[Score]

    @property
    def projections(self) -> Mapping[str, Mapping[str, Any]]:
        """The selected ones, those that the budget left dense included, in the order in which most models run them."""
        found: Mapping[str, Mapping[str, Any]] = self.inspected["projections"]
        places = {kind: place for place, kind in enumerate(USUAL)}
        return dict(sorted(found.items(), key=lambda item: places.get(sizes.kind_of(item[0]), len(USUAL))))

    @property
    def bits(self) -> float:
        """Bits a weight of the selected projections."""
        return DENSE_BITS * float(self.inspected["compressed_bytes"]) / float(self.inspected["dense_bytes"])

    @property
    def selected(self) -> list[Part]:
        return sizes.selected_parts(
            {name: (one["dense_bytes"], one["bytes"]) for name, one in self.projections.items()}
        )

    @property
    def kept(self) -> list[Part]:
        """What is no selected projection. What was not compressed is as large as it was, where nobody knows better."""
        after = {name: tensor.nbytes for name, tensor in self.tensors.items()}
        return sizes.kept_parts(self.projections, after if self.before is None else self.before, after)

    @property
    def whole(self) -> Part:
        """The whole checkpoint; before is as the dense model stores it, or its projections at 16 bits a weight."""
        after = sum(tensor.nbytes for tensor in self.tensors.values())
        before = after - self.inspected["compressed_bytes"] + self.inspected["dense_bytes"]
        return Part("whole checkpoint", len(self.tensors), sum((self.before or {"": before}).values()), after)

    @property
    def command(self) -> str | None:
        """The command that made it; None where the manifest does not tell, or tells of options that are no more."""
        try:
            return None if self.manifest is None else card.command(self.manifest)
        except (UserError, KeyError, TypeError):
            return None

    @property
    def facts(self) -> list[list[str]]:
        if self.manifest is None or "recipe" not in self.manifest:
            return []
        return card.facts(self.manifest, self.inspected["dense_bytes"], self.inspected["compressed_bytes"])

    @property
    def refined(self) -> bool:
        """Whether blocks were tuned once they were solved."""
        try:
            return bool(Recipe.build((self.manifest or {})["recipe"]).settled().refine)
        except (UserError, KeyError):
            return False

    @property
    def settings(self) -> list[tuple[str, str]]:
        """The recipe, every option as it was asked."""
        recipe = (self.manifest or {}).get("recipe") or {}
        return [(name, _shown(value)) for name, value in recipe.items()]


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


class Left(NamedTuple):
    """What was left as it was, or out."""

    what: str
    number: str
    nbytes: int | None
    why: str


def left(content: Content) -> list[Left]:
    """What is not compressed, and why, as far as the folder tells."""
    manifest, found = content.manifest or {}, []
    if dense := manifest.get("dense"):
        why = "selected; the budget left it dense"
        found.append(Left(kinds_of(list(dense)), _many(len(dense), "projection"), sum(dense.values()), why))
    groups: dict[tuple[str, str], dict[str, int]] = {}
    for name, tensor in content.tensors.items():
        module = name.rpartition(".")[0]
        if module in content.projections:
            continue
        inside = any(piece.isdigit() for piece in name.split("."))
        if _is_matrix(name, tensor):
            key = kinds_of([module]), _why_not(module, manifest.get("recipe") or {})
        elif inside:
            key = "norms, biases and other vectors of the blocks", "too small to be worth it"
        else:
            key = module or name, "outside the decoder blocks"
        groups.setdefault(key, {})[name] = tensor.nbytes
    for (what, why), some in groups.items():
        whole = next(iter(some)).rpartition(".")[0] if len(some) == 1 and "*" in what else what
        found.append(Left(whole, _many(len(some), "tensor"), sum(some.values()), why))
    if out := manifest.get("left_out"):
        why = "left out: --text-only, and the text-only class does not know them"
        found.append(Left(", ".join(out["parts"]), _many(out["tensors"], "tensor"), out["bytes"], why))
    return found


def _is_matrix(name: str, tensor: StoredTensor) -> bool:
    """Whether a tensor is a matrix of a block."""
    inside = any(piece.isdigit() for piece in name.split("."))
    return inside and len(tensor.shape) >= 2 and not name.endswith(".bias")


def not_selected(content: Content) -> list[str]:
    """Modules of the blocks whose weights nobody selected."""
    found = [name.rpartition(".")[0] for name, tensor in content.tensors.items() if _is_matrix(name, tensor)]
    return [module for module in found if module not in content.projections]


def _why_not(name: str, recipe: Mapping[str, Any]) -> str:
    """Why a matrix of a block was not selected."""
    for pattern in recipe.get("exclude") or ():
        if fnmatchcase(name, pattern):
            return f"--exclude {pattern}"
    if (patterns := recipe.get("include")) and not any(fnmatchcase(name, pattern) for pattern in patterns):
        return f"not of --include {' '.join(patterns)}"
    leaf = next((part for part in reversed(name.split(".")) if not part.isdigit()), name)
    words = recipe.get("target")
    if words and not any(leaf == word or leaf.startswith(f"{word}_") for word in words):
        return f"not of --target {','.join(words)}"
    return (
        "no projection that compress takes: it is no plain linear layer of the text decoder, or is used elsewhere too"
    )


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def stays_dense(content: Content) -> Iterable[str]:
    """What the job said that no recipe compresses, in sentences."""
    return [f"{line[0].upper()}{line[1:]}." for line in (content.manifest or {}).get("stays_dense", []) if line]
