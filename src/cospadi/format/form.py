"""The form of a stored projection: three independent choices, and what they cost together, to the byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from cospadi.format import version1
from cospadi.format.codecs import CODECS
from cospadi.format.dictionaries import DICTIONARIES
from cospadi.format.kinds import Codec, Dictionary, Numbers, Support
from cospadi.format.supports import SUPPORTS

DENSE_BITS = 16
"""Bits a weight costs in a dense projection, whatever the dtype it came in (the paper's bf16 words)."""


def dense_bytes(d1: int, d2: int) -> int:
    """Bytes of a dense d1 x d2 projection at 16 bits a weight."""
    return d1 * d2 * DENSE_BITS // 8


@dataclass(frozen=True)
class Parts:
    """What one group of projections costs, part by part, in bits or in bytes as the function that made it says."""

    dictionary: int
    support: int
    values: int

    @property
    def total(self) -> int:
        return self.dictionary + self.support + self.values

    def __add__(self, other: Parts) -> Parts:
        return Parts(self.dictionary + other.dictionary, self.support + other.support, self.values + other.values)


class Names(NamedTuple):
    """What a projection's tensors are called after its own name."""

    dictionary: str
    support: str
    values: str


@dataclass(frozen=True)
class Form:
    """How a projection W ~ D S is stored: its kinds by name.

    Attributes:
        dictionary: one of DICTIONARIES. support: one of SUPPORTS. values: one of CODECS.
    """

    dictionary: str
    support: str
    values: str

    @property
    def dictionary_kind(self) -> Dictionary:
        return DICTIONARIES[self.dictionary]

    @property
    def support_kind(self) -> Support:
        return SUPPORTS[self.support]

    @property
    def codec(self) -> Codec:
        return CODECS[self.values]

    @property
    def numbers(self) -> Numbers:
        """The codec, of a form that stores each value by itself."""
        assert isinstance(self.codec, Numbers)
        return self.codec

    @property
    def layout(self) -> str:
        """What dictionary and support together are called, for reading."""
        return version1.LAYOUTS.get((self.dictionary, self.support), f"{self.dictionary} {self.support}")

    @property
    def names(self) -> Names:
        """Of its tensors."""
        own = version1.NAMES.get((self.dictionary, self.support, self.values))
        return Names("dictionary", "support", "values") if own is None else Names(*own)

    @property
    def possible(self) -> bool:
        """Whether it makes sense: of levels zero is one, and nothing else is to choose entries."""
        return not (self.codec.levels and self.support_kind.chosen)

    @property
    def trainable(self) -> bool:
        """Whether the stored values are S transposed as it is multiplied, so that they are an ordinary parameter."""
        return self.codec.plain and not self.support_kind.chosen

    def nbytes(self, d1: int, d2s: Sequence[int], k: int, counts: Sequence[int]) -> Parts:
        """Bytes on disk of projections (d1 x d2 for each of d2s) over one dictionary of k atoms, of all codecs but the
        one whose codes differ in length.

        No other formula of bytes stands anywhere.

        Args:
            counts: stored values of each projection; where entries are chosen, and the values of all projections but
                the last fill whole bytes, their sum will do.
        """
        kind = self.support_kind
        shapes = [kind.values_shape(d2, k, count) for d2, count in zip(d2s, counts, strict=False)]
        return Parts(
            dictionary=self.dictionary_kind.nbytes(d1, k),
            support=sum(kind.nbytes(d2, k) for d2 in d2s),
            values=sum(map(self.codec.nbytes, shapes)),
        )


FORMS = tuple(form for names in product(DICTIONARIES, SUPPORTS, CODECS) if (form := Form(*names)).possible)
"""All that there are."""


def find_form(layout: str, values: str) -> Form | None:
    """The form that is called so and whose values have this codec; None where there is none."""
    return next((form for form in FORMS if (form.layout, form.values) == (layout, values)), None)
