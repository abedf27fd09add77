"""Croc-style multimodal pretraining on megatron-core; README.md shows the layers."""

from megatron_croc import log as log  # sets its filters of warnings before megatron is imported

__version__ = "0.1.0"
