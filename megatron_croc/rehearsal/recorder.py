"""Record of all that one rank asks its device to do: work, collectives, waits, reads, faults."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_croc.rehearsal import trace
from megatron_croc.rehearsal.places import place
from megatron_croc.rehearsal.trace_file import write_trace

NCCL_DTYPES = (
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
"""Types that torch hands to NCCL."""


@dataclass(kw_only=True)
class Traffic:
    """Calls of one collective in one group."""

    count: int = 0
    bytes: int = 0
    """Bytes of the larger side, of all calls."""


@dataclass(kw_only=True)
class _Work:
    """Kernels of one kind and part between two events."""

    kernels: int = 0
    flops: float = 0.0
    moved: float = 0.0


@dataclass(kw_only=True)
class Recorder:
    """All that this rank has asked for so far."""

    phase: str = "start"
    """Phase of the rehearsal: groups, rows, build, step, evaluate, save."""

    stream: int = 0
    """Number of the current stream."""

    part: Callable[[], str] = lambda: ""
    """Part of the model that computes now."""

    memory: Callable[[], tuple[int, int]] = lambda: (0, 0)
    """Bytes in use now, and their peak since the last call."""

    forward_only: str | None = None
    """Reason for which no backward pass can run; None: it can."""

    mode: Any = None
    """Mode of fake tensors (fake_tensors.py), to enter."""

    events: list[trace.Event] = field(default_factory=list)
    flops: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    traffic: dict[tuple[str, str, str, int], Traffic] = field(
        default_factory=lambda: defaultdict(Traffic)
    )
    """(phase, collective, group, its size) -> calls and bytes."""

    reads: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """(phase, operation, place) of values that the host reads from the device."""

    waits: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """(phase, operation, place) of other waits of the host for the device."""

    faults: Counter[str] = field(default_factory=Counter)
    group_names: dict[str, str] = field(default_factory=dict)
    """torch's name of a group -> ours: tp, pp, dp, ..."""

    groups: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """torch's name of each group of this rank -> its global ranks."""

    _segment: dict[tuple[int, str, str], _Work] = field(default_factory=dict)
    in_flight: dict[int, Sequence[Tensor]] = field(default_factory=dict)
    """Handle -> tensors of an operation that nobody has waited for."""

    _batch: list[trace.Transfer] | None = None
    _done: set[int] = field(default_factory=set)
    _sent: set[int] = field(default_factory=set)
    _num_works: int = 0
    _num_marks: int = 0

    def fault(self, message: str) -> None:
        """Keep a fault, with the place of the call."""
        self.faults[f"{message}, at {place()}"] += 1

    def compute(self, name: str, *, flops: float, moved: float) -> None:
        """Add a kernel on the current stream: operations, and bytes it reads and writes."""
        if self.phase == "step":
            self.flops[name] += int(flops)
            self.kernels[name] += 1
        key = self.stream, _kind(name, flops), self.part()
        work = self._segment.get(key)
        if work is None:
            work = self._segment[key] = _Work()
        work.kernels += 1
        work.flops += flops
        work.moved += moved

    def add(self, event: trace.Event) -> None:
        """Add an event behind the kernels before it."""
        if self._segment:
            for (stream, operation, part), work in self._segment.items():
                self.events.append(
                    trace.Compute(operation=operation, part=part, stream=stream, **vars(work))
                )
            self._segment = {}
            allocated, peak = self.memory()
            self.events.append(trace.Memory(allocated=allocated, peak=peak))
        self.events.append(event)

    def mark(
        self,
        *,
        phase: str = "",
        micro_batch: int | None = None,
        direction: Literal["", "forward", "backward"] = "",
        chunk: int = 0,
    ) -> None:
        """Begin a part of the step."""
        phase = phase or self.phase
        self.add(trace.Mark(phase=phase, micro_batch=micro_batch, direction=direction, chunk=chunk))

    def _count(self, name: str, group: str, ranks: Sequence[int], tensors: Sequence[Tensor]) -> int:
        """Add to the traffic, and check what NCCL gets; returns the bytes."""
        self.groups.setdefault(group, tuple(ranks))
        moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if len(ranks) > 1:
            label = self.group_names.get(group, group)
            traffic = self.traffic[self.phase, name, label, len(ranks)]
            traffic.count += 1
            traffic.bytes += moved
        return moved

    def _check(self, name: str, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            if (reason := nccl_refuses(tensor)) is not None:
                self.fault(f"{name}: {reason}")

    def collective(
        self,
        name: str,
        group: str,
        ranks: Sequence[int],
        counted: Sequence[Tensor],
        *,
        others: Sequence[Tensor] = (),
        root: int | None = None,
        is_async: bool = False,
    ) -> int:
        """Add a collective.

        Args:
            name: all_reduce, all_gather, reduce_scatter, all_to_all, broadcast, ...
            group: torch's name of the group.
            ranks: global ranks of the group.
            counted: tensors whose bytes count: the larger side.
            others: all its tensors.
            root: global rank of the root.
            is_async: the current stream does not wait for it yet.

        Returns:
            its handle, for `wait_for`.
        """
        self._check(name, others)
        moved = self._count(name, group, ranks, counted)
        work = self._next_work(is_async=is_async)
        self.add(
            trace.Collective(
                kind=name,
                group=group,
                dtype=_dtypes(counted),
                bytes=moved,
                root=root,
                stream=self.stream,
                work=work if is_async else None,
                place=place(),
            )
        )
        return work

    def transfer(
        self, direction: str, group: str, ranks: Sequence[int], tensor: Tensor, *, peer: int
    ) -> int:
        """Add a send or a receive; returns its handle."""
        self._check(direction, [tensor])
        storage = tensor.untyped_storage()._cdata if direction == "send" else None
        if storage is not None:
            self._sent.add(storage)
        one = trace.Transfer(
            direction=direction,  # type: ignore[arg-type]
            peer=peer,
            dtype=_dtypes([tensor]),
            bytes=self._count(direction, group, ranks, [tensor]),
            storage=storage,
        )
        if self._batch is not None:
            self._batch.append(one)
            return -1
        return self._exchange(group, (one,), batched=False)

    def batch(self, group: str, calls: Callable[[], None]) -> int:
        """Make the sends and receives of `calls` one NCCL group; returns its handle."""
        self._batch = []
        calls()
        transfers, self._batch = tuple(self._batch), None
        return self._exchange(group, transfers, batched=True)

    def _exchange(self, group: str, transfers: tuple[trace.Transfer, ...], *, batched: bool) -> int:
        work = self._next_work(is_async=True)
        self.add(
            trace.Exchange(
                group=group,
                transfers=transfers,
                batched=batched,
                stream=self.stream,
                work=work,
                place=place(),
            )
        )
        return work

    def _next_work(self, *, is_async: bool) -> int:
        self._num_works += 1
        if not is_async:
            self._done.add(self._num_works)
        return self._num_works

    def wait_for(self, work: int) -> None:
        """The current stream waits for an operation, unless it has done so."""
        if work not in self._done:
            self.add(trace.Wait(work=work, stream=self.stream, place=place()))
        self.in_flight.pop(work, None)

    def settle(self) -> None:
        """The device has done all that was asked for; what groups have kept till then is freed."""
        for tensors in self.in_flight.values():
            self._sent -= {tensor.untyped_storage()._cdata for tensor in tensors}
        self.in_flight.clear()

    def release(self, storage: int) -> None:
        """A storage is freed."""
        if storage in self._sent:
            self._sent.remove(storage)
            self.add(trace.Release(storage=storage, place=place()))

    def record_event(self, stream: int) -> int:
        """Mark the present end of a stream; returns the number of the mark."""
        self._num_marks += 1
        self.add(trace.RecordEvent(number=self._num_marks, stream=stream))
        return self._num_marks

    def stream_waits(self, stream: int, event: int | None) -> None:
        """All later work of `stream` waits for an event; for nothing if it was never recorded."""
        if event is not None:
            self.add(trace.WaitEvent(number=event, stream=stream))

    def host_waits(self, name: str, *, stream: int | None = None, event: int | None = None) -> None:
        """The host waits: for a stream, an event, or for the whole device."""
        where = place()
        self.waits[self.phase, name, where] += 1
        self.add(trace.Synchronize(stream=stream, recorded=event, place=where))

    def device_read(self, name: str) -> None:
        """The host reads a value that the current stream computes, and so waits for it."""
        where = place()
        self.reads[self.phase, name, where] += 1
        self.add(trace.HostRead(operation=name, stream=self.stream, place=where))

    def write(self, path: Path, header: trace.Header) -> None:
        """Write the trace; in it a group has the name that its like has on every rank."""
        names = {group: self.group_names.get(group, group) for group in self.groups}
        assert len(set(names.values())) == len(names), f"two groups of one name: {names}"
        groups = tuple(trace.Group(name=names[g], ranks=ranks) for g, ranks in self.groups.items())
        events = (
            replace(event, group=names[event.group])
            if isinstance(event, trace.Collective | trace.Exchange)
            else event
            for event in self.events
        )
        write_trace(path, replace(header, groups=groups), events)


def _kind(name: str, flops: float) -> str:
    """Kind of a kernel in the trace: what its cost depends on."""
    if "attention" in name:
        return "attention"
    if flops:
        return "matmul"
    return name if name.startswith("triton.") else "elementwise"


def _dtypes(tensors: Sequence[Tensor]) -> str:
    return ",".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))


def nccl_refuses(tensor: Tensor) -> str | None:
    """Reason for which NCCL, or torch before it, would refuse a tensor; None if there is none."""
    about = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    if tensor.device.type != "cuda":
        return f"{about} is on {tensor.device}; NCCL takes tensors on the GPU only"
    if not tensor.is_contiguous():
        return f"{about} is not contiguous; call .contiguous() first"
    if tensor.dtype not in NCCL_DTYPES:
        return f"NCCL has no {about}; convert it first"
    return None
