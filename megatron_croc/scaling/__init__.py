"""A grid of runs, from its plan to a fitted law of the held-out loss."""
