"""Special values of token ids and labels."""

IGNORE_INDEX = -100
"""Label of a position without a text loss."""

IMAGE_TOKEN_INDEX = -200
"""Input id of a visual token; it has no row in the embedding table."""
