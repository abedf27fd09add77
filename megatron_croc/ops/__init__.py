"""Tensor functions that know neither megatron nor the configuration."""
