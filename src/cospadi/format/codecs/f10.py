"""f10: sign, eight bits of exponent, one of mantissa."""

from cospadi.format.codecs.stream import stream

F10 = stream("f10", 10)
