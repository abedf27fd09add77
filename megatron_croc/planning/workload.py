"""Distribution of sample lengths, from numbers on the command line or a folder of shards."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING

from megatron_croc.config.run import RunConfig
from megatron_croc.costs.flops import Work
from megatron_croc.errors import ConfigError, DataError
from megatron_croc.planning.memory import Pack

if TYPE_CHECKING:
    import numpy as np

SCANNED = 512
"""Number of samples that are read from a dataset, spread evenly over it."""

CHARACTERS_PER_TOKEN = 4.0
"""Approximate length of a Llama token in English, for counting without a tokenizer."""

_MIDDLES = tuple((n + 0.5) / 100 for n in range(100))
"""Middle of each percentile."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The distribution of samples, as percentiles of equal weight."""

    lengths: tuple[float, ...]
    """Tokens of a sample, visual ones included, cut at seq_length; ascending."""

    images: float
    """Images of a sample, on average."""

    peak_tokens: float
    """Tokens of the longest sample that memory must hold."""

    @property
    def mean(self) -> float:
        """Mean tokens of a sample."""
        return fmean(self.lengths)

    def draw(self, number: int) -> "np.ndarray":
        """Lengths of `number` samples, ascending, float64; tails reach up to `peak_tokens`."""
        import numpy as np  # slow to import: only where samples are drawn

        places = (np.arange(number) + 0.5) / number
        share = (np.arange(len(self.lengths)) + 0.5) / len(self.lengths)
        return np.interp(places, [*share, 1.0], [*self.lengths, self.peak_tokens])

    def work(self, run: RunConfig, samples: float) -> Work:
        """Average work of `samples` such samples."""
        pairs = fmean(length * (length + 1) / 2 for length in self.lengths)
        if run.model.attention_mask_type != "causal":  # prefix: at least the images
            span = run.model.vision_tower.num_visual_tokens
            pairs += self.images * span * (span - 1) / 2
        return Work(
            num_tokens=round(samples * self.mean),
            num_pairs=round(samples * pairs),
            num_labels=round(samples * _text_tokens(run, self.mean, self.images)),
            num_images=round(samples * self.images),
        )

    def pack(self, run: RunConfig) -> Pack:
        """Largest pack of a micro-batch: every sample as long as the longest; full with packing."""
        count = run.training.micro_batch_size
        if run.data.packing:  # the micro-batch counts packs, each of as many samples as fit
            tokens = count * run.data.row_length
            images = max(tokens / self.mean * self.images, 1.0)
        else:
            tokens, images = count * self.peak_tokens, count * max(self.images, 1.0)
        return Pack(tokens=tokens, images=images, labels=_text_tokens(run, tokens, images))


def _text_tokens(run: RunConfig, tokens: float, images: float) -> float:
    """Number of text tokens among `tokens`; each of them may carry a label."""
    return max(tokens - images * run.model.vision_tower.num_visual_tokens, 0.0)


def from_numbers(
    run: RunConfig, *, text_tokens: float, images: float = 1.0, spread: float = 0.5
) -> Workload:
    """Text tokens spread log-normally around a mean.

    Args:
        run: for the visual tokens of an image and seq_length.
        text_tokens: mean text tokens of a sample.
        images: mean images of a sample.
        spread: standard deviation of the log of the text length; 0: all alike.

    Raises:
        ConfigError: a number out of range.
    """
    limits = {"--text-tokens": 1e6, "--images": 1e6, "--text-spread": 10.0}
    for name, value in zip(limits, (text_tokens, images, spread), strict=True):
        if not 0 <= value < limits[name]:
            raise ConfigError(f"{name} {value}: must lie between 0 and {limits[name]:,.0f}")
    if text_tokens + images == 0:
        raise ConfigError("--text-tokens 0 --images 0: a sample of no tokens; give one of them")
    normal = NormalDist()
    text = [math.exp(normal.inv_cdf(p) * spread - spread**2 / 2) * text_tokens for p in _MIDDLES]
    visual = images * run.model.vision_tower.num_visual_tokens
    return _build(run, [length + visual for length in text], images)


def from_shards(run: RunConfig, folder: Path) -> Workload:
    """Samples of a dataset folder; text is counted in characters, no tokenizer is needed.

    Raises:
        DataError: not a finished dataset, or an empty one.
    """
    from megatron_croc.data.store.shards import ShardedDataset  # numpy: only to read samples

    dataset = ShardedDataset(folder)
    count = len(dataset)
    if not count:
        raise DataError(f"{folder}: no samples there; give a dataset with samples to --shards")
    scanned = min(count, SCANNED)
    lengths: list[float] = []
    images: list[int] = []
    for number in range(scanned):
        sample = dataset.read(number * (count - 1) // max(scanned - 1, 1))
        characters = sum(len(text) for text in _texts(sample.conversations))
        images.append(len(sample.image_bytes))
        visual = images[-1] * run.model.vision_tower.num_visual_tokens
        lengths.append(characters / CHARACTERS_PER_TOKEN + visual)
    return _build(run, lengths, fmean(images))


def _texts(conversations: object) -> Iterator[str]:
    for message in conversations if isinstance(conversations, list) else []:
        if isinstance(message, dict):
            yield str(message.get("value", ""))


def _build(run: RunConfig, lengths: Sequence[float], images: float) -> Workload:
    cut = sorted(min(length, run.data.seq_length) for length in lengths)
    return Workload(
        lengths=tuple(_quantile(cut, p) for p in _MIDDLES),
        images=images,
        # One sample in a thousand is longer than its percentiles show; a quarter more covers it.
        peak_tokens=float(min(cut[-1] * 1.25, run.data.seq_length)),
    )


def _quantile(values: Sequence[float], p: float) -> float:
    """Quantile of ascending values, linear between neighbours (numpy's default)."""
    place = p * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def describe(workload: Workload) -> str:
    """Format the main numbers as one line of JSON."""
    return json.dumps(
        {
            "mean_tokens": round(workload.mean),
            "median_tokens": round(_quantile(workload.lengths, 0.5)),
            "p95_tokens": round(_quantile(workload.lengths, 0.95)),
            "planned_longest": round(workload.peak_tokens),
            "images": round(workload.images, 2),
        }
    )
