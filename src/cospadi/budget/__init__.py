"""Bytes: their accounting, and how a budget is spread over groups."""
