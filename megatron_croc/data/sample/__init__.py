"""One sample: its conversation, tokens and images, up to the tensors of a batch."""
