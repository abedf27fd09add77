"""Synthetic dataset of simple scenes, for the quickstart and for tests."""
