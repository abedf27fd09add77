"""Record of all that one rank asks its device to do: work, collectives, waits, reads, faults."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_croc.rehearsal.places import place

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
class Recorder:
    """What this rank has asked for so far; `phase` changes as the rehearsal goes on."""

    phase: str = "start"
    stream: int = 0
    """Number of the current stream."""

    events: list[dict[str, Any]] = field(default_factory=list)
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
    mode: Any = None
    """Mode of fake tensors (fake_tensors.py), to enter."""

    group_names: dict[str, str] = field(default_factory=dict)
    """torch's name of a group -> ours: tp, pp, dp, ..."""

    _segment: dict[str, Any] | None = None
    _batch: int | None = None
    _num_operations: int = 0
    _num_events: int = 0
    _num_batches: int = 0

    def fault(self, message: str) -> None:
        """Keep a fault, with the place of the call."""
        self.faults[f"{message}, at {place()}"] += 1

    def compute(self, name: str, *, flops: float, moved: float) -> None:
        """Add a kernel on the current stream: operations, and bytes it reads and writes."""
        self.flops[name] += int(flops)
        self.kernels[name] += 1
        segment = self._segment
        if segment is None or segment["stream"] != self.stream:
            segment = self._append("compute", kernels=0, flops=0.0, moved=0.0)
            self._segment = segment
        segment["kernels"] += 1
        segment["flops"] += flops
        segment["moved"] += moved

    def _append(self, kind: str, **values: Any) -> dict[str, Any]:
        event = {"kind": kind, "phase": self.phase, "stream": self.stream, **values}
        self.events.append(event)
        self._segment = None
        return event

    def collective(
        self,
        name: str,
        group: str,
        ranks: Sequence[int],
        counted: Sequence[Tensor],
        *,
        others: Sequence[Tensor],
        peer: int | None,
        root: int | None,
        is_async: bool,
    ) -> int:
        """Add a collective, a send or a receive.

        Args:
            name: all_reduce, all_gather, reduce_scatter, all_to_all, broadcast, send, recv, ...
            group: torch's name of the group.
            ranks: global ranks of the group.
            counted: tensors whose bytes count: the larger side.
            others: all its tensors.
            peer: global rank of the other side of a send or receive.
            root: global rank of the root of a broadcast.
            is_async: the current stream does not wait for it yet.

        Returns:
            its number, for `wait_for`.
        """
        for tensor in others:
            if (reason := nccl_refuses(tensor)) is not None:
                self.fault(f"{name}: {reason}")
        number = self._num_operations
        self._num_operations += 1
        moved = sum(tensor.numel() * tensor.element_size() for tensor in counted)
        label = self.group_names.get(group, group)
        if len(ranks) > 1:
            traffic = self.traffic[self.phase, name, label, len(ranks)]
            traffic.count += 1
            traffic.bytes += moved
        self._append(
            name,
            number=number,
            group=group,
            label=label,
            ranks=list(ranks),
            shapes=[[*t.shape] for t in counted],
            dtypes=[str(t.dtype).removeprefix("torch.") for t in counted],
            bytes=moved,
            peer=peer,
            root=root,
            is_async=is_async,
            batch=self._batch,
            place=place(),
        )
        return number

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Make the sends and receives of the block one NCCL group."""
        self._batch, self._num_batches = self._num_batches, self._num_batches + 1
        try:
            yield
        finally:
            self._batch = None

    def wait_for(self, number: int) -> None:
        """The current stream waits for an operation."""
        self._append("wait", number=number)

    def record_event(self, stream: int) -> int:
        """Mark the present end of a stream; returns the number of the mark."""
        number = self._num_events
        self._num_events += 1
        self._append("record_event", number=number)["stream"] = stream
        return number

    def stream_waits(self, stream: int, event: int | None) -> None:
        """All later work of `stream` waits for an event; for nothing if it was never recorded."""
        if event is not None:
            self._append("wait_event", number=event)["stream"] = stream

    def host_waits(
        self,
        name: str,
        *,
        stream: int | None = None,
        event: int | None = None,
        collective: int | None = None,
    ) -> None:
        """The host waits: for a stream, an event, a collective, or for the whole device."""
        where = place()
        self.waits[self.phase, name, where] += 1
        self._append(
            "host_wait", name=name, of=stream, event=event, collective=collective, place=where
        )

    def device_read(self, name: str) -> None:
        """The host reads a value that the current stream computes, and so waits for it."""
        where = place()
        self.reads[self.phase, name, where] += 1
        self._append("host_read", name=name, place=where)


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


__all__ = ["NCCL_DTYPES", "Recorder", "Traffic", "nccl_refuses"]
