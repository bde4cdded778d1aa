"""The checkpoint format: what a stored projection is made of, its tensors, its checks (docs/format.md)."""
