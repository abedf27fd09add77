"""The Croc model on megatron-core, and what it costs."""
