"""transformers' modules with random weights, and ours filled with the same weights."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron_croc.config.model import CrocModelConfig
from megatron_croc.convert.names import Layout, build_rules
from megatron_croc.convert.state import load_state


def randomise(module: nn.Module, *, seed: int = 0) -> None:
    """No weight is left at 0 or 1: a forgotten bias or a swapped norm would not be seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(parameter + 0.2 * drawn)
            else:
                parameter.copy_(drawn * parameter.shape[-1] ** -0.5)
    module.eval()


def state_with_prefix(module: nn.Module, rename: Callable[[str], str]) -> dict[str, Tensor]:
    """The module's weights under other names."""
    return {rename(name): tensor.detach() for name, tensor in module.state_dict().items()}


def fill(
    module: nn.Module, prefix: str, model: CrocModelConfig, tensors: dict[str, Tensor]
) -> set[str]:
    """Give one part of our model the tensors, through the name map; returns the names used."""

    class Part(nn.Module):
        """Names of the part as they are inside a whole model."""

        def sharded_state_dict(self) -> dict:
            return module.sharded_state_dict(prefix)

    rules = build_rules(model, Layout())
    return load_state(Part(), tensors, rules)
