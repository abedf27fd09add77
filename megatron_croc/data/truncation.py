"""Account of the tokens that seq_length cuts off: of a sample, and of the samples of a source.

tokens of a sample --Extent--> uncut length, places of its labels
Extent, seq_length ----------> too long? labels lost? an answer left to learn from?
"""

import math
import threading
from collections import Counter
from dataclasses import dataclass

import numpy as np

from megatron_croc.log import get_logger

FIRST_TOLD = 32
"""Number of samples of a source after which its truncation is told for the first time; then ten
times as many, and so on."""

KEPT_SHARE = 0.99
"""Share of samples that the proposed seq_length keeps whole."""

ROUNDED_TO = 64
"""A proposed seq_length is a multiple of it."""

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Places of a whole sample's labels, visual tokens included, before anything is cut."""

    length: int
    """Tokens of the sample."""

    images_end: int
    """Position after the last visual token; 0 without images."""

    labels: np.ndarray
    """int64 [k], positions of the tokens that have a loss; ascending."""

    answer: int
    """Position of the first token of the first answer; 0 if it is not known."""

    def labels_lost(self, seq_length: int) -> int:
        """Count the labels that training loses: those behind the cut, or all if it is unusable."""
        if self.splits_images(seq_length) or not self.teaches(seq_length):
            return len(self.labels)
        return int(len(self.labels) - np.searchsorted(self.labels, seq_length))

    def teaches(self, seq_length: int) -> bool:
        """Return True if a token of an answer is left to learn from."""
        return bool(len(self.labels)) and max(self.answer, int(self.labels[0])) < seq_length

    def splits_images(self, seq_length: int) -> bool:
        """Return True if the cut would remove visual tokens."""
        return self.images_end > seq_length


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A sample that is longer than seq_length."""

    sample_id: str
    length: int
    """Tokens before the cut."""

    num_labels_lost: int
    """Labels behind the cut; all of them if the sample is unusable."""

    @classmethod
    def of(cls, sample_id: str, extent: Extent, seq_length: int) -> "Cut":
        """Describe the cut of a sample."""
        lost = extent.labels_lost(seq_length)
        return cls(sample_id=sample_id, length=extent.length, num_labels_lost=lost)


class TruncationCount:
    """Counts what seq_length cut off from the samples of one source."""

    def __init__(self, seq_length: int) -> None:
        """Args: seq_length: tokens that are kept of a sample."""
        self.seq_length = seq_length
        self.num_samples = 0
        self.num_labels = 0
        """Labels of all samples, before the cut."""
        self.num_labels_lost = 0
        self.num_without_answer = 0
        """Samples without a token of an answer before the cut."""
        self.num_images_split = 0
        """Samples whose images do not fit, which are unusable."""
        self._lengths: Counter[int] = Counter()

    def add(self, extent: Extent) -> None:
        """Count one sample. An unusable one loses all its labels."""
        splits, teaches = extent.splits_images(self.seq_length), extent.teaches(self.seq_length)
        self.num_samples += 1
        self.num_labels += len(extent.labels)
        self.num_labels_lost += extent.labels_lost(self.seq_length)
        self.num_images_split += splits
        self.num_without_answer += not splits and not teaches
        self._lengths[extent.length] += 1

    def merge(self, other: "TruncationCount") -> None:
        """Add the counts of another part of the source."""
        for name in (
            "num_samples", "num_labels", "num_labels_lost", "num_without_answer", "num_images_split"
        ):  # fmt: skip
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self._lengths.update(other._lengths)

    @property
    def num_cut(self) -> int:
        """Number of samples that are longer than seq_length."""
        return sum(n for length, n in self._lengths.items() if length > self.seq_length)

    @property
    def share_lost(self) -> float:
        """Share of all labels that is lost."""
        return self.num_labels_lost / max(self.num_labels, 1)

    def quantile(self, share: float) -> int:
        """Return the smallest length that `share` of the samples do not exceed; 0 without any."""
        left = math.ceil(share * self.num_samples)
        for length in sorted(self._lengths):
            left -= self._lengths[length]
            if left <= 0:
                return length
        return 0

    @property
    def proposed_seq_length(self) -> int:
        """The seq_length that keeps KEPT_SHARE of the samples whole."""
        return -(-self.quantile(KEPT_SHARE) // ROUNDED_TO) * ROUNDED_TO

    def as_tree(self) -> dict[str, float]:
        """Return the counts for a JSON file."""
        return {
            "seq_length": self.seq_length,
            "num_samples": self.num_samples,
            "num_cut": self.num_cut,
            "num_without_answer": self.num_without_answer,
            "num_images_split": self.num_images_split,
            "share_of_labels_lost": round(self.share_lost, 6),
        }

    def describe(self) -> str:
        """Say in one line what is lost, and the seq_length that would keep it."""
        parts = [
            f"{self.num_cut} of {self.num_samples} samples are longer than "
            f"seq_length = {self.seq_length}; {self.share_lost:.1%} of the labels are lost"
        ]
        if self.num_without_answer:
            parts.append(f"{self.num_without_answer} samples keep no token of an answer")
        if self.num_images_split:
            parts.append(f"the images of {self.num_images_split} samples do not fit")
        if self.num_cut > (1 - KEPT_SHARE) * self.num_samples:
            parts.append(
                f"--seq-length {self.proposed_seq_length} would keep {KEPT_SHARE:.0%} of the "
                "samples whole"
            )
        return "; ".join(parts)


class TruncationLog:
    """Counts the samples that a loader builds, and logs what their sources lose. Thread-safe."""

    def __init__(self, seq_length: int) -> None:
        """Args: seq_length: tokens that are kept of a sample."""
        self._seq_length = seq_length
        self._counts: dict[str, TruncationCount] = {}
        self._lock = threading.Lock()

    def add(self, source: str, extent: Extent) -> None:
        """Count one sample of a source; log after FIRST_TOLD, and each time at ten times more."""
        with self._lock:
            count = self._counts.setdefault(source, TruncationCount(self._seq_length))
            count.add(extent)
            if count.num_cut and _is_due(count.num_samples):
                logger.warning("source %s: %s", source, count.describe())


def _is_due(num_samples: int) -> bool:
    """Return True for FIRST_TOLD times a power of ten."""
    times, rest = divmod(num_samples, FIRST_TOLD)
    return rest == 0 and str(times).strip("0") == "1"
