"""Shards on disk -> Batch; nothing here knows the model."""
