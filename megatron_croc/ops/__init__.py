"""Functions of tensors and numbers, independent of megatron and of the configuration."""
