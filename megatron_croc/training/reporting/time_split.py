"""Where the time of an interval went, over all ranks, and which ranks are slower than their peers.

each rank's stopwatch --one small all-gather per interval--> shares (mean, max), stragglers
"""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from torch import nn

from megatron_croc.config.run import RunConfig
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
    """By rank: every region, and at timing_log_level 2 every timer of megatron's."""

    num_steps: int
    """Optimizer steps of the interval; positive."""

    def row(self) -> dict[str, float]:
        """Columns of metrics.jsonl."""
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
        return row

    def rank_times(self) -> list[RankTimes]:
        """What the search for stragglers reads, by rank."""
        return [
            RankTimes(
                step=(_total(rank) - sum(rank[name] for name in _PAUSES)) / self.num_steps,
                compute=_compute(rank) / self.num_steps,
                data_wait=rank["data_wait"] / self.num_steps,
            )
            for rank in self.ranks
        ]


class TimeSplit:
    """This rank's stopwatch, and the exchange of its times with all others."""

    def __init__(
        self, run: RunConfig, chunks: Sequence[nn.Module], pg: ProcessGroupCollection
    ) -> None:
        """Start to count; every rank must call it.

        Args:
            run: the run; its timing_log_level is 1 or 2.
            chunks: this rank's model chunks, which share one configuration.
            pg: process groups.
        """
        self._watch = start_stopwatch()
        by_name = run.logging.timing_log_level > 1
        self._names = [*REGIONS, *(MEGATRON_TIMERS if by_name else ())]
        timers = MegatronTimers(self._watch, is_pipelined=pg.pp.size() > 1, by_name=by_name)
        get_model_config(chunks[0]).timers = timers
        own = Place(host=socket.gethostname(), stage=pg.pp.rank())
        places: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(places, own)
        self.places: list[Place] = places

    def read(self, *, num_steps: int) -> IntervalTimes:
        """Times since the last read, of all ranks; every rank must call it."""
        own = self.read_own()
        mine = to_device(torch.tensor([own[name] for name in self._names], dtype=torch.float64))
        ranks = all_gather(mine).tolist()
        by_rank = [dict(zip(self._names, rank, strict=True)) for rank in ranks]
        return IntervalTimes(ranks=by_rank, num_steps=num_steps)

    def read_own(self) -> dict[str, float]:
        """Times since the last read of this rank alone."""
        seconds = dict.fromkeys(self._names, 0.0)
        for label, value in self._watch.read().items():
            region, _, timer = label.partition("/")
            seconds[region] += value
            if timer:
                seconds[timer] += value
        return seconds

    def close(self) -> None:
        """Stop to count."""
        drop_stopwatch()


def _total(rank: dict[str, float]) -> float:
    return sum(rank[name] for name in REGIONS)


def _compute(rank: dict[str, float]) -> float:
    """Seconds a rank worked; its waiting for others is elsewhere."""
    return sum(
        rank[name] for name in ("vision", "matching", "forward", "reconstruction", "backward")
    )
