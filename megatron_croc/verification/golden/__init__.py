"""Recorded runs of the released code against ours. The parts of `croc parity golden`."""
