"""Tokens and images of every replica's micro-batches in the first step, without reading an image.

Replicas differ in them, so some wait for others; the replay scales each replica's kernels by them.
"""

from itertools import chain

import numpy as np

from megatron_croc.config.run import RunConfig
from megatron_croc.data.loader import build_train_plan, packs_of_replica
from megatron_croc.data.order.row_plan import RowStream
from megatron_croc.data.sample.tokenization import build_tokenizer
from megatron_croc.data.store.sample_lengths import SampleLengths
from megatron_croc.errors import DataError
from megatron_croc.rehearsal.job import Rows
from megatron_croc.rehearsal.sizes import Loads, drawn_loads, load_of, workload_of


def replica_loads(run: RunConfig, rows: Rows, *, dp_size: int) -> Loads | None:
    """Work of every replica: tokens for the language model, images for the tower and projector.

    Attention grows faster than tokens; that is left out. None if all micro-batches are equal, or if
    the dataset has no stored lengths.
    """
    if rows.kind == "data":
        return _planned(run, dp_size)
    if rows.kind == "drawn":
        return drawn_loads(run, workload_of(run, rows), dp_size)
    return None


def _planned(run: RunConfig, dp_size: int) -> Loads | None:
    plan, data = build_train_plan(run), run.data
    tokenizer = build_tokenizer(data.tokenizer_type, data.tokenizer_model)
    try:
        lengths = SampleLengths(plan.blend.folders, tokenizer, data.conversation_template)
    except DataError:
        return None
    training = run.training
    packs = RowStream(plan).take(training.global_batch_size)
    loads: Loads = []
    for replica in range(dp_size):
        own = packs_of_replica(
            packs, 0, dp_rank=replica, dp_size=dp_size, micro_batch_size=training.micro_batch_size
        )
        its: list[dict[str, float]] = []
        for members in own:
            slots = list(chain.from_iterable(packs[i] for i in members))
            text, images = lengths(np.array([slot.index for slot in slots]))
            visual = images * run.model.vision_tower.num_visual_tokens
            tokens = np.clip(text + visual, 1, data.seq_length)
            its.append(load_of(float(tokens.sum()), float(images.sum())))
        loads.append(its)
    return loads
