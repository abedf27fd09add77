"""Which parallel layout fits, and which is fastest: an estimate without a GPU."""
