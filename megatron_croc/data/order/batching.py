"""Arrangements of the samples of a window in packs: separate, grouped by modality, or packed.

Each of them can be balanced: its packs are then put into steps that replicas can share evenly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from megatron_croc.config.data import DataConfig
from megatron_croc.costs.samples import SampleCost
from megatron_croc.data.order.balance import compose_steps
from megatron_croc.data.order.blend import Blend
from megatron_croc.data.order.grouping import GROUPED_WINDOW, group_by_modality_length
from megatron_croc.data.order.packing import pack
from megatron_croc.data.order.permutation import ARRANGE, BALANCE, Permutation
from megatron_croc.data.sample.tokenization import build_tokenizer
from megatron_croc.data.store.sample_lengths import SampleLengths

SEPARATE_WINDOW = 1024
"""Samples of a window without packing or grouping; does not change the order."""

Packs = Sequence[Sequence[int]] | np.ndarray
TokensOf = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Sample numbers -> (tokens, number of images), int64 [m] each."""


class Arranged(NamedTuple):
    """Samples of a window in packs."""

    packs: Packs
    """Indices into the window."""

    tokens: np.ndarray | None = None
    """int64 [n], tokens of each sample; None without packing."""

    costs: np.ndarray | None = None
    """float64 [n], predicted operations of each sample; None without balancing."""


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """A way to arrange the samples of a window in packs."""

    kind: str
    """Description with all parameters; part of the identity of the order."""

    window_size: int
    """Largest number of samples of a window."""

    arrange: Callable[[np.ndarray, int, int], Arranged]
    """(sample numbers of a window, samples before the window, packs before it) -> packs."""

    one_sample_per_pack: bool = True

    by_modality: bool = False
    """Whole steps hold samples with images only, or without only."""

    digest: str = ""
    """Digest of the sample lengths that the packs depend on; empty: they depend on none."""


def separate() -> Arrangement:
    """Arrange one sample per pack, in the order of the blend."""
    return Arrangement(
        kind="separate samples",
        window_size=SEPARATE_WINDOW,
        arrange=lambda index, *_: Arranged(np.arange(len(index))[:, None]),
    )


def grouped(
    tokens_of: TokensOf,
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

    def arrange(index: np.ndarray, begin: int, _: int) -> Arranged:
        tokens, images = tokens_of(index)
        order = group_by_modality_length(
            tokens,
            images > 0,
            global_batch_size=global_batch_size,
            begin=begin,
            key=(ARRANGE, seed, begin),
        )
        return Arranged(order[:, None])

    return Arrangement(
        kind=f"steps of {global_batch_size} grouped by modality and length",
        window_size=GROUPED_WINDOW * global_batch_size,
        arrange=arrange,
        by_modality=True,
    )


def packed(
    tokens_of: TokensOf,
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

    def arrange(index: np.ndarray, begin: int, _: int) -> Arranged:
        tokens = tokens_of(index)[0]
        packs = pack(tokens.tolist(), packing_length)
        shuffled = Permutation(len(packs), (ARRANGE, seed, begin))(np.arange(len(packs)))
        return Arranged([packs[i] for i in shuffled], tokens)

    return Arrangement(
        kind=f"packs of {packing_length} tokens from {packing_buffer_size} samples ({measured})",
        window_size=packing_buffer_size,
        arrange=arrange,
        one_sample_per_pack=False,
    )


def balanced(
    base: Arrangement,
    tokens_of: TokensOf,
    *,
    cost: SampleCost,
    replicas: int,
    global_batch_size: int,
    seed: int,
) -> Arrangement:
    """Put the packs of another arrangement into steps that replicas can share evenly.

    Args:
        base: separate, grouped or packed samples. Steps of grouped samples keep one modality; their
            samples are drawn by cost in place of length.
        tokens_of: sample numbers -> (tokens, number of images), int64 [m] each.
        cost: predicted operations of a sample.
        replicas: number of replicas to balance for; divides global_batch_size.
        global_batch_size: packs of one optimizer step.
        seed: of the order.
    """

    def arrange(index: np.ndarray, begin: int, packs_before: int) -> Arranged:
        packs, planned_tokens, _ = base.arrange(index, begin, packs_before)
        tokens, images = tokens_of(index)
        costs = cost(tokens, images)
        sizes = [len(pack) for pack in packs]
        members = np.concatenate([np.asarray(pack, dtype=np.int64) for pack in packs])
        starts = np.cumsum([0, *sizes[:-1]])
        order = compose_steps(
            np.add.reduceat(costs[members], starts),
            images[members[starts]] > 0 if base.by_modality else np.zeros(len(packs), dtype=bool),
            global_batch_size=global_batch_size,
            replicas=replicas,
            begin=packs_before,
            key=(BALANCE, seed, begin),
        )
        ordered = packs[order] if isinstance(packs, np.ndarray) else [packs[i] for i in order]
        return Arranged(ordered, planned_tokens, costs)

    steps = f"steps of {global_batch_size} balanced for {replicas} replicas by {cost}"
    one_each = base.one_sample_per_pack
    return replace(
        base,
        kind=f"{base.kind}, {steps}",
        window_size=GROUPED_WINDOW * global_batch_size if one_each else base.window_size,
        arrange=arrange,
    )


def build_arrangement(
    data: DataConfig,
    blend: Blend,
    *,
    num_visual_tokens: int,
    global_batch_size: int,
    seed: int,
    cost: SampleCost | None = None,
) -> Arrangement:
    """Choose the arrangement that the settings ask for: separate, packed or grouped samples.

    Args:
        data: packing, grouping, balancing, tokenizer and template.
        blend: sources of the samples.
        num_visual_tokens: N, visual tokens per image.
        global_batch_size: packs of one optimizer step.
        seed: of the order of packs and batches in a window.
        cost: predicted operations of a sample; needed for balancing only.

    Raises:
        DataError: the data lacks the sample lengths that packing, grouping and balancing need.
    """
    if not (data.packing or data.group_by_modality_length or data.balance_replicas):
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
    elif data.group_by_modality_length:
        arrangement = grouped(tokens_of, global_batch_size=global_batch_size, seed=seed)
    else:
        arrangement = separate()
    if data.balance_replicas:
        assert cost is not None
        arrangement = balanced(
            arrangement,
            tokens_of,
            cost=cost,
            replicas=data.balance_replicas,
            global_batch_size=global_batch_size,
            seed=seed,
        )
    return replace(arrangement, digest=lengths.digest)
