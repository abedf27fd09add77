"""Training loop, training step, optimizer, validation, metrics and safety."""
