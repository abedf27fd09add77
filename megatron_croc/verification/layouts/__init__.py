"""Does the parallel layout change the numbers? The parts of `tools/parity.py layouts`."""
