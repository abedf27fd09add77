"""Recorder of a real run on gloo: what one rank computes and exchanges, with two clocks.

    wall    seconds between waits, for the trace; the wait itself counts as communication
    CPU     seconds of this thread alone, which no other process on the machine can stretch

Where ranks meet, each leaves its CPU clock in a file that both map, and the later one holds (a
logical clock). So the CPU clock of a step is its longest path through both ranks.
"""

import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core.pipeline_parallel import schedules
from torch import Tensor

from megatron_croc.rehearsal.trace import Collective, Compute, Event, Exchange, Mark, Transfer, Wait

SLOTS = 1 << 24

METHODS = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "broadcast": "broadcast",
    "_allgather_base": "all_gather",
    "allgather": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "alltoall_base": "all_to_all",
    "send": "send",
    "recv": "receive",
}
"""Methods of a process group that are recorded."""


class Recorder:
    """Events of one step, and seconds of each kind of segment."""

    def __init__(self, mailbox: Path) -> None:
        """Record nothing yet; `mailbox` is a file of SLOTS numbers that all ranks map."""
        self.is_on = False
        self.events: list[Event] = []
        self.wall: dict[str, list[float]] = defaultdict(list)
        self.cpu: dict[str, list[float]] = defaultdict(list)
        """Kind of segment -> seconds of each."""

        self.waited: dict[str, list[float]] = defaultdict(list)
        """Kind of communication -> wall seconds from its call to the end of its wait."""

        self.groups: dict[str, tuple[int, ...]] = {}
        self.busy_cpu = self.busy_wall = 0.0
        self._slots = np.memmap(mailbox, dtype=np.float64, mode="r+", shape=(SLOTS,))
        self._calls: Counter[str] = Counter()
        self._number = 0
        self._where = "begin"
        self._position = 0
        self._last = (0.0, 0.0)
        self._offset = 0.0

    def start(self) -> None:
        """Begin a step; the clocks are 0."""
        self.events, self.is_on = [], True
        self.busy_cpu = self.busy_wall = 0.0
        self._enter("begin")
        self._last = time.perf_counter(), time.thread_time()
        self._offset = -self._last[1]

    def stop(self) -> float:
        """End the step; returns its CPU clock."""
        self._segment()
        self.is_on = False
        return self._clock()

    def _clock(self) -> float:
        return time.thread_time() + self._offset

    def _enter(self, where: str) -> None:
        self._where, self._position = where, 0

    def _segment(self) -> None:
        """End the kernels since the last call or wait."""
        wall, cpu = time.perf_counter(), time.thread_time()
        key = f"{self._where} {self._position}"
        if self._where.startswith("after"):
            key = self._where
        key = f"rank {dist.get_rank()}: {key}"
        seconds = wall - self._last[0], cpu - self._last[1]
        self.wall[key].append(seconds[0])
        self.cpu[key].append(seconds[1])
        self.busy_wall += seconds[0]
        self.busy_cpu += seconds[1]
        self.events.append(Compute(operation=key, part="language_model"))
        self._position += 1
        self._last = wall, cpu

    def mark(self, *, micro_batch: int | None, direction: str, chunk: int) -> None:
        """Begin the pass of one micro-batch on one chunk; the end of a pass without micro-batch."""
        if not self.is_on:
            return
        self._segment()
        ended = micro_batch is None
        self._enter(f"after {direction}" if ended else f"{direction} {chunk}")
        mark: Any = Mark(
            phase="step",
            micro_batch=micro_batch,
            direction="" if ended else direction,  # type: ignore[arg-type]
            chunk=chunk,
        )
        self.events.append(mark)

    def call(self, name: str, group: Any, tensors: list[Tensor], peer: int | None) -> "Handle":
        """Add a call, before it is made; returns a handle without its work."""
        self._segment()
        ranks = tuple(dist.get_process_group_ranks(group))
        self.groups[group.group_name] = ranks
        self._number += 1
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        mine = dist.get_rank()
        if peer is None:
            self.events.append(
                Collective(kind=name, group=group.group_name, bytes=size, work=self._number)
            )
            key = f"{group.group_name} {self._count(group.group_name)}"
            self._slot(f"{key} {mine}", self._clock())
            slots = [f"{key} {rank}" for rank in ranks]
        else:
            direction: Any = name
            transfer = Transfer(direction=direction, peer=peer, bytes=size)
            self.events.append(
                Exchange(
                    group=group.group_name,
                    transfers=(transfer,),
                    batched=False,
                    work=self._number,
                )
            )
            ends = (mine, peer) if name == "send" else (peer, mine)
            key = f"{group.group_name} {ends[0]}>{ends[1]}"
            key = f"{key} {self._count(f'{key} {name}')}"
            if name == "send":
                self._slot(key, self._clock())
            slots = [key] if name == "receive" else []
        return Handle(self, self._number, f"{name} {size}", slots)

    def _count(self, key: str) -> int:
        self._calls[key] += 1
        return self._calls[key]

    def _slot(self, key: str, value: float | None = None) -> float:
        place = zlib.crc32(key.encode()) % SLOTS
        if value is not None:
            self._slots[place] = value
        return float(self._slots[place])

    def waits(self, handle: "Handle") -> None:
        """Add a wait, before it."""
        self._segment()
        self.events.append(Wait(work=handle.number))

    def has_waited(self, handle: "Handle") -> None:
        """Move the clocks after a wait."""
        now = time.perf_counter()
        self.waited[handle.kind].append(now - handle.began)
        self._last = now, self._last[1]
        latest = max((self._slot(key) for key in handle.slots), default=0.0)
        self._offset += max(0.0, latest - self._clock())


class Handle:
    """A torch work that is recorded when it is waited for."""

    def __init__(self, recorder: Recorder, number: int, kind: str, slots: list[str]) -> None:
        """Take what the call recorded; `work` follows."""
        self.number, self.kind, self.slots = number, kind, slots
        self.began = time.perf_counter()
        self.work: Any = None
        self._recorder = recorder

    def wait(self, *arguments: Any) -> bool:
        """Wait for the real work."""
        if not self._recorder.is_on:
            return self.work.wait(*arguments)
        self._recorder.waits(self)
        done = self.work.wait(*arguments)
        self._recorder.has_waited(self)
        return done

    def __getattr__(self, name: str) -> Any:
        """Anything else of the real work."""
        return getattr(self.work, name)


def install(recorder: Recorder) -> None:
    """Record every call of a process group in this process."""
    for method, name in METHODS.items():
        real = getattr(dist.ProcessGroup, method, None)
        if real is not None:
            setattr(dist.ProcessGroup, method, _recorded(recorder, real, name))


def _recorded(recorder: Recorder, real: Callable[..., Any], name: str) -> Callable[..., Any]:
    def call(group: Any, *arguments: Any, **options: Any) -> Any:
        if not recorder.is_on:
            return real(group, *arguments, **options)
        peer = None
        if name in ("send", "receive"):
            peer = dist.get_process_group_ranks(group)[int(arguments[1])]
        side = 1 if name == "reduce_scatter" else 0
        handle = recorder.call(name, group, _tensors(arguments[side]), peer)
        handle.work = real(group, *arguments, **options)
        return handle

    return call


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)]


def mark_passes(recorder: Recorder) -> Callable[[int, int, int], None]:
    """Let megatron's schedule mark its passes.

    Returns:
        a function that takes (micro-batches, chunks, group size) of the next step.
    """
    tables: dict[str, list[tuple[int, int]]] = {}

    def marked(real: Callable[..., Any], direction: str) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            micro_batch, chunk = tables[direction].pop(0)
            recorder.mark(micro_batch=micro_batch, direction=direction, chunk=chunk)
            result = real(*arguments, **options)
            recorder.mark(micro_batch=None, direction=direction, chunk=chunk)
            return result

        return run

    schedules.forward_step = marked(schedules.forward_step, "forward")
    schedules.backward_step = marked(schedules.backward_step, "backward")

    def prepare(count: int, chunks: int, group_size: int) -> None:
        table = schedules.get_schedule_table(count, chunks, group_size)
        tables["forward"] = list(table)
        tables["backward"] = [(m, chunks - 1 - c) for m, c in table]

    return prepare
