"""Selection of the visual tokens to replace: a pure function of seed, epoch, sample and image.

No global generator is used, so the selection does not depend on the parallel layout, on the number
of workers or on restarts. (The released code uses torch.randperm of the global generator.)
"""

import hashlib

import numpy as np


def num_kept(num_visual_tokens: int, replace_ratio: float) -> int:
    """Number of visual tokens that stay: floor(N * (1 - ratio)); released code: N // 4."""
    return int(num_visual_tokens * (1.0 - replace_ratio) + 1e-6)


def image_seed(*, seed: int, epoch: int, sample_id: str, image_index: int) -> int:
    """Return the 63-bit seed for all random draws of one image in one epoch."""
    name = f"{seed}/{epoch}/{sample_id}/{image_index}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1


def select_replaced(num_visual_tokens: int, replace_ratio: float, *, seed: int) -> np.ndarray:
    """Draw the visual tokens to replace of one image (paper section 3.2).

    Args:
        num_visual_tokens: N.
        replace_ratio: share of them to replace; 0.75 replaces N - floor(N / 4).
        seed: seed of the image, see `image_seed`.

    Returns:
        bool [num_visual_tokens], True where the token is replaced.
    """
    generator = np.random.Generator(np.random.Philox(key=seed))
    replaced = np.ones(num_visual_tokens, dtype=bool)
    order = generator.permutation(num_visual_tokens)
    replaced[order[: num_kept(num_visual_tokens, replace_ratio)]] = False
    return replaced
