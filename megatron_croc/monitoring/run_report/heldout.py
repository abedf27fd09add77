"""One pack of held-out samples under each attention mask, built by the code of training."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_croc.config.model import MaskType
from megatron_croc.config.run import RunConfig
from megatron_croc.data.batch import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Batch
from megatron_croc.data.batch_builder import BatchBuilder, build_batch_builder
from megatron_croc.data.order.blend import read_blend
from megatron_croc.data.order.row_plan import Slot
from megatron_croc.errors import DataError

MASK_TYPES: tuple[MaskType, ...] = ("causal", "prefix", "visual")

TEXT, IMAGE, ANSWER, PADDING = range(4)
"""Kinds of positions; ANSWER is text that has a loss."""

NUM_SAMPLES = 3
SCANNED = 64
"""Number of held-out samples that are searched for a representative pack."""

ROW_MULTIPLE = 64
"""Multiple to which the pack is padded, to show padding in the picture (training pads less)."""


@dataclass(frozen=True, kw_only=True)
class MaskedPack:
    """One pack of T positions under each mask."""

    visible: dict[str, np.ndarray]
    """Mask type -> bool [T, T], row = query."""

    kinds: np.ndarray
    """int [T]: TEXT, IMAGE, ANSWER or PADDING."""

    bounds: list[int]
    """Segment boundaries: begin of every sample, then the end of the last one."""

    image_spans: list[tuple[int, int]]
    """[begin, end) of every image."""


def build_masked_pack(run: RunConfig) -> MaskedPack:
    """Lay a few samples of `run`'s held-out data in one pack, once for each mask type.

    Raises:
        DataError: the held-out data or the tokenizer are damaged.
    """
    positions = _telling_samples(_builder(run, "causal"))
    slots = [Slot(epoch=0, index=position) for position in positions]
    batches = {mask: _builder(run, mask).build(slots)[0] for mask in MASK_TYPES}
    batch = batches["causal"]
    num_tokens = run.model.vision_tower.num_visual_tokens
    return MaskedPack(
        visible={mask: b.mixed_mask.visible().numpy() for mask, b in batches.items()},
        kinds=token_kinds(batch),
        bounds=batch.mixed_mask.cu_seqlens.tolist(),
        image_spans=[(start, start + num_tokens) for start in batch.image_starts.tolist()],
    )


def token_kinds(batch: Batch) -> np.ndarray:
    """int [T], what stands at each position."""
    kinds = np.full(batch.input_ids.numel(), TEXT)
    kinds[batch.input_ids.numpy() == IMAGE_TOKEN_INDEX] = IMAGE
    predicts = np.flatnonzero(batch.labels.numpy() != IGNORE_INDEX)
    kinds[predicts + 1] = ANSWER  # labels are shifted: position t predicts the token after it
    kinds[int(batch.mixed_mask.cu_seqlens[-1]) :] = PADDING
    return kinds


def _builder(run: RunConfig, mask_type: MaskType) -> BatchBuilder:
    run = copy.deepcopy(run)
    run.model.attention_mask_type = mask_type
    folders = read_blend(run.data.valid_data_path).folders
    return build_batch_builder(run, folders, pad_to_multiple_of=ROW_MULTIPLE)


def _telling_samples(builder: BatchBuilder) -> Sequence[int]:
    """One sample with an image, one without, one with several, as far as the data has them.

    The shortest of each kind, so that the picture stays readable; filled up with short ones.
    """
    sizes: list[tuple[int, int, int]] = []
    for position in range(min(SCANNED, builder.num_samples)):
        batch, bad = builder.build([Slot(epoch=0, index=position)])
        if not bad:
            sizes.append((int(batch.mixed_mask.cu_seqlens[-1]), batch.num_images, position))
    sizes.sort()
    is_kind = (lambda n: n == 1, lambda n: n == 0, lambda n: n > 1)
    firsts = [next((p for _, n, p in sizes if wanted(n)), None) for wanted in is_kind]
    chosen = [position for position in firsts if position is not None]
    chosen += [p for _, n, p in sizes if p not in chosen and n > 0]
    if not chosen:
        raise DataError("none of the first held-out samples can be read: verify the shards")
    return chosen[:NUM_SAMPLES]
