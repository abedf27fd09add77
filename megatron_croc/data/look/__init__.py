"""A look at a dataset before training: what is in it, what training cuts off, what is strange."""
