"""Stragglers, ranks that the others wait for: stragglers.jsonl, one line per interval.

    {"iteration": 20, "step_seconds": [1.92, ...], "compute_seconds": [1.31, ...],
     "data_wait_seconds": [0.01, ...], "slow": [{"rank": 3, "host": "node1", "cause": "compute",
     "percent": 42.0}]}

The compute time of a rank (vision, matching, forward, backward; no waiting) is compared with the
median of its pipeline stage, whose ranks do the same work. Ranks of one tensor-parallel group wait
for each other inside a layer, so a slow rank also raises the times of its peers. Waiting for data
is compared with the median of all ranks, as a share of the step.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

STRAGGLERS_FILE = "stragglers.jsonl"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Host and pipeline stage of a rank."""

    host: str
    """Host name."""

    stage: int
    """Pipeline stage."""


@dataclass(frozen=True, kw_only=True)
class RankTimes:
    """Mean times of one step in an interval on one rank, seconds."""

    step: float
    """Whole step, without validation and checkpoints."""

    compute: float
    """Computation of the model."""

    data_wait: float
    """Waiting for data."""


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """Slow rank, with cause and size of the delay."""

    rank: int
    host: str
    cause: Literal["compute", "data"]
    """compute: slower than the median of its stage; data: longer waits than the median of all."""

    percent: float
    """Size of the delay, percent of the median compute time or of the step."""

    def __str__(self) -> str:
        """Text such as "rank 3 on node1 computes 42 % longer than the median of its stage"."""
        what = {
            "compute": f"computes {self.percent:.0f} % longer than the median of its stage",
            "data": f"waits for data {self.percent:.0f} % of the step longer than the median",
        }
        return f"rank {self.rank} on {self.host} {what[self.cause]}"


def find_stragglers(
    times: Sequence[RankTimes], places: Sequence[Place], *, percent: float
) -> list[Straggler]:
    """Find ranks that are more than `percent` slower, the slowest of each cause first.

    Args:
        times: times by rank.
        places: host and stage by rank.
        percent: threshold.
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


def stragglers_line(iteration: int, times: Sequence[RankTimes], slow: Sequence[Straggler]) -> str:
    """Line of one interval, as JSON."""
    line = {
        "iteration": iteration,
        **{
            f"{name}_seconds": [round(getattr(own, name), 4) for own in times]
            for name in ("step", "compute", "data_wait")
        },
        "slow": [{**vars(straggler), "percent": round(straggler.percent, 1)} for straggler in slow],
    }
    return json.dumps(line)
