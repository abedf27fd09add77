"""Errors, counts and the limit of samples that cannot be trained on.

A bad sample keeps its slot in the order (an empty placeholder takes its place), so one broken
image neither ends a run nor shifts every sample after it. Each bad sample is logged by name and
kind. When their share of all samples exceeds a limit, the run stops and lists the first few.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Literal

from megatron_croc.best_effort import BestEffort
from megatron_croc.errors import DataError, one_line
from megatron_croc.log import get_logger

BadKind = Literal[
    "record",
    "roles",
    "no_answer",
    "image_marks",
    "missing_image",
    "missing_caption",
    "image",
    "too_long",
    "no_label",
    "duplicate_key",
    "unsafe_member",
    "damaged_tar",
    "dotted_key",
    "other_split",
]

MIN_SAMPLES_TO_JUDGE = 100
"""Number of samples seen below which bad samples never end a run."""

MIN_ALL_BAD = 3
"""Number of samples seen below which a run never ends, also if all of them are bad."""

UNLIKELY = 1e-5
"""Probability below which an unbroken row of bad samples from the start is no chance: the run then
ends before MIN_SAMPLES_TO_JUDGE."""

NUM_LISTED = 5
"""Number of bad samples quoted in the error that ends a run."""

logger = get_logger(__name__)


class BadSampleError(DataError):
    """Error of one unusable sample; other samples are not affected."""

    def __init__(self, sample_id: str, kind: BadKind, reason: str) -> None:
        """Args: sample_id: name of the sample. kind: key of its count. reason: the fault."""
        # A reason may quote names and text of the sample: ends of lines, half surrogate pairs.
        reason = one_line(reason)
        super().__init__(f"sample {one_line(sample_id)}: {reason}")
        self.sample_id = sample_id
        self.kind: BadKind = kind
        self.reason = reason

    @property
    def source(self) -> str:
        """Name of the dataset: the sample id without its key."""
        return self.sample_id.rpartition("/")[0]

    def __reduce__(self) -> tuple:
        """Pickle all fields: by default an exception pickles its message only."""
        return BadSampleError, (self.sample_id, self.kind, self.reason)


class BadSampleBudget:
    """Counts bad samples by kind, logs each, and ends the run when their share is too large."""

    def __init__(self, max_bad_fraction: float, *, report: Path | None = None) -> None:
        """Start counting.

        Args:
            max_bad_fraction: largest allowed share of bad samples among the samples seen.
            report: file that gets a JSON line for each bad sample.
        """
        self.max_bad_fraction = max_bad_fraction
        self.report = report
        self._effort = BestEffort(str(report))
        self.num_seen = 0
        self.counts: Counter[str] = Counter()
        self.source_counts: Counter[str] = Counter()
        self._first: list[BadSampleError] = []

    @property
    def num_bad(self) -> int:
        """Number of bad samples so far."""
        return sum(self.counts.values())

    def record(self, num_samples: int, bad: list[BadSampleError]) -> None:
        """Count `num_samples` more samples, of which `bad` are unusable.

        Raises:
            DataError: the share of bad samples among at least MIN_SAMPLES_TO_JUDGE is too large, or
                all samples so far are bad and that is no chance (UNLIKELY).
        """
        self.num_seen += num_samples
        for error in bad:
            self.counts[error.kind] += 1
            self.source_counts[error.source] += 1
            self._write(error)
            self._first = [*self._first, error][:NUM_LISTED]
            logger.warning(
                "bad sample (%s), %d of %d so far: %s",
                error.kind,
                self.num_bad,
                self.num_seen,
                error,
            )
        if self.num_bad <= self.max_bad_fraction * self.num_seen:
            return
        # Samples that are bad independently at the allowed rate: n of n with the n-th power of it.
        all_bad = self.num_bad == self.num_seen and (
            self.num_seen >= MIN_ALL_BAD and self.max_bad_fraction**self.num_seen < UNLIKELY
        )
        if all_bad:
            raise DataError(
                f"all {self.num_seen} samples so far are bad ({self._summary()}); the first: "
                f"{self._first[0]}"
            )
        if self.num_seen >= MIN_SAMPLES_TO_JUDGE:
            listed = "\n".join(f"  {error}" for error in self._first)
            raise DataError(
                f"{self.num_bad} of {self.num_seen} samples are bad ({self._summary()}), more "
                f"than max_bad_fraction = {self.max_bad_fraction}. The first ones:\n{listed}\n"
                "Fix or remove them and run croc data preprocess again, or raise "
                "max_bad_fraction"
            )

    def _summary(self) -> str:
        """Format the counts by kind and by source."""
        kinds = ", ".join(f"{kind}: {count}" for kind, count in self.counts.most_common())
        sources = ", ".join(f"{name}: {n}" for name, n in self.source_counts.most_common())
        return f"{kinds}; {sources}"

    def _write(self, error: BadSampleError) -> None:
        """Append one line to the report; a resumed run adds to the same file."""
        if self.report is None:
            return
        entry = {"sample": error.sample_id, "kind": error.kind, "reason": error.reason}
        with self._effort:
            self.report.parent.mkdir(parents=True, exist_ok=True)
            with open(self.report, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
