"""Croc-style multimodal pretraining on megatron-core; README.md shows the layers."""

__version__ = "0.1.0"
