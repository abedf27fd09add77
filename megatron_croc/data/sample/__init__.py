"""Processing of samples: conversation, tokens, images, and collation to a batch."""
