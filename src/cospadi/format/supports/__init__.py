"""Which entries of S may be stored: a file each, and a line here."""

from cospadi.format.kinds import Support
from cospadi.format.supports.full import FULL
from cospadi.format.supports.mask import MASK

SUPPORTS: dict[str, Support] = {kind.name: kind for kind in (MASK, FULL)}
