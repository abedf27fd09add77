"""The step, the loop, and everything around them."""
