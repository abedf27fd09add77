"""Freezing of the parts that a run does not train."""

from collections.abc import Set

from torch import nn

from megatron_croc.config.parts import PARTS, Part


def freeze(chunk: nn.Module, *, trained: Set[Part]) -> None:
    """Set `requires_grad` to False in every part of the model chunk that is not in `trained`."""
    for part in set(PARTS) - trained:
        module = getattr(chunk, part)
        if module is not None:
            module.requires_grad_(False)
