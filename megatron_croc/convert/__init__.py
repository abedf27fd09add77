"""Hugging Face <-> megatron-core weights."""
