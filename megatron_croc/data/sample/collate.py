"""Collate tokenised samples to one pack, a Batch.

TokenizedSample   text . IMAGE . text                  labels unshifted
  | expand_sample: each mark becomes N visual tokens, then the end is cut at seq_length
TokenizedSample   text . v v v v . text                still labels unshifted
  | collate: shift labels inside each sample, lay samples end to end, pad, place the spans
Batch             |sample 0      |sample 1  |padding|
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from megatron_croc.config.model import MaskType
from megatron_croc.data.bad_samples import BadSampleError
from megatron_croc.data.batch import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Batch
from megatron_croc.data.sample.tokenization import TokenizedSample
from megatron_croc.ops.mixed_mask import MixedMask
from megatron_croc.ops.patch_selection import image_seed, select_replaced
from megatron_croc.parallel.device import host_buffer

PAD_TOKEN_ID = 0
"""Input id of padding; any id of the vocabulary is possible, as no token sees the padding."""


@dataclass(frozen=True, kw_only=True)
class ReadySample:
    """One tokenised and decoded sample, ready to be collated."""

    tokens: TokenizedSample
    """Tokens as returned by expand_sample."""

    epoch: int
    """Epoch of the sample's source; the seeds of its images depend on it."""

    pixel_values: Sequence[Tensor] = ()
    """uint8 [3, height, width] for each image; empty if pixels are not needed."""


def expand_sample(
    sample: TokenizedSample, *, num_visual_tokens: int, seq_length: int
) -> TokenizedSample:
    """Replace each image mark by N visual tokens, then cut the end at seq_length.

    Raises:
        BadSampleError: the cut would remove visual tokens.
    """
    repeats = np.where(sample.input_ids == IMAGE_TOKEN_INDEX, num_visual_tokens, 1)
    input_ids = np.repeat(sample.input_ids, repeats)
    labels = np.repeat(sample.labels, repeats)
    if (input_ids[seq_length:] == IMAGE_TOKEN_INDEX).any():
        raise BadSampleError(
            sample.sample_id,
            "too_long",
            f"its {len(input_ids)} tokens do not fit seq_length = {seq_length} and the cut would "
            "remove visual tokens: raise seq_length or split the sample",
        )
    return TokenizedSample(
        sample_id=sample.sample_id, input_ids=input_ids[:seq_length], labels=labels[:seq_length]
    )


def placeholder_sample(sample_id: str) -> TokenizedSample:
    """Return the placeholder of a bad sample: its name and one token without a label."""
    return TokenizedSample(
        sample_id=sample_id,
        input_ids=np.array([PAD_TOKEN_ID], dtype=np.int64),
        labels=np.array([IGNORE_INDEX], dtype=np.int64),
    )


def collate(
    samples: Sequence[ReadySample],
    *,
    num_visual_tokens: int,
    mask_type: MaskType,
    pad_to_multiple_of: int,
    seed: int,
    replace_ratio: float | None,
    image_shape: tuple[int, int, int] | None,
) -> Batch:
    """Lay expanded samples end to end in one pack.

    Args:
        samples: at least one, in order.
        num_visual_tokens: N, visual tokens per image.
        mask_type: causal has no spans; visual has one span per image; prefix has one span per
            sample, up to its first label. As in the released code, a batch without images is
            causal.
        pad_to_multiple_of: the length of the pack is rounded up to a multiple of it.
        seed: of the run; with epoch and name of the sample it gives the seed of each image.
        replace_ratio: share of replaced visual tokens; None: the stage replaces none.
        image_shape: (3, height, width) of pixel_values; None: a batch without pixels.

    Returns:
        Batch on the CPU.
    """
    tokens = [sample.tokens for sample in samples]
    bounds = list(accumulate((len(t.input_ids) for t in tokens), initial=0))
    num_tokens = bounds[-1]
    length = -(-num_tokens // pad_to_multiple_of) * pad_to_multiple_of

    input_ids = np.full(length, PAD_TOKEN_ID, dtype=np.int64)
    labels = np.full(length, IGNORE_INDEX, dtype=np.int64)
    image_starts: list[int] = []
    images_per_sample: list[int] = []
    for t, begin, end in zip(tokens, bounds, bounds[1:], strict=False):
        input_ids[begin:end] = t.input_ids
        labels[begin : end - 1] = t.labels[1:]  # a sample's last token predicts nothing
        # Every N-th visual token begins an image, also when images are adjacent.
        starts = np.flatnonzero(t.input_ids == IMAGE_TOKEN_INDEX)[::num_visual_tokens] + begin
        image_starts += starts.tolist()
        images_per_sample.append(len(starts))

    if mask_type == "visual":
        spans = [(start, start + num_visual_tokens) for start in image_starts]
    elif mask_type == "prefix" and image_starts:
        spans = [
            (begin, begin + first)
            for t, begin in zip(tokens, bounds, strict=False)
            if (first := _first_label(t)) > 0
        ]
    else:
        spans = []

    sample_ids = tuple(t.sample_id for t in tokens)
    image_seeds = tuple(
        image_seed(seed=seed, epoch=s.epoch, sample_id=s.tokens.sample_id, image_index=image_index)
        for s, num_images in zip(samples, images_per_sample, strict=True)
        for image_index in range(num_images)
    )
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        mixed_mask=MixedMask.build(bounds, spans, length=length, sample_ids=sample_ids),
        image_starts=torch.tensor(image_starts, dtype=torch.int64),
        replaced=_draw_replaced(image_seeds, num_visual_tokens, replace_ratio),
        image_seeds=image_seeds,
        pixel_values=_stack_pixels(samples, images_per_sample, image_shape),
        sample_ids=sample_ids,
    )


def _first_label(sample: TokenizedSample) -> int:
    """Return the index of the first supervised token; 0 if there is none."""
    return int(np.argmax(sample.labels != IGNORE_INDEX))


def _draw_replaced(
    image_seeds: Sequence[int], num_visual_tokens: int, replace_ratio: float | None
) -> Tensor:
    """Draw the replaced tokens, bool [n, N]; the set of an image depends on its seed alone."""
    replaced = np.zeros((len(image_seeds), num_visual_tokens), dtype=bool)
    if replace_ratio is not None:
        for row, seed in zip(replaced, image_seeds, strict=True):
            row[:] = select_replaced(num_visual_tokens, replace_ratio, seed=seed)
    return torch.from_numpy(replaced)


def _stack_pixels(
    samples: Sequence[ReadySample],
    images_per_sample: Sequence[int],
    image_shape: tuple[int, int, int] | None,
) -> Tensor | None:
    """Stack the images to uint8 [n, 3, height, width]; n may be 0."""
    if image_shape is None:
        return None
    for sample, num_images in zip(samples, images_per_sample, strict=True):
        assert len(sample.pixel_values) == num_images, sample.tokens.sample_id
    pixels = [image for sample in samples for image in sample.pixel_values]
    if pixels and pixels[0].is_cuda:
        return torch.stack(pixels)
    stacked = host_buffer((len(pixels), *image_shape), torch.uint8)
    return torch.stack(pixels, out=stacked) if pixels else stacked
