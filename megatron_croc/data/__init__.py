"""Data: inputs to shards on disk, and shards to batches. Imports nothing of the model."""
