"""Checks that training is right and safe: run them on your own machine."""
