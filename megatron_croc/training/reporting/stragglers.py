"""Which ranks make the others wait: stragglers.jsonl, a line per interval.

    {"iteration": 20, "step_seconds": [1.92, ...], "compute_seconds": [1.31, ...],
     "data_wait_seconds": [0.01, ...], "slow": [{"rank": 3, "host": "node1", "cause": "compute",
     "percent": 42.0}]}

A rank is compared with the ranks of its own pipeline stage, which do the same work: its compute
time (vision, matching, forward, backward; no waiting) against their median. Ranks of one
tensor-parallel group wait for each other inside a layer, so there a slow one slows its peers' times
too. Data waiting is compared with the median of all ranks, as a share of the step.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

STRAGGLERS_FILE = "stragglers.jsonl"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank is."""

    host: str
    """Name of its machine."""

    stage: int
    """Its pipeline stage."""


@dataclass(frozen=True, kw_only=True)
class RankTimes:
    """Mean seconds of one step of an interval on one rank."""

    step: float
    """The whole step, without validation and checkpoints."""

    compute: float
    """Work on the model."""

    data_wait: float
    """Waiting for data."""


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """A rank that is slow, and how."""

    rank: int
    host: str
    cause: Literal["compute", "data"]
    """Slower work than its stage's median, or longer waits for data than everyone's median."""

    percent: float
    """By how much: of the median compute time, or of the step."""

    def __str__(self) -> str:
        """rank 3 on node1 computes 42 % longer than its peers."""
        what = {
            "compute": f"computes {self.percent:.0f} % longer than the median of its stage",
            "data": f"waits for data {self.percent:.0f} % of the step longer than the median",
        }
        return f"rank {self.rank} on {self.host} {what[self.cause]}"


def find_stragglers(
    times: Sequence[RankTimes], places: Sequence[Place], *, percent: float
) -> list[Straggler]:
    """Ranks that are more than `percent` slower, the slowest of each cause first.

    Args:
        times: by rank.
        places: by rank.
        percent: how much slower is slow.
    """
    slow: list[Straggler] = []
    by_stage: dict[int, list[float]] = {}
    for own, place in zip(times, places, strict=True):
        by_stage.setdefault(place.stage, []).append(own.compute)
    medians = {stage: statistics.median(group) for stage, group in by_stage.items()}
    usual_wait = statistics.median(own.data_wait for own in times)
    for rank, (own, place) in enumerate(zip(times, places, strict=True)):
        usual = medians[place.stage]
        longer = {
            "compute": (own.compute - usual) / usual if usual > 0 else 0.0,
            "data": (own.data_wait - usual_wait) / own.step if own.step > 0 else 0.0,
        }
        slow += [
            Straggler(rank=rank, host=place.host, cause=cause, percent=100.0 * share)  # type: ignore[arg-type]
            for cause, share in longer.items()
            if 100.0 * share > percent
        ]
    return sorted(slow, key=lambda straggler: (straggler.cause, -straggler.percent))


def append_stragglers(
    folder: Path, iteration: int, times: Sequence[RankTimes], slow: Sequence[Straggler]
) -> None:
    """Add an interval's line."""
    line = {
        "iteration": iteration,
        **{
            f"{name}_seconds": [round(getattr(own, name), 4) for own in times]
            for name in ("step", "compute", "data_wait")
        },
        "slow": [{**vars(straggler), "percent": round(straggler.percent, 1)} for straggler in slow],
    }
    with (folder / STRAGGLERS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
