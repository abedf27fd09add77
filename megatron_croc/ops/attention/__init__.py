"""Attention under a mixed mask; `attend` is the entry point."""

from megatron_croc.ops.attention.backends import attend as attend
