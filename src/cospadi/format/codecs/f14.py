"""f14: sign, eight bits of exponent, five of mantissa."""

from cospadi.format.codecs.stream import stream

F14 = stream("f14", 14)
