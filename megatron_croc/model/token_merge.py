"""Merge of visual tokens into the text of a pack, and their extraction from hidden states."""

import torch
from torch import Tensor


def visual_positions(image_starts: Tensor, num_visual_tokens: int) -> Tensor:
    """Positions of all visual tokens in the pack, int64 [n, N]."""
    offsets = torch.arange(num_visual_tokens, device=image_starts.device)
    return image_starts[:, None] + offsets


def merge_visual_tokens(
    text_embeddings: Tensor, visual_embeddings: Tensor, positions: Tensor
) -> Tensor:
    """Put visual tokens at the positions of their placeholders.

    Args:
        text_embeddings: [T, 1, D]; values at `positions` are ignored.
        visual_embeddings: [n, N, D].
        positions: int64 [n, N].

    Returns:
        [T, 1, D].
    """
    if visual_embeddings.shape[:2] != positions.shape:
        raise RuntimeError(
            f"{tuple(visual_embeddings.shape[:2])} visual tokens do not fit the "
            f"{tuple(positions.shape)} placeholders of the pack"
        )
    merged = text_embeddings.squeeze(1).index_copy(
        0, positions.flatten(), visual_embeddings.flatten(0, 1).to(text_embeddings.dtype)
    )
    return merged.unsqueeze(1)


def take_visual_tokens(hidden_states: Tensor, positions: Tensor) -> Tensor:
    """Hidden states [T, 1, D] at positions [n, N] -> [n, N, D]."""
    rows = hidden_states.squeeze(1).index_select(0, positions.flatten())
    return rows.view(*positions.shape, hidden_states.shape[-1])
