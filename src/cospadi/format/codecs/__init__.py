"""How values may be stored: a file each, and a line here."""

from cospadi.format.codecs.bf16 import BF16
from cospadi.format.codecs.ec import EC
from cospadi.format.codecs.f10 import F10
from cospadi.format.codecs.f12 import F12
from cospadi.format.codecs.f14 import F14
from cospadi.format.codecs.integers import INTEGERS
from cospadi.format.kinds import Codec

CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        BF16,
        F14,
        F12,
        F10,
        EC,
        *INTEGERS.values(),
    )
}


def codec_of_bits(bits: int) -> str:
    """The name of the codec that stores a number in this many bits."""
    return next(name for name, codec in CODECS.items() if codec.bits == bits and not codec.levels)
