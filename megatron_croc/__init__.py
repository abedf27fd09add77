"""Croc-style multimodal pretraining on megatron-core; README.md shows the layers."""
