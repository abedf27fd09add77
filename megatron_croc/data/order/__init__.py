"""Samples and tokens of every row of a run, computed from its number."""
