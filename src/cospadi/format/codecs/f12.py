"""f12: sign, eight bits of exponent, three of mantissa."""

from cospadi.format.codecs.stream import stream

F12 = stream("f12", 12)
