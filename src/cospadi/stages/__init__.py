"""The stages of a compression, in the order in which compress.py calls them."""
