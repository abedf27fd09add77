"""A run made visible, while it goes on and after it."""
