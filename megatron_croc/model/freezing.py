"""Take the parts that a run does not train out of training."""

from torch import nn

from megatron_croc.config.run import RunConfig
from megatron_croc.model.parameters import PARTS, trained_parts


def freeze(chunk: nn.Module, run: RunConfig) -> None:
    """No gradient for the parameters of every part that `run` freezes."""
    for part in set(PARTS) - trained_parts(run):
        module = getattr(chunk, part)
        if module is not None:
            module.requires_grad_(False)
