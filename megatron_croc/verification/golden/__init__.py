"""Comparison of our training step with recorded runs of the released code: `croc parity golden`."""
