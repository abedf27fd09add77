"""Arrangements of the samples of a window in packs: separate, grouped by modality, or packed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_croc.config.data import DataConfig
from megatron_croc.data.order.blend import Blend
from megatron_croc.data.order.grouping import group_by_modality_length
from megatron_croc.data.order.packing import pack
from megatron_croc.data.order.permutation import ARRANGE, Permutation
from megatron_croc.data.sample.tokenization import build_tokenizer
from megatron_croc.data.store.sample_lengths import SampleLengths

SEPARATE_WINDOW = 1024
"""Samples of a window without packing or grouping; does not change the order."""

GROUPED_WINDOW = 64
"""Optimizer steps of a window when samples are grouped; at most one mixes modalities."""

Packs = Sequence[Sequence[int]] | np.ndarray
Arranged = tuple[Packs, np.ndarray | None]
"""Packs as indices into the window, and tokens of each sample (None without packing)."""


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """A way to arrange the samples of a window in packs."""

    kind: str
    """Description with all parameters; part of the identity of the order."""

    window_size: int
    """Largest number of samples of a window."""

    arrange: Callable[[np.ndarray, int], Arranged]
    """(sample numbers of a window, number of samples before the window) -> packs."""

    one_sample_per_pack: bool = True

    digest: str = ""
    """Digest of the sample lengths that the packs depend on; empty: they depend on none."""


def separate() -> Arrangement:
    """Arrange one sample per pack, in the order of the blend."""
    return Arrangement(
        kind="separate samples",
        window_size=SEPARATE_WINDOW,
        arrange=lambda index, _: (np.arange(len(index))[:, None], None),
    )


def grouped(
    tokens_of: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    *,
    global_batch_size: int,
    seed: int,
) -> Arrangement:
    """Arrange one sample per pack, in steps of one modality, long samples first.

    Args:
        tokens_of: sample numbers -> (tokens, number of images), int64 [m] each.
        global_batch_size: samples of one optimizer step.
        seed: of the order of steps.
    """

    def arrange(index: np.ndarray, begin: int) -> Arranged:
        tokens, images = tokens_of(index)
        order = group_by_modality_length(
            tokens,
            images > 0,
            global_batch_size=global_batch_size,
            begin=begin,
            key=(ARRANGE, seed, begin),
        )
        return order[:, None], None

    return Arrangement(
        kind=f"steps of {global_batch_size} grouped by modality and length",
        window_size=GROUPED_WINDOW * global_batch_size,
        arrange=arrange,
    )


def packed(
    tokens_of: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    *,
    packing_length: int,
    packing_buffer_size: int,
    measured: str,
    seed: int,
) -> Arrangement:
    """Arrange several samples per pack, packs in shuffled order.

    Args:
        tokens_of: sample numbers -> (tokens, number of images), int64 [m] each.
        packing_length: most tokens of a pack.
        packing_buffer_size: samples of a window.
        measured: description of the tokens that `tokens_of` counts.
        seed: of the order of packs.
    """

    def arrange(index: np.ndarray, begin: int) -> Arranged:
        tokens = tokens_of(index)[0]
        packs = pack(tokens.tolist(), packing_length)
        shuffled = Permutation(len(packs), (ARRANGE, seed, begin))(np.arange(len(packs)))
        return [packs[i] for i in shuffled], tokens

    return Arrangement(
        kind=f"packs of {packing_length} tokens from {packing_buffer_size} samples ({measured})",
        window_size=packing_buffer_size,
        arrange=arrange,
        one_sample_per_pack=False,
    )


def build_arrangement(
    data: DataConfig,
    blend: Blend,
    *,
    num_visual_tokens: int,
    global_batch_size: int,
    seed: int,
) -> Arrangement:
    """Choose the arrangement that the settings ask for: separate, packed or grouped samples.

    Args:
        data: packing, grouping, tokenizer and template.
        blend: sources of the samples.
        num_visual_tokens: N, visual tokens per image.
        global_batch_size: packs of one optimizer step.
        seed: of the order of packs and batches in a window.

    Raises:
        DataError: the data lacks the sample lengths that packing and grouping need.
    """
    if not (data.packing or data.group_by_modality_length):
        return separate()
    tokenizer = build_tokenizer(data.tokenizer_type, data.tokenizer_model)
    lengths = SampleLengths(blend.folders, tokenizer, data.conversation_template)

    def tokens_of(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        text, images = lengths(index)
        return np.clip(text + images * num_visual_tokens, 1, data.seq_length), images

    if data.packing:
        arrangement = packed(
            tokens_of,
            packing_length=data.row_length,
            packing_buffer_size=data.packing_buffer_size,
            measured=f"at most {data.seq_length} tokens each, {num_visual_tokens} for an image",
            seed=seed,
        )
    else:
        arrangement = grouped(tokens_of, global_batch_size=global_batch_size, seed=seed)
    return replace(arrangement, digest=lengths.digest)
