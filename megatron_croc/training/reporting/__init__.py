"""Numbers of a step, and the places they are written to."""
