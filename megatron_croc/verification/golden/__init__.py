"""Recorded runs of the released code against ours. The parts of `tools/parity.py golden`."""
