"""Trace of one rank: all it asks of its device and its groups, in program order.

Streams, works (handles) and storages are numbers that mean something in one trace only. Stream 0
is the current stream at the start. A communicator is known by its group's name and ranks, so two
groups of the same ranks have different names.
"""

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

FORMAT = 1
"""Number of this format; a file of another number is refused."""

AXES: tuple[str, ...] = ("tp", "cp", "dp", "pp")
"""Axes of a rank's coordinates; tp varies fastest, as in megatron-core's order tp-cp-ep-dp-pp."""

STEP_PHASES = ("step", "gradients", "optimizer")
"""Phases of marks that are the training step; others: groups, rows, build, evaluate, save."""

LATER_STEP = "later step"
"""Phase that begins a second training step, up to `evaluate`. The first does not overlap: megatron
learns in it which gradients belong to a bucket, and reduces them at its end."""


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Kernels in a row on one stream; one kernel, or a segment of several."""

    event: ClassVar[str] = "compute"
    operation: str = ""
    """Name of the kernel, or of the segment."""

    kernels: int = 1
    flops: float = 0.0
    """Floating-point operations of all its kernels."""

    moved: float = 0.0
    """Bytes read and written by all its kernels."""

    part: str = ""
    """Part of the model: language_model, vision_tower, ..., optimizer."""

    stream: int = 0
    seconds: float | None = None
    """Measured duration; None if the replay is to take it from its costs."""

    place: str = ""


@dataclass(frozen=True, kw_only=True)
class Collective:
    """A collective of all ranks of a group; its stream waits for it if it has no work."""

    event: ClassVar[str] = "collective"
    kind: str
    """all_reduce, all_gather, reduce_scatter, broadcast, all_to_all, barrier, ...

    A collective of pickled objects ends with _object; its size may differ from rank to rank.
    """

    group: str
    dtype: str = ""
    bytes: int = 0
    """Bytes of the larger side, for coalesced calls of all tensors together."""

    root: int | None = None
    """Global rank of the root."""

    stream: int = 0
    work: int | None = None
    """Handle of an asynchronous call."""

    place: str = ""


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One send or receive."""

    direction: typing.Literal["send", "receive"]
    peer: int
    """Global rank of the other side."""

    dtype: str = ""
    bytes: int = 0
    storage: int | None = None
    """Memory that a send reads, if a Release may name it."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A batched group of sends and receives (batch_isend_irecv), or a single unbatched one."""

    event: ClassVar[str] = "exchange"
    group: str
    transfers: tuple[Transfer, ...]
    batched: bool = True
    """False: one isend, irecv, send or recv, for which NCCL makes a communicator of the two."""

    stream: int = 0
    work: int | None = None
    """Handle; None for a blocking send or recv."""

    place: str = ""


@dataclass(frozen=True, kw_only=True)
class Wait:
    """work.wait(): on NCCL the stream waits, on gloo the host."""

    event: ClassVar[str] = "wait"
    work: int
    stream: int = 0
    place: str = ""


@dataclass(frozen=True, kw_only=True)
class RecordEvent:
    """An event marks the present end of a stream."""

    event: ClassVar[str] = "record_event"
    number: int
    stream: int = 0


@dataclass(frozen=True, kw_only=True)
class WaitEvent:
    """Later work of a stream waits for a recorded event."""

    event: ClassVar[str] = "wait_event"
    number: int
    stream: int = 0


@dataclass(frozen=True, kw_only=True)
class Synchronize:
    """The host waits: for one stream, event or work, or for the whole device if none is given."""

    event: ClassVar[str] = "synchronize"
    stream: int | None = None
    recorded: int | None = None
    """Number of a RecordEvent."""

    work: int | None = None
    place: str = ""


@dataclass(frozen=True, kw_only=True)
class HostRead:
    """The host reads a value of a stream (item, tolist, nonzero), and so waits for that stream."""

    event: ClassVar[str] = "host_read"
    operation: str = ""
    stream: int = 0
    place: str = ""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of the device at this moment."""

    event: ClassVar[str] = "memory"
    allocated: int
    """Bytes."""

    peak: int = 0
    """Bytes; the highest since the Memory before."""


@dataclass(frozen=True, kw_only=True)
class Release:
    """A storage that a send reads goes back to the allocator."""

    event: ClassVar[str] = "release"
    storage: int
    place: str = ""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """All later events belong to this part of the step, until the next mark."""

    event: ClassVar[str] = "mark"
    phase: str = ""
    """step, gradients, optimizer, evaluate, save, ..."""

    micro_batch: int | None = None
    direction: typing.Literal["", "forward", "backward"] = ""
    chunk: int = 0
    """Model chunk of this rank (vpp); 0 without the interleaved schedule."""


Event = (
    Compute
    | Collective
    | Exchange
    | Wait
    | RecordEvent
    | WaitEvent
    | Synchronize
    | HostRead
    | Memory
    | Release
    | Mark
)
EVENTS: Mapping[str, type[Any]] = {kind.event: kind for kind in typing.get_args(Event)}
"""Name in a file -> type."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """A process group of this rank."""

    name: str
    ranks: tuple[int, ...]
    """Global ranks, this one among them."""

    is_ready: bool = False
    """Its communicator, also between two of its ranks, was made before the trace begins."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """Whose trace it is."""

    rank: int
    world_size: int
    sizes: Mapping[str, int]
    """Size of each axis of AXES; their product is the world size."""

    vpp: int = 1
    """Model chunks of a rank."""

    groups: tuple[Group, ...] = ()
    stands_for: tuple[int, ...] = ()
    """Global ranks that this trace stands for, its own among them; empty: its own alone."""

    backend: str = "nccl"
    versions: Mapping[str, str] = field(default_factory=dict)
    """torch, megatron-core, ... -> version."""

    format: int = FORMAT

    def coordinates(self, rank: int) -> dict[str, int]:
        """Axis -> coordinate of a global rank."""
        found = {}
        for axis in AXES:
            rank, found[axis] = divmod(rank, self.sizes[axis])
        return found

    def rank_at(self, coordinates: Mapping[str, int]) -> int:
        """Global rank at these coordinates."""
        rank = 0
        for axis in reversed(AXES):
            rank = rank * self.sizes[axis] + coordinates[axis]
        return rank


@dataclass(frozen=True)
class Trace:
    """The header and all events of one rank."""

    header: Header
    events: tuple[Event, ...]
