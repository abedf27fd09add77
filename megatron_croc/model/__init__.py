"""The Croc model on megatron-core."""
