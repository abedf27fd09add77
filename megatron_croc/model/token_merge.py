"""Visual tokens into the text row, and out of the hidden states again."""

import torch
from torch import Tensor


def visual_positions(image_starts: Tensor, num_visual_tokens: int) -> Tensor:
    """int64 [n, N], row position of every visual token."""
    offsets = torch.arange(num_visual_tokens, device=image_starts.device)
    return image_starts[:, None] + offsets


def merge_visual_tokens(
    text_embeddings: Tensor, visual_embeddings: Tensor, positions: Tensor
) -> Tensor:
    """Put visual tokens where their placeholders stand.

    Args:
        text_embeddings: [T, 1, h]; rows at `positions` hold nothing of use.
        visual_embeddings: [n, N, h].
        positions: int64 [n, N].

    Returns:
        [T, 1, h].
    """
    if visual_embeddings.shape[:2] != positions.shape:
        raise RuntimeError(
            f"{tuple(visual_embeddings.shape[:2])} visual tokens do not fit the "
            f"{tuple(positions.shape)} placeholders of the row"
        )
    merged = text_embeddings.squeeze(1).index_copy(
        0, positions.flatten(), visual_embeddings.flatten(0, 1).to(text_embeddings.dtype)
    )
    return merged.unsqueeze(1)


def take_visual_tokens(hidden_states: Tensor, positions: Tensor) -> Tensor:
    """hidden_states [T, 1, h] at positions [n, N] -> [n, N, h]."""
    rows = hidden_states.squeeze(1).index_select(0, positions.flatten())
    return rows.view(*positions.shape, hidden_states.shape[-1])
