"""Attention under a mixed mask. `attend` is the one entry; `backends` says what runs here."""

from megatron_croc.ops.attention.backends import attend as attend
