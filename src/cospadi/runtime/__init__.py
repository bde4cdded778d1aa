"""Compressed layers and the one op they compute with."""
