"""Sample lengths of instruction data, made up in the shape of LLaVA-1.5's."""

import numpy as np


def llava_like(number: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (at most 2048, visual ones included) and images of samples, int64 [number] each.

    6 % are text alone with long answers (40 of its 665 thousand conversations), the others hold an
    image of 576 tokens. Lengths of text are log-normal with long tails; the parameters are guesses.
    """
    rng = np.random.default_rng(seed)
    is_text = rng.random(number) < 0.061
    short = 200 * np.exp(0.8 * rng.standard_normal(number) - 0.32)
    long = 800 * np.exp(0.9 * rng.standard_normal(number) - 0.405)
    tokens = np.where(is_text, long, 576 + short)
    return np.clip(tokens, 20, 2048).astype(np.int64), (~is_text).astype(np.int64)
