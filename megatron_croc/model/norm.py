"""LayerNorm and RMSNorm that megatron-core can use without Transformer Engine or apex.

megatron's own fallback refuses sequence parallelism. Under it each rank sees only a part of the
sequence, so the weight must be marked `sequence_parallel`: megatron then sums its gradient over
the tensor-parallel ranks. Without the mark the gradient is silently wrong.
"""

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional


class Norm(nn.Module):
    """RMSNorm or LayerNorm, as `config.normalization` says; computed in float32."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object):
        """Build it with weight 1 (and bias 0), in `config.params_dtype`."""
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
        """Normalise the last dimension; same shape and dtype."""
        if self.bias is None:
            return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
