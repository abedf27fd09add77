"""LayerNorm and RMSNorm that megatron-core can use without Transformer Engine or apex.

megatron's own fallback does not support sequence parallelism, where each rank has only a part of
the sequence. The attribute `sequence_parallel` of the weight makes megatron sum its gradient over
the tensor-parallel ranks; without it the gradient would be wrong without an error.
"""

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional


class Norm(nn.Module):
    """RMSNorm or LayerNorm by `config.normalization`; computed in float32."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object):
        """Build the norm with weight 1 (and bias 0), in `config.params_dtype`."""
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = (
            nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
            if config.normalization == "LayerNorm"
            else None
        )
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; shape and dtype do not change."""
        if self.bias is None:
            return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
