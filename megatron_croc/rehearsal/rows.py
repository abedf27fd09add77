"""Micro-batches of one replica: from the run's own plan of its data, or made to a given length."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean

import numpy as np
import torch

from megatron_croc.config.run import RunConfig
from megatron_croc.data.batch import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Batch
from megatron_croc.data.loader import build_train_loader
from megatron_croc.data.sample.collate import ReadySample, expand_sample
from megatron_croc.data.sample.tokenization import TokenizedSample
from megatron_croc.data.synthetic import make_batch
from megatron_croc.planning.memory import Pack
from megatron_croc.rehearsal.job import Rows
from megatron_croc.rehearsal.sizes import QUESTION, step_sizes, workload_of


class Replay(Iterator[Batch]):
    """Loader over batches that exist already, for BatchBroadcaster."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        """Hand out `batches` in their order, again and again."""
        self._batches, self._next, self.state = list(batches), 0, None

    def __next__(self) -> Batch:
        """Return the next batch."""
        batch = self._batches[self._next % len(self._batches)]
        self._next += 1
        return batch


def make_rows(run: RunConfig, rows: Rows, *, dp_rank: int, dp_size: int) -> list[Batch]:
    """Micro-batches of the first step of one replica, on the CPU.

    Raises:
        DataError: the data of the run is missing, damaged or does not fit.
    """
    if rows.kind == "data":
        count = run.training.global_batch_size // (run.training.micro_batch_size * dp_size)
        data = replace(run.data, num_workers=0, bad_sample_report=None)
        with build_train_loader(
            replace(run, data=data), dp_rank=dp_rank, dp_size=dp_size, state=None
        ) as loader:
            return [next(loader) for _ in range(count)]
    workload = workload_of(run, rows)
    step = step_sizes(run, rows.kind, workload, dp_rank=dp_rank, dp_size=dp_size)
    batches = []
    for number, sizes in enumerate(step):
        rng = np.random.default_rng((run.training.seed, dp_rank, number))
        batches.append(make_batch(run, [_sample(run, rng, *size) for size in sizes]))
    return batches


def _sample(run: RunConfig, rng: np.random.Generator, tokens: int, num_images: int) -> ReadySample:
    """Sample of `tokens` tokens with visual ones: images first, then text."""
    per_image, size = run.model.vision_tower.num_visual_tokens, run.model.vision_tower.img_size
    num_images = min(num_images, max(run.data.seq_length - QUESTION - 1, 0) // per_image)
    text = max(tokens - num_images * per_image, QUESTION + 1)
    ids = rng.integers(1, run.model.language_model.vocab_size, text).tolist()
    question = [IMAGE_TOKEN_INDEX] * num_images + ids[:QUESTION]
    sample = TokenizedSample(
        sample_id="rehearsed",
        input_ids=np.array(question + ids[QUESTION:]),
        labels=np.array([IGNORE_INDEX] * len(question) + ids[QUESTION:]),
    )
    pixels = torch.zeros((num_images, 3, size, size), dtype=torch.uint8)
    return ReadySample(
        tokens=expand_sample(sample, num_visual_tokens=per_image, seq_length=run.data.seq_length),
        epoch=0,
        pixel_values=list(pixels),
    )


def largest_pack(batches: Sequence[Batch]) -> Pack:
    """Sizes that no micro-batch exceeds, as the memory estimate takes them."""
    return Pack(
        tokens=max(batch.mixed_mask.length for batch in batches),
        images=max(batch.num_images for batch in batches),
        labels=max(batch.num_label_tokens for batch in batches),
    )


def describe_rows(batches: Sequence[Batch]) -> dict[str, float]:
    """Numbers for the report: micro-batches, and their mean and largest sizes."""
    lengths = [batch.mixed_mask.length for batch in batches]
    return {
        "micro_batches": len(batches),
        "mean_tokens": fmean(lengths),
        "most_tokens": max(lengths),
        "images": sum(batch.num_images for batch in batches),
    }
