"""Version 1's spelling of config.json: one layout and a width in place of a form, and its names.

Version 1 knows three forms. What it can tell is written so, and read so for ever; everything else is version 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

if TYPE_CHECKING:
    from cospadi.format.schema import StoredProjection

LAYOUTS = {("stored", "mask"): "sparse-dictionary", ("stored", "full"): "low-rank"}
"""(dictionary, support) -> how the two together are called, in version 1 and for reading."""

FORMS = {
    ("sparse-dictionary", 14): ("stored", "mask", "f14"),
    ("sparse-dictionary", 16): ("stored", "mask", "bf16"),
    ("low-rank", 16): ("stored", "full", "bf16"),
}
"""(layout, value_bits) -> dictionary, support, codec: all that version 1 can tell."""

NAMES = {("stored", "full", "bf16"): ("left", "support", "right")}
"""Forms whose tensors have other names than dictionary, support and values, in whichever version.

A solved group's tensors are written before it is known of which version the whole model will be.
"""


class Entry(BaseModel):
    """A projection's entry; sizes are checked by `StoredProjection`."""

    model_config = ConfigDict(extra="forbid")

    layout: Literal["sparse-dictionary", "low-rank"]
    d1: int
    d2: int
    k: int
    nnz: int = 0
    value_bits: Literal[14, 16] = 16
    dictionary: str
    bias: bool = False

    @model_validator(mode="after")
    def _known(self) -> Entry:
        if (self.layout, self.value_bits) not in FORMS:
            raise ValueError(f"value_bits {self.value_bits} does not go with layout {self.layout}")
        return self

    def fields(self) -> dict[str, Any]:
        """The same as the fields of a `StoredProjection`."""
        sizes = self.model_dump(exclude={"layout", "value_bits", "dictionary"})
        choices = zip(("dictionary", "support", "values"), FORMS[self.layout, self.value_bits], strict=True)
        return sizes | dict(choices) | {"owner": self.dictionary}


def entry_of(projection: StoredProjection) -> dict[str, Any] | None:
    """A projection as version 1 has it in config.json; None where it cannot tell it."""
    form = projection.dictionary, projection.support, projection.values
    for (layout, value_bits), known in FORMS.items():
        if known == form:
            sizes = {field: getattr(projection, field) for field in ("d1", "d2", "k", "nnz")}
            rest = {"value_bits": value_bits, "dictionary": projection.owner, "bias": projection.bias}
            return {"layout": layout} | sizes | rest
    return None
