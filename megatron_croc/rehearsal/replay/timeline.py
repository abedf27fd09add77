"""Seconds of each rank's step by cause, from the work that a simulation has done.

    compute          kernels run
    exposed          communication moves data and no kernel runs, by group
    bubble           the rank waits for another pipeline stage, or has done its part of the step
    waits            the rank waits for other ranks of a group within its stage, or of a replica
    host             nothing runs: the host has not queued the next kernels so soon

They add up to the step. What runs beside a kernel counts as compute alone.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_croc.rehearsal.replay.nodes import Label, Node
from megatron_croc.rehearsal.replay.simulation import COMPUTE, MemorySample, Simulation

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Slice:
    """One piece of work on the timeline of a rank; seconds from the begin of the step."""

    rank: int
    label: Label
    ready: float
    """It could begin; until `begin` kernels wait for their host, communication for other ranks."""

    begin: float
    end: float

    @property
    def is_compute(self) -> bool:
        """Return True for kernels, False for communication."""
        return self.label.lane == COMPUTE


@dataclass(frozen=True, kw_only=True)
class RankTime:
    """One simulated rank's step, in seconds by cause."""

    rank: int
    coordinates: Mapping[str, int]
    stands_for: int
    """Number of ranks that it stands for."""

    compute: float
    exposed: Mapping[str, float]
    """Group -> seconds."""

    bubble: float
    waits: Mapping[str, float]
    """Group -> seconds."""

    host: float


@dataclass(frozen=True)
class Timeline:
    """The predicted step of a job."""

    seconds: float
    """Time of the step: the last work of any rank is done."""

    ranks: Sequence[RankTime]
    slices: Sequence[Slice]
    memory: Sequence[MemorySample]
    source: str
    """The origin of the costs."""

    folded: Mapping[str, tuple[int, ...]]
    """Axis -> coordinates that were simulated, for each axis with equal ones left out."""

    def _mean(self, values: Iterable[tuple[RankTime, float]]) -> float:
        pairs = [(rank.stands_for, value) for rank, value in values]
        return sum(n * value for n, value in pairs) / sum(n for n, _ in pairs)

    @cached_property
    def compute(self) -> float:
        """Mean seconds of kernels."""
        return self._mean((rank, rank.compute) for rank in self.ranks)

    @cached_property
    def bubble(self) -> float:
        """Mean seconds a rank waits for other pipeline stages."""
        return self._mean((rank, rank.bubble) for rank in self.ranks)

    @cached_property
    def host(self) -> float:
        """Mean seconds in which nothing is queued."""
        return self._mean((rank, rank.host) for rank in self.ranks)

    @cached_property
    def exposed(self) -> dict[str, float]:
        """Group -> mean seconds of communication beside which no kernel runs."""
        return self._by_group("exposed")

    @cached_property
    def waits(self) -> dict[str, float]:
        """Group -> mean seconds a rank waits for other ranks of the group."""
        return self._by_group("waits")

    def _by_group(self, name: str) -> dict[str, float]:
        groups = sorted({group for rank in self.ranks for group in getattr(rank, name)})
        return {
            group: self._mean((rank, getattr(rank, name).get(group, 0.0)) for rank in self.ranks)
            for group in groups
        }

    def longest_over_mean(self, axis: str) -> tuple[int, float]:
        """The coordinate of an axis whose ranks compute longest, and its time over the mean's."""
        columns: dict[int, list[tuple[RankTime, float]]] = defaultdict(list)
        for rank in self.ranks:
            columns[rank.coordinates[axis]].append((rank, rank.compute))
        means = {value: self._mean(pairs) for value, pairs in columns.items()}
        longest = max(means, key=lambda value: means[value])
        return longest, means[longest] / self.compute if self.compute else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the slices."""
        stage, stage_ratio = self.longest_over_mean("pp")
        replica, replica_ratio = self.longest_over_mean("dp")
        return {
            "seconds": self.seconds,
            "costs": self.source,
            "compute": self.compute,
            "bubble": self.bubble,
            "exposed": self.exposed,
            "waits": self.waits,
            "host": self.host,
            "slowest_stage": {"stage": stage, "over_mean": stage_ratio},
            "slowest_replica": {"replica": replica, "over_mean": replica_ratio},
            "simulated_ranks": len(self.ranks),
            "folded": {axis: list(kept) for axis, kept in self.folded.items()},
            "ranks": [vars(rank) | {"coordinates": dict(rank.coordinates)} for rank in self.ranks],
        }

    def lines(self) -> list[str]:
        """The step in words, for the terminal."""
        if not self.seconds:
            return ["predicted step: no work was recorded"]

        def share(seconds: float) -> str:
            return f"{seconds / self.seconds:.1%}"

        groups = {f"{name} traffic": s for name, s in self.exposed.items()}
        groups |= {f"waits in {name}": s for name, s in self.waits.items()}
        parts = {"compute": self.compute, "bubble": self.bubble, **groups, "host": self.host}
        causes = ", ".join(
            f"{name} {share(s)}" for name, s in parts.items() if s > 5e-4 * self.seconds
        )
        lines = [f"predicted step: {self.seconds:.4g} s ({self.source})", f"  {causes}"]
        for axis, word in (("pp", "pipeline stage"), ("dp", "replica")):
            value, ratio = self.longest_over_mean(axis)
            if ratio > 1.005:
                lines.append(f"  longest compute: {word} {value}, {ratio - 1:.1%} above the mean")
        if self.folded:
            kept = ", ".join(
                f"{len(values)} {axis} coordinate{'s' * (len(values) > 1)}"
                for axis, values in self.folded.items()
            )
            number = sum(rank.stands_for for rank in self.ranks)
            lines.append(
                f"  {len(self.ranks)} of {number} ranks simulated ({kept}): the others are equal"
            )
        return lines


def make_timeline(simulation: Simulation) -> Timeline:
    """Split the step of each simulated rank by cause."""
    slices: dict[int, list[Slice]] = {rank: [] for rank in simulation.hosts}
    for node in simulation.done:
        slices[node.rank].append(_slice(node))
    ends = [piece.end for pieces in slices.values() for piece in pieces]
    ends += [host.now for host in simulation.hosts.values()]
    seconds = max(ends, default=0.0)
    has_pipeline = simulation.job.header.sizes["pp"] > 1
    ranks = []
    for rank, host in simulation.hosts.items():
        slices[rank].sort(key=lambda piece: piece.ready)
        ranks.append(
            _rank_time(
                slices[rank],
                seconds,
                has_pipeline=has_pipeline,
                rank=rank,
                coordinates=host.member.coordinates,
                stands_for=host.member.stands_for,
            )
        )
    return Timeline(
        seconds=seconds,
        ranks=ranks,
        slices=[piece for pieces in slices.values() for piece in pieces],
        memory=simulation.memory,
        source=simulation.costs.source,
        folded=simulation.job.folded,
    )


def _slice(node: Node) -> Slice:
    assert node.end is not None
    ready = node.freed if node.label.lane == COMPUTE else node.ready
    return Slice(node.rank, node.label, ready, max(node.ready, node.end - node.busy), node.end)


def _rank_time(
    slices: Sequence[Slice], seconds: float, *, has_pipeline: bool, **rank: Any
) -> RankTime:
    free: list[Interval] = [(0.0, seconds)]
    compute, free = _claim(free, [(s.begin, s.end) for s in slices if s.is_compute])
    host, free = _claim(free, [(s.ready, s.begin) for s in slices if s.is_compute])
    moving: dict[str, list[Interval]] = defaultdict(list)
    waiting: dict[str, list[Interval]] = defaultdict(list)
    stage_waits: list[Interval] = []
    for piece in slices:
        if piece.is_compute:
            continue
        moving[piece.label.lane].append((piece.begin, piece.end))
        if piece.begin > piece.ready:
            waits = stage_waits if "pp" in piece.label.axes else waiting[piece.label.lane]
            waits.append((piece.ready, piece.begin))
    exposed, waited = {}, {}
    for lane, intervals in moving.items():
        exposed[lane], free = _claim(free, intervals)
    for lane, intervals in waiting.items():
        waited[lane], free = _claim(free, intervals)
    if has_pipeline:  # a stage that has done its part waits for the others
        stage_waits.append((max((piece.end for piece in slices), default=0.0), seconds))
    bubble, free = _claim(free, stage_waits)
    return RankTime(
        **rank,
        compute=compute,
        exposed={lane: s for lane, s in exposed.items() if s},
        bubble=bubble,
        waits={lane: s for lane, s in waited.items() if s},
        host=host + sum(end - begin for begin, end in free),
    )


def _claim(free: list[Interval], wanted: list[Interval]) -> tuple[float, list[Interval]]:
    """(seconds of `free` that lie in `wanted`, the rest of `free`); `free` is sorted, disjoint."""
    wanted = _union(wanted)
    claimed, rest, at = 0.0, [], 0
    for begin, end in free:
        while at < len(wanted) and wanted[at][1] <= begin:
            at += 1
        here = at
        while here < len(wanted) and wanted[here][0] < end:
            low, high = max(begin, wanted[here][0]), min(end, wanted[here][1])
            if low > begin:
                rest.append((begin, low))
            claimed += high - low
            begin = high
            here += 1
        if begin < end:
            rest.append((begin, end))
    return claimed, rest


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if end <= begin:
            continue
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return merged
