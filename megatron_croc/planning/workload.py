"""Distribution of sample lengths, from numbers on the command line or a folder of shards."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_croc.config.run import RunConfig
from megatron_croc.data.store.shards import ShardedDataset
from megatron_croc.errors import ConfigError
from megatron_croc.planning.flops import Work
from megatron_croc.planning.memory import Pack

SCANNED = 512
"""Number of samples that are read from a dataset, spread evenly over it."""

CHARACTERS_PER_TOKEN = 4.0
"""Approximate length of a Llama token in English, for counting without a tokenizer."""


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
        return float(np.mean(self.lengths))

    def work(self, run: RunConfig, samples: float) -> Work:
        """Average work of `samples` such samples."""
        lengths = np.array(self.lengths)
        pairs = float((lengths * (lengths + 1) / 2).mean())
        if run.model.attention_mask_type != "causal":  # prefix: at least the images
            span = run.model.vision_tower.num_visual_tokens
            pairs += self.images * span * (span - 1) / 2
        return Work(
            num_tokens=round(samples * self.mean),
            num_pairs=round(samples * pairs),
            num_images=round(samples * self.images),
        )

    def pack(self, run: RunConfig) -> Pack:
        """Largest pack of a micro-batch: every sample as long as the longest."""
        samples = run.training.micro_batch_size
        return Pack(tokens=samples * self.peak_tokens, images=samples * max(self.images, 1.0))


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
    for name, value in {"--text-tokens": text_tokens, "--images": images}.items():
        if not 0 <= value < 1e6:
            raise ConfigError(f"{name} {value}: must lie between 0 and 1,000,000")
    quantiles = (np.arange(100) + 0.5) / 100
    from scipy.stats import norm

    text = np.exp(norm.ppf(quantiles) * spread - spread**2 / 2) * text_tokens
    visual = images * run.model.vision_tower.num_visual_tokens
    return _build(run, text + visual, images)


def from_shards(run: RunConfig, folder: Path) -> Workload:
    """Samples of a dataset folder; text is counted in characters, no tokenizer is needed.

    Raises:
        DataError: not a finished dataset.
    """
    dataset = ShardedDataset(folder)
    count = len(dataset)
    numbers = np.unique(np.linspace(0, count - 1, min(count, SCANNED)).astype(int))
    lengths, images = [], []
    for number in numbers:
        sample = dataset.read(int(number))
        characters = sum(len(text) for text in _texts(sample.conversations))
        images.append(len(sample.image_bytes))
        visual = images[-1] * run.model.vision_tower.num_visual_tokens
        lengths.append(characters / CHARACTERS_PER_TOKEN + visual)
    return _build(run, np.array(lengths), float(np.mean(images)))


def _texts(conversations: object) -> Iterator[str]:
    for message in conversations if isinstance(conversations, list) else []:
        if isinstance(message, dict):
            yield str(message.get("value", ""))


def _build(run: RunConfig, lengths: np.ndarray, images: float) -> Workload:
    cut = np.sort(np.minimum(lengths, run.data.seq_length))
    marks = np.quantile(cut, (np.arange(100) + 0.5) / 100)
    return Workload(
        lengths=tuple(float(x) for x in marks),
        images=images,
        # One sample in a thousand is longer than its percentiles show; a quarter more covers it.
        peak_tokens=float(min(cut.max() * 1.25, run.data.seq_length)),
    )


def describe(workload: Workload) -> str:
    """Format the main numbers as one line of JSON."""
    marks = np.quantile(workload.lengths, [0.5, 0.95])
    return json.dumps(
        {
            "mean_tokens": round(workload.mean),
            "median_tokens": round(float(marks[0])),
            "p95_tokens": round(float(marks[1])),
            "planned_longest": round(workload.peak_tokens),
            "images": round(workload.images, 2),
        }
    )
