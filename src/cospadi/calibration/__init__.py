"""Calibration: text to token sequences, token sequences to Gram matrices, a Gram matrix to a whitening factor."""
