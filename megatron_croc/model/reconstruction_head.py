"""Reconstruction heads: hidden states of the visual tokens -> the original visual tokens.

`bert` is Croc's head: position embeddings, one post-LayerNorm BertLayer over the tokens of one
image, a linear layer. `linear` is ViCToR's head. Neither is tensor-parallel: the published head of
a small model has a single attention head, which cannot be split.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_croc.config.model import ReconstructionConfig
from megatron_croc.parallel.device import manual_generator

HEAD_DIM = 64
"""Size of one attention head of the `bert` head (released code: hidden_size // 64 heads)."""

NORM_EPSILON = 1e-12
"""Epsilon of the layer norms of the `bert` head (released code)."""


def build_reconstruction_head(
    config: ReconstructionConfig, *, hidden_size: int, num_visual_tokens: int, dtype: torch.dtype
) -> nn.Module:
    """Build the head named by `config.reconstruction_head`.

    Its forward takes ([n, N, D], dropout seeds or None) and returns [n, N, D].
    """
    if config.reconstruction_head == "linear":
        return LinearHead(hidden_size).to(dtype)
    return BertHead(hidden_size, num_visual_tokens, config.reconstruction_dropout).to(dtype)


class LinearHead(nn.Module):
    """One linear layer (`img_head` in ViCToR's code)."""

    def __init__(self, hidden_size: int) -> None:
        """Build the layer, with the language model's width on both sides."""
        super().__init__()
        self.resize = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, dropout_seeds: tuple[int, ...] | None = None) -> Tensor:
        """[n, N, D] -> [n, N, D]."""
        return self.resize(x)


class BertHead(nn.Module):
    """One BertLayer and a linear layer (`transform_block` in Croc's code)."""

    def __init__(self, hidden_size: int, num_positions: int, dropout: float) -> None:
        """Build the head for images of `num_positions` tokens."""
        super().__init__()
        self.dropout = dropout
        self.num_heads = max(1, hidden_size // HEAD_DIM)
        self.position_embeddings = nn.Embedding(num_positions, hidden_size)
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.attention_output = nn.Linear(hidden_size, hidden_size)
        self.attention_norm = nn.LayerNorm(hidden_size, eps=NORM_EPSILON)
        self.intermediate = nn.Linear(hidden_size, 4 * hidden_size)
        self.output = nn.Linear(4 * hidden_size, hidden_size)
        self.output_norm = nn.LayerNorm(hidden_size, eps=NORM_EPSILON)
        self.resize = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, dropout_seeds: tuple[int, ...] | None = None) -> Tensor:
        """[n, N, D] -> [n, N, D].

        Args:
            x: hidden states of every visual token.
            dropout_seeds: one per image, which makes dropout independent of the parallel layout.
                None: no dropout.
        """
        drop = _Dropout(self.dropout if self.training else 0.0, dropout_seeds)
        # Call the module instead of reading its weight: under overlap_param_gather the call waits
        # until the weight is gathered.
        x = x + self.position_embeddings(torch.arange(x.shape[1], device=x.device))
        attended = self.attention_output(self._attend(x, drop))
        x = self.attention_norm(x + drop(attended))
        transformed = self.output(functional.gelu(self.intermediate(x)))
        x = self.output_norm(x + drop(transformed))
        return self.resize(x)

    def _attend(self, x: Tensor, drop: "_Dropout") -> Tensor:
        heads = (self.num_heads, x.shape[-1] // self.num_heads)
        q, k, v = (
            layer(x).unflatten(-1, heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        if not drop.is_active:
            out = functional.scaled_dot_product_attention(q, k, v)
        else:
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            out = drop(scores.softmax(dim=-1)) @ v
        return out.transpose(1, 2).flatten(2)


class _Dropout:
    """Dropout that draws from one generator per image, in the order of its calls."""

    def __init__(self, p: float, seeds: tuple[int, ...] | None) -> None:
        self.keep = 1.0 - p
        self.generators = [manual_generator(seed) for seed in seeds or ()] if p > 0.0 else []
        self.is_active = bool(self.generators)

    def __call__(self, x: Tensor) -> Tensor:
        """Drop elements of x [n, ...] and scale up the others."""
        if not self.is_active:
            return x
        kept = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        for image, generator in zip(kept, self.generators, strict=True):
            image.uniform_(generator=generator)
        return x * (kept < self.keep).to(x.dtype) / self.keep
