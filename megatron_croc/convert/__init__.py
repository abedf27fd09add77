"""Conversion of weights between Hugging Face and megatron-core."""
