"""Cost of the assignment: distances of visual tokens and pool tokens."""

import torch
from torch import Tensor

from megatron_croc.errors import ConfigError


def pairwise_cost(features: Tensor, pool: Tensor) -> Tensor:
    """Euclidean distances, in float32 also under autocast: bfloat16 would change every match.

    Args:
        features: [B, n, D].
        pool: [P, D].

    Returns:
        float32 [B, n, P], without gradient.

    Raises:
        ConfigError: TF32 is allowed on this GPU. cdist is a matrix product; TF32 would change 3 to
            7 % of the matches.
    """
    if features.is_cuda and torch.get_float32_matmul_precision() != "highest":
        raise ConfigError(
            "tokens cannot be matched in TF32 (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, or a precision "
            'set since the start): call torch.set_float32_matmul_precision("highest")'
        )
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        return torch.cdist(features.float(), pool.float().unsqueeze(0))
