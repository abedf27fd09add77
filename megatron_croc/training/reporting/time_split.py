"""Time of an interval by region over all ranks, and the times that stragglers are found from.

each rank's stopwatch --one small all-gather per interval--> shares (mean, max), stragglers,
                                                              imbalance of the replicas in each step
"""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from torch import nn

from megatron_croc.config.logging import LoggingConfig
from megatron_croc.data.order.balance import imbalance
from megatron_croc.parallel.collectives import all_gather
from megatron_croc.parallel.device import to_device
from megatron_croc.parallel.stopwatch import (
    MEGATRON_TIMERS,
    REGIONS,
    MegatronTimers,
    drop_stopwatch,
    start_stopwatch,
)
from megatron_croc.training.reporting.stragglers import Place, RankTimes

_PAUSES = ("checkpoint", "validation")
"""Regions that are not part of a step."""


@dataclass(frozen=True, kw_only=True)
class IntervalTimes:
    """Seconds of one interval, by region and rank."""

    ranks: list[dict[str, float]]
    """By rank: every region, and at timing_log_level 2 every megatron timer."""

    num_steps: int
    """Number of optimizer steps of the interval; positive."""

    step_compute: Sequence[Sequence[float]] = ()
    """By rank: compute seconds of each step."""

    stages: Sequence[int] = ()
    """By rank: pipeline stage; empty: there is one replica, nothing to compare."""

    def row(self) -> dict[str, float]:
        """Entries of a line of metrics.jsonl."""
        row: dict[str, float] = {"interval_seconds": max(_total(rank) for rank in self.ranks)}
        for name in REGIONS:
            shares = [rank[name] / max(_total(rank), 1e-9) for rank in self.ranks]
            if max(shares) > 0:
                row[f"time_share/{name}"] = sum(shares) / len(shares)
                row[f"time_share_max/{name}"] = max(shares)
        for name in _PAUSES:
            if longest := max(rank[name] for rank in self.ranks):
                row[f"{name}_seconds"] = longest
        for name in MEGATRON_TIMERS:
            seconds = [rank.get(name, 0.0) / self.num_steps for rank in self.ranks]
            if max(seconds) > 0:
                row[f"timers/{name}"] = sum(seconds) / len(seconds)
                row[f"timers_max/{name}"] = max(seconds)
        if self.stages and self.step_compute:
            row["imbalance_seen"] = self.imbalance()
        return row

    def imbalance(self) -> float:
        """Compute time of the slowest replica above the mean, as a share; mean over the steps.

        Ranks are compared inside their pipeline stage; the stage that is furthest apart counts.
        """
        seconds, stages = np.array(self.step_compute), np.array(self.stages)
        return fmean(
            max(imbalance(step[stages == stage]) for stage in set(self.stages))
            for step in seconds.T
        )

    def rank_times(self) -> list[RankTimes]:
        """Seconds per step that stragglers are found from, by rank."""
        return [
            RankTimes(
                step=(_total(rank) - sum(rank[name] for name in _PAUSES)) / self.num_steps,
                compute=_compute(rank) / self.num_steps,
                data_wait=rank["data_wait"] / self.num_steps,
            )
            for rank in self.ranks
        ]


class TimeSplit:
    """Stopwatch of this rank, and the exchange of its times with all other ranks."""

    def __init__(
        self, config: LoggingConfig, chunks: Sequence[nn.Module], pg: ProcessGroupCollection
    ) -> None:
        """Start the stopwatch. Every rank must call it.

        Args:
            config: its timing_log_level is 1 or 2.
            chunks: this rank's model chunks, which share one configuration.
            pg: process groups.
        """
        self._watch = start_stopwatch()
        by_name = config.timing_log_level > 1
        self._names = [*REGIONS, *(MEGATRON_TIMERS if by_name else ())]
        timers = MegatronTimers(self._watch, is_pipelined=pg.pp.size() > 1, by_name=by_name)
        get_model_config(chunks[0]).timers = timers
        own = Place(host=socket.gethostname(), stage=pg.pp.rank())
        places: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(places, own)
        self.places: list[Place] = places
        self._stages = [place.stage for place in places] if pg.dp.size() > 1 else []

    def end_step(self) -> None:
        """End a step, whose compute time is then compared over the replicas."""
        self._watch.end_lap()

    def read(self, *, num_steps: int) -> IntervalTimes:
        """Times of all ranks since the last read. Every rank must call it."""
        own = self.read_own()
        steps = [_compute(self._by_name(lap)) for lap in self._watch.take_laps()]
        mine = [own[name] for name in self._names] + steps
        ranks = all_gather(to_device(torch.tensor(mine, dtype=torch.float64))).tolist()
        by_rank = [dict(zip(self._names, rank, strict=False)) for rank in ranks]
        return IntervalTimes(
            ranks=by_rank,
            num_steps=num_steps,
            step_compute=[rank[len(self._names) :] for rank in ranks] if steps else (),
            stages=self._stages,
        )

    def read_own(self) -> dict[str, float]:
        """Seconds of this rank since the last read, by region and megatron timer."""
        return self._by_name(self._watch.read())

    def _by_name(self, labels: dict[str, float]) -> dict[str, float]:
        seconds = dict.fromkeys(self._names, 0.0)
        for label, value in labels.items():
            region, _, timer = label.partition("/")
            seconds[region] += value
            if timer:
                seconds[timer] += value
        return seconds

    def close(self) -> None:
        """Stop the stopwatch."""
        drop_stopwatch()


def _total(rank: dict[str, float]) -> float:
    return sum(rank[name] for name in REGIONS)


def _compute(rank: dict[str, float]) -> float:
    """Seconds that a rank computed, without waiting for others."""
    return sum(
        rank[name] for name in ("vision", "matching", "forward", "reconstruction", "backward")
    )
