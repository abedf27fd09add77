"""A made-up dataset of simple scenes: the quickstart and tests run on it, nothing depends on it."""
