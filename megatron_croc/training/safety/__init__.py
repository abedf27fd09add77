"""Faults of a run: seen, survived where possible, and kept for replay."""
