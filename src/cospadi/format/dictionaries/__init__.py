"""How D may be stored: a file each, and a line here."""

from cospadi.format.dictionaries.identity import IDENTITY
from cospadi.format.dictionaries.stored import STORED
from cospadi.format.kinds import Dictionary

DICTIONARIES: dict[str, Dictionary] = {kind.name: kind for kind in (STORED, IDENTITY)}
