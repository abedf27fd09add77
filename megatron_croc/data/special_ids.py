"""Ids in a batch that belong to no word; a module of their own, so that it needs no torch."""

IGNORE_INDEX = -100
"""Label of a position without a text loss."""

IMAGE_TOKEN_INDEX = -200
"""Input id of a visual token; never looked up in the embedding table."""
