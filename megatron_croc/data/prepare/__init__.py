"""Preparation of data before training: inputs to shards, and lengths of their samples."""
