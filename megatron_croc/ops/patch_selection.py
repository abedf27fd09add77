"""Which visual tokens of an image are replaced: a pure function of seed, epoch, sample and image.

Nothing is drawn from a global generator, so the set is the same at any parallel layout, with any
worker count and after a resume. (The released code draws torch.randperm from the global one.)
"""

import hashlib

import numpy as np


def num_kept(num_visual_tokens: int, replace_ratio: float) -> int:
    """Visual tokens that stay: floor(N * (1 - ratio)), as N // 4 in the released code."""
    return int(num_visual_tokens * (1.0 - replace_ratio) + 1e-6)


def image_seed(*, seed: int, epoch: int, sample_id: str, image_index: int) -> int:
    """A 63-bit seed of one image in one epoch; everything random about the image uses it."""
    name = f"{seed}/{epoch}/{sample_id}/{image_index}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1


def select_replaced(num_visual_tokens: int, replace_ratio: float, *, seed: int) -> np.ndarray:
    """Draw the replaced set of one image (paper section 3.2; N - floor(N / 4) tokens at 0.75).

    Args:
        num_visual_tokens: N.
        replace_ratio: share of them to replace.
        seed: the image's, see `image_seed`.

    Returns:
        bool [num_visual_tokens], True where the token is replaced.
    """
    generator = np.random.Generator(np.random.Philox(key=seed))
    replaced = np.ones(num_visual_tokens, dtype=bool)
    order = generator.permutation(num_visual_tokens)
    replaced[order[: num_kept(num_visual_tokens, replace_ratio)]] = False
    return replaced
