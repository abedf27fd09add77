"""Tokens and images of every replica's micro-batches in the first step, without reading an image.

Replicas differ in them, so some wait for others; the replay scales each replica's kernels by them.
"""

from itertools import chain

import numpy as np

from megatron_croc.config.run import RunConfig
from megatron_croc.data.loader import build_train_plan
from megatron_croc.data.order.row_plan import RowStream
from megatron_croc.data.sample.tokenization import build_tokenizer
from megatron_croc.data.store.sample_lengths import SampleLengths
from megatron_croc.errors import DataError
from megatron_croc.rehearsal.job import Rows
from megatron_croc.rehearsal.rows import drawn_sizes

Loads = list[list[dict[str, float]]]
"""For each replica, for each micro-batch: part of the model -> its work."""


def replica_loads(run: RunConfig, rows: Rows, *, dp_size: int) -> Loads | None:
    """Work of every replica: tokens for the language model, images for the tower and projector.

    Attention grows faster than tokens; that is left out. None if all micro-batches are equal, or if
    the dataset has no stored lengths.
    """
    if rows.kind == "longest":
        return None
    if rows.kind == "drawn":
        count = run.training.global_batch_size // (run.training.micro_batch_size * dp_size)
        return [
            [_load(*map(sum, zip(*drawn_sizes(run, rows, replica, number), strict=True)))
             for number in range(count)]
            for replica in range(dp_size)
        ]  # fmt: skip
    return _planned(run, dp_size)


def _planned(run: RunConfig, dp_size: int) -> Loads | None:
    plan, data = build_train_plan(run), run.data
    tokenizer = build_tokenizer(data.tokenizer_type, data.tokenizer_model)
    try:
        lengths = SampleLengths(plan.blend.folders, tokenizer, data.conversation_template)
    except DataError:
        return None
    micro, total = run.training.micro_batch_size, run.training.global_batch_size
    packs = RowStream(plan).take(total)
    loads: Loads = []
    for replica in range(dp_size):
        its: list[dict[str, float]] = []
        for first in range(replica * micro, total, micro * dp_size):
            slots = list(chain.from_iterable(packs[first : first + micro]))
            text, images = lengths(np.array([slot.index for slot in slots]))
            visual = images * run.model.vision_tower.num_visual_tokens
            tokens = np.clip(text + visual, 1, data.seq_length)
            its.append(_load(float(tokens.sum()), float(images.sum())))
        loads.append(its)
    return loads


def _load(tokens: float, images: float) -> dict[str, float]:
    return {"language_model": tokens, "vision_tower": images, "projector": images}
