"""Saving and resuming of runs, and loading weights of another training stage."""
