"""What a match costs."""

import torch
from torch import Tensor


def pairwise_cost(features: Tensor, pool: Tensor) -> Tensor:
    """Euclidean distances in float32 whatever the autocast: bfloat16 would change every match.

    Args:
        features: [B, n, h].
        pool: [P, h].

    Returns:
        float32 [B, n, P], without a gradient.
    """
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        return torch.cdist(features.float(), pool.float().unsqueeze(0))
