"""The dense model: how it is opened, its decoder blocks, its projections."""
