"""From what people have to shards and their lengths; runs before training."""
