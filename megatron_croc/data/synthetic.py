"""Micro-batches of random numbers, for parity runs, tests and benchmarks without data.

Every sample is a pure function of (seed, number), so a global batch is the same at any layout.
"""

from collections.abc import Sequence

import numpy as np
import torch

from megatron_croc.config.run import RunConfig
from megatron_croc.data.batch import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Batch
from megatron_croc.data.batch_builder import pack_multiple
from megatron_croc.data.sample.collate import ReadySample, collate, expand_sample
from megatron_croc.data.sample.tokenization import TokenizedSample

MIXED_IMAGES = (1, 0, 2, 1, 3, 0, 1, 1)
"""Number of images of each sample, cycled over a global batch."""

LONGEST_TEXT = 18
"""Upper bound (excluded) of text tokens before an image and in an answer."""


def make_sample(run: RunConfig, number: int, num_images: int) -> ReadySample:
    """Make sample `number`: text, image, text, image, ..., an answer of at least 4 tokens."""
    rng = np.random.default_rng((run.training.seed, number))
    vocab_size = run.model.language_model.vocab_size
    size = run.model.vision_tower.img_size

    def text(shortest: int) -> list[int]:
        return rng.integers(1, vocab_size, int(rng.integers(shortest, LONGEST_TEXT))).tolist()

    question = [token for _ in range(num_images) for token in (*text(2), IMAGE_TOKEN_INDEX)]
    question += text(2)
    answer = text(4)
    tokens = TokenizedSample(
        sample_id=f"synthetic-{number}",
        input_ids=np.array(question + answer),
        labels=np.array([IGNORE_INDEX] * len(question) + answer),
    )
    pixels = rng.integers(0, 256, (num_images, 3, size, size), dtype=np.uint8)
    return ReadySample(
        tokens=expand_sample(
            tokens,
            num_visual_tokens=run.model.vision_tower.num_visual_tokens,
            seq_length=run.data.seq_length,
        ),
        epoch=0,
        pixel_values=list(torch.from_numpy(pixels)),
    )


def make_batch(run: RunConfig, samples: Sequence[ReadySample]) -> Batch:
    """Collate samples to one pack, as the loader does."""
    size = run.model.vision_tower.img_size
    return collate(
        samples,
        num_visual_tokens=run.model.vision_tower.num_visual_tokens,
        mask_type=run.model.attention_mask_type,
        pad_to_multiple_of=pack_multiple(run.parallel, run.training),
        seed=run.training.seed,
        replace_ratio=run.model.prompt_pool.replace_ratio if run.reconstructs else None,
        image_shape=(3, size, size),
    )


def make_step(
    run: RunConfig,
    step: int,
    *,
    dp_rank: int,
    dp_size: int,
    images: Sequence[int] = MIXED_IMAGES,
) -> list[Batch]:
    """Make this replica's micro-batches of one optimizer step; dp_size does not change the step.

    `images` gives the number of images of each sample, cycled over the global batch.
    """
    training = run.training
    batches = []
    for first in range(0, training.global_batch_size, training.micro_batch_size * dp_size):
        begin = first + dp_rank * training.micro_batch_size
        samples = [
            make_sample(run, step * training.global_batch_size + n, images[n % len(images)])
            for n in range(begin, begin + training.micro_batch_size)
        ]
        batches.append(make_batch(run, samples))
    return batches


def llava_like(number: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sample lengths of instruction data, made up in the shape of LLaVA-1.5's.

    Returns tokens (at most 2048, visual ones included) and images of samples, int64 [number] each.
    6 % are text alone with long answers (40 of its 665 thousand conversations), the others hold an
    image of 576 tokens. Lengths of text are log-normal with long tails; the parameters are guesses.
    """
    rng = np.random.default_rng(seed)
    is_text = rng.random(number) < 0.061
    short = 200 * np.exp(0.8 * rng.standard_normal(number) - 0.32)
    long = 800 * np.exp(0.9 * rng.standard_normal(number) - 0.405)
    tokens = np.where(is_text, long, 576 + short)
    return np.clip(tokens, 20, 2048).astype(np.int64), (~is_text).astype(np.int64)
