"""Comparison of parallel layouts with one process: the parts of `croc parity layouts`."""
