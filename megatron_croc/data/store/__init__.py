"""Shards on disk or in S3: written whole, found by their manifest, read at random."""
