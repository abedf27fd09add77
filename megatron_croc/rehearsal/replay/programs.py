"""A program for every rank of a job, from the traces of the ranks that stand for all.

A trace names groups and peers of the rank that was recorded. Another rank of its class finds its
own by coordinates: a member that lies k further on an axis lies k further from this rank too.

Ranks whose programs are equal, and who meet only in collectives along an axis, do the same at the
same time. So of an axis's coordinates only those that differ are simulated: of 128 equal replicas
one. Collectives keep the cost of the whole group.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_croc.errors import DataError
from megatron_croc.rehearsal.replay.costs import Costs
from megatron_croc.rehearsal.trace import (
    AXES,
    Collective,
    Compute,
    Event,
    Exchange,
    Group,
    Header,
    HostRead,
    Release,
    Synchronize,
    Trace,
    Wait,
)

Load = Mapping[str, float]
"""Part of the model -> its work in one micro-batch, in any unit: tokens, images."""

Loads = Sequence[Sequence[Load]]
"""For each replica (DP coordinate), the load of each of its micro-batches."""


@dataclass(frozen=True)
class Member:
    """One simulated rank."""

    rank: int
    coordinates: Mapping[str, int]
    events: Sequence[Event]
    groups: Mapping[str, Group]
    """Name -> the group of this rank."""

    stands_for: int
    """Number of ranks that do the same at the same time, itself included."""

    loads: Sequence[Load]
    """For each micro-batch the work relative to the trace's; empty: as in the trace."""

    _shift: Mapping[str, int]
    _header: Header

    def peer(self, recorded: int) -> int:
        """Global rank of the peer that the trace calls `recorded`."""
        return _shifted(self._header, recorded, self._shift)


@dataclass(frozen=True)
class Job:
    """All that is simulated."""

    header: Header
    """Header of the first trace: sizes of the axes and the world."""

    members: Mapping[int, Member]
    """Simulated rank -> its program."""

    folded: Mapping[str, tuple[int, ...]]
    """Axis -> coordinates that are simulated, for each axis of which some are left out."""


def make_job(
    traces: Sequence[Trace],
    costs: Costs,
    *,
    loads: Loads | None = None,
    are_relative: bool = False,
) -> Job:
    """Give every rank its trace, fold equal ranks, and give every kernel its seconds.

    Args:
        traces: one for each class of ranks; together they stand for every rank once.
        costs: seconds of kernels.
        loads: work of every replica; None: all are equal.
        are_relative: the loads are relative to the traces'; else traces have their replica's.

    Raises:
        DataError: a rank has no trace or two, traces are of different jobs, or `loads` is of
            another number of replicas.
    """
    owner = _owners(traces)
    header = traces[0].header
    programs = [_costed(trace.events, costs) for trace in traces]
    kinds = _kinds(traces, programs)
    if loads is not None and len(loads) != header.sizes["dp"]:
        raise DataError(f"loads of {len(loads)} replicas for a job of {header.sizes['dp']}")
    kept = _kept_coordinates(header, [kinds[owner[r]] for r in range(header.world_size)], loads,
                             _axes_of_transfers(traces))  # fmt: skip
    members = {}
    for values in itertools.product(*(sorted(kept[axis]) for axis in reversed(AXES))):
        coordinates = dict(zip(reversed(AXES), values, strict=True))
        rank = header.rank_at(coordinates)
        trace = traces[owner[rank]]
        own = trace.header.coordinates(trace.header.rank)
        shift = {axis: coordinates[axis] - own[axis] for axis in AXES}
        number = 1
        for axis in AXES:
            number *= kept[axis][coordinates[axis]]
        members[rank] = Member(
            rank=rank,
            coordinates=coordinates,
            events=programs[owner[rank]],
            groups={g.name: _moved(header, g, shift) for g in trace.header.groups},
            stands_for=number,
            loads=_member_loads(loads, coordinates["dp"], None if are_relative else own["dp"]),
            _shift=shift,
            _header=header,
        )
    folded = {
        axis: tuple(sorted(kept[axis])) for axis in AXES if len(kept[axis]) < header.sizes[axis]
    }
    return Job(header, members, folded)


def _member_loads(loads: Loads | None, mine: int, recorded: int | None) -> Sequence[Load]:
    """Loads of replica `mine` over those of `recorded`, or as they are."""
    if loads is None or recorded is None:
        return () if loads is None else loads[mine]
    return [
        {part: amount / base[part] for part, amount in load.items() if base.get(part)}
        for load, base in zip(loads[mine], loads[recorded], strict=True)
    ]


def _owners(traces: Sequence[Trace]) -> dict[int, int]:
    """Rank -> number of the trace that stands for it."""
    if not traces:
        raise DataError("no trace is given; record one for each class of ranks")
    first, owner = traces[0].header, {}
    for number, trace in enumerate(traces):
        header = trace.header
        if dict(header.sizes) != dict(first.sizes) or header.backend != first.backend:
            raise DataError(
                f"traces of ranks {first.rank} and {header.rank} are of different jobs: "
                f"{dict(first.sizes)} on {first.backend}, {dict(header.sizes)} on {header.backend}"
            )
        for rank in sorted({header.rank, *header.stands_for}):
            if not 0 <= rank < first.world_size:
                raise DataError(
                    f"the trace of rank {header.rank} stands for rank {rank} "
                    f"of a world of {first.world_size}"
                )
            if rank in owner:
                raise DataError(
                    f"traces of ranks {traces[owner[rank]].header.rank} and {header.rank} "
                    f"both stand for rank {rank}"
                )
            owner[rank] = number
    if missing := sorted(set(range(first.world_size)) - set(owner)):
        some = ", ".join(map(str, missing[:4])) + (", ..." if len(missing) > 4 else "")
        raise DataError(f"{len(missing)} ranks have no trace ({some}); record their class too")
    return owner


def _shifted(header: Header, rank: int, shift: Mapping[str, int]) -> int:
    found = header.coordinates(rank)
    return header.rank_at({axis: (found[axis] + shift[axis]) % header.sizes[axis] for axis in AXES})


def _moved(header: Header, group: Group, shift: Mapping[str, int]) -> Group:
    """The group that a rank has where the recorded rank has `group`."""
    if not any(shift.values()):
        return group
    coordinates = [header.coordinates(rank) for rank in group.ranks]
    varying = {axis for axis in AXES if len({c[axis] for c in coordinates}) == header.sizes[axis]}
    # A group over a whole axis is the same from every coordinate of that axis.
    moves = {axis: 0 if axis in varying else shift[axis] for axis in AXES}
    ranks = sorted(_shifted(header, rank, moves) for rank in group.ranks)
    return replace(group, ranks=tuple(ranks))


def _costed(events: Sequence[Event], costs: Costs) -> list[Event]:
    """Events with seconds for every kernel; kernels in a row of one stream and part become one."""
    merged: list[Event] = []
    for event in events:
        if isinstance(event, Compute):
            seconds = costs.compute(event) if event.seconds is None else event.seconds
            last = merged[-1] if merged else None
            if isinstance(last, Compute) and (last.stream, last.part) == (event.stream, event.part):
                merged[-1] = replace(
                    last,
                    kernels=last.kernels + event.kernels,
                    flops=last.flops + event.flops,
                    moved=last.moved + event.moved,
                    seconds=(last.seconds or 0.0) + seconds,
                )
                continue
            event = replace(event, seconds=seconds)
        merged.append(event)
    return merged


def _kinds(traces: Sequence[Trace], programs: Sequence[Sequence[Event]]) -> list[int]:
    """For each trace, a number that is equal where two programs are, but for places and rank."""
    seen: dict[object, int] = {}
    kinds = []
    for trace, program in zip(traces, programs, strict=True):
        key = tuple(_comparable(event, trace.header) for event in program)
        groups = tuple((g.name, len(g.ranks), g.is_ready) for g in trace.header.groups)
        kinds.append(seen.setdefault((key, groups), len(seen)))
    return kinds


def _comparable(event: Event, header: Header) -> object:
    """The event without its place, peers by their distance."""
    if isinstance(event, Exchange):
        own = header.coordinates(header.rank)
        transfers = []
        for transfer in event.transfers:
            peer = header.coordinates(transfer.peer)
            distance = tuple((peer[axis] - own[axis]) % header.sizes[axis] for axis in AXES)
            transfers.append((replace(transfer, peer=0), distance))
        return replace(event, transfers=(), place=""), tuple(transfers)
    if isinstance(event, Collective):
        return replace(event, root=None, place="")
    if isinstance(event, Compute | Wait | Synchronize | HostRead | Release):
        return replace(event, place="")
    return event


def _axes_of_transfers(traces: Sequence[Trace]) -> set[str]:
    """Axes along which a rank sends or receives; their ranks are all simulated."""
    found = set()
    for trace in traces:
        own = trace.header.coordinates(trace.header.rank)
        peers = {
            transfer.peer
            for event in trace.events
            if isinstance(event, Exchange)
            for transfer in event.transfers
        }
        for peer in peers:
            other = trace.header.coordinates(peer)
            found |= {axis for axis in AXES if other[axis] != own[axis]}
    return found


def _kept_coordinates(
    header: Header, kinds: Sequence[int], loads: Loads | None, whole: set[str]
) -> dict[str, dict[int, int]]:
    """Axis -> kept coordinate -> coordinates it stands for; pipeline stages are all kept."""
    kept = {}
    for axis in AXES:
        columns: dict[object, list[int]] = {}
        for value in range(header.sizes[axis]):
            key: object = value
            if axis != "pp" and axis not in whole:
                others = (
                    range(header.sizes[name]) if name != axis else (value,)
                    for name in reversed(AXES)
                )
                key = tuple(
                    kinds[header.rank_at(dict(zip(reversed(AXES), at, strict=True)))]
                    for at in itertools.product(*others)
                )
                if axis == "dp" and loads is not None:
                    key = (key, tuple(tuple(sorted(load.items())) for load in loads[value]))
            columns.setdefault(key, []).append(value)
        kept[axis] = {values[0]: len(values) for values in columns.values()}
    return kept
