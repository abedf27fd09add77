"""Streams, events and late copies, enough for `device.beside` and `SideWork` to run as on CUDA.

Kernels run where they are called. What a real device would have later is guarded instead: memory
of a copy that is not done holds NaN (integers: 0x55), and reading it, or reading what a side
stream computed before it was waited for, is a fault.
"""

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tests.support.strict_device.job import Job, describe, place

_copy = torch.Tensor.copy_


class Copy:
    """A copy to the host on its way."""

    def __init__(self, into: Tensor, source: Tensor, delay: float) -> None:
        """Take the source as it is now: the stream's order protects it on a device."""
        with _disable_current_modes():
            self.into, self.source = into, source.detach().clone()
        self.due = time.monotonic() + delay
        self.name = f"copy to the host of {describe(into)} begun at {place()}"
        self.done = threading.Event()


class Stream:
    """A queue of work: the copies that are not done, and what a side stream has computed."""

    def __init__(self, *, is_main: bool) -> None:
        """Nothing is queued."""
        self.is_main = is_main
        self.copies: list[Copy] = []
        self.computed: set[int] = set()
        """Work numbers of the stream that nobody has waited for."""

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        event.stream_done()

    def wait_stream(self, stream: "Stream") -> None:
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        self.record_event().synchronize()

    def query(self) -> bool:
        return self.record_event().query()


class Event:
    """A point in a stream."""

    def __init__(self, *_: object, **__: object) -> None:
        """Not recorded, which CUDA takes as done."""
        self.copies: list[Copy] = []
        self.stream: Stream | None = None
        self.computed: set[int] = set()

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or current_stream()
        self.copies = [copy for copy in self.stream.copies if not copy.done.is_set()]
        self.computed = set(self.stream.computed)

    def stream_done(self) -> None:
        """Allow reading of the results that the stream has computed up to here."""
        if self.stream is not None:
            self.stream.computed -= self.computed

    def synchronize(self) -> None:
        for copy in self.copies:
            copy.done.wait()
        self.stream_done()

    def query(self) -> bool:
        return all(copy.done.is_set() for copy in self.copies)

    wait = synchronize


_MAIN = Stream(is_main=True)
_now = threading.local()


def current_stream(*_: object) -> Stream:
    """The stream that this thread queues on."""
    return getattr(_now, "stream", _MAIN)


@contextmanager
def on_stream(stream: Stream | None) -> Iterator[None]:
    """As torch.cuda.stream."""
    before, _now.stream = current_stream(), stream or current_stream()
    try:
        yield
    finally:
        _now.stream = before


class Copies:
    """Copies to the host, done late by a thread of their own."""

    def __init__(self, job: Job) -> None:
        """No copy is under way."""
        self.job = job
        self.pending: dict[int, Copy] = {}
        """By the memory they fill."""
        self._queue: queue.Queue[Copy] = queue.Queue()

    def install(self) -> None:
        """Put streams, events and the side stream in CUDA's place."""
        cuda: Any = torch.cuda
        cuda.Stream, cuda.Event = lambda *_, **__: Stream(is_main=False), Event
        cuda.stream, cuda.current_stream = on_stream, current_stream
        threading.Thread(target=self._work, daemon=True).start()

    def begin(self, into: Tensor, source: Tensor) -> Tensor:
        """Fill `into` later; it holds nothing of use until then."""
        copy = Copy(into, source, self.job.options.copy_ms / 1000)
        with torch.no_grad(), _disable_current_modes():
            into.fill_(float("nan") if into.is_floating_point() else 0x55)
        self.pending[memory(into)] = copy
        current_stream().copies.append(copy)
        self._queue.put(copy)
        return into

    def synchronize(self) -> None:
        """Wait for all of them."""
        for copy in list(self.pending.values()):
            copy.done.wait()

    def _work(self) -> None:
        while True:
            copy = self._queue.get()
            time.sleep(max(0.0, copy.due - time.monotonic()))
            with torch.no_grad():
                _copy(copy.into, copy.source)
            self.pending.pop(memory(copy.into), None)
            copy.done.set()


def memory(tensor: Tensor) -> int:
    """Identity of the tensor's memory, which views share."""
    return tensor.untyped_storage()._cdata
