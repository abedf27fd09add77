"""Where a step's time goes: named regions whose own times add up to all the time there is.

    with region("vision"):        as a block, or @region("vision") on a function
        ...

Regions nest, and a moment counts for the innermost one only, so `forward` around `vision` is the
forward pass without it. What is in no region is `other`. One stopwatch runs per process, found here
like a logger; without it a region does nothing.

On a GPU each change of region records a CUDA event on the compute stream and nothing waits for it:
the times are the stream's, so a region also holds what the stream idled in it (for data, for a
pipeline neighbour). On a CPU they are the host's. torch.profiler sees regions by their names.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal, get_args

from torch.profiler import record_function

from megatron_croc.parallel.device import moment, seconds_between

Region = Literal[
    "data_wait",
    "vision",
    "matching",
    "forward",
    "reconstruction",
    "backward",
    "pipeline_wait",
    "sync",
    "optimizer",
    "checkpoint",
    "validation",
    "other",
]

REGIONS: tuple[Region, ...] = get_args(Region)
"""Every region, in the order of a step."""

_MANY = 8192
"""Moments kept at most before the older half is added up."""


class Stopwatch:
    """Adds up the own time of each region; starts in `other`."""

    def __init__(
        self,
        now: Callable[[], Any] = moment,
        between: Callable[[Any, Any], float] = seconds_between,
    ) -> None:
        """Start.

        Args:
            now: the present moment, of any type.
            between: seconds from one moment to a later one.
        """
        self._now, self._between = now, between
        self._thread = threading.get_ident()
        self._open: list[tuple[str, bool, record_function]] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._changes = [(self._label(), now())]

    def start(self, name: str, *, whole: bool = False) -> None:
        """Enter a region; in a whole one, those inside it count for it."""
        if threading.get_ident() != self._thread:
            return  # a thread beside the step takes none of its time
        seen = record_function(name)
        seen.__enter__()
        self._open.append((name, whole, seen))
        self._change()

    def stop(self, name: str) -> None:
        """Leave a region, and those inside it that an error left open."""
        if threading.get_ident() != self._thread or all(name != n for n, _, _ in self._open):
            return
        while True:
            left, _, seen = self._open.pop()
            seen.__exit__(None, None, None)
            if left == name:
                break
        self._change()

    def read(self) -> dict[str, float]:
        """Seconds of each region since the last read; waits for the device."""
        self._changes.append((self._label(), self._now()))
        self._add_up(len(self._changes) - 1)
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds

    def _label(self) -> str:
        names = [name for name, _, _ in self._open]
        whole = (name for name, is_whole, _ in self._open if is_whole)
        return next(whole, names[-1] if names else "other")

    def _change(self) -> None:
        label = self._label()
        if label == self._changes[-1][0]:
            return
        self._changes.append((label, self._now()))
        if len(self._changes) > _MANY:
            self._add_up(_MANY // 2)

    def _add_up(self, count: int) -> None:
        """Turn the oldest `count` changes into seconds."""
        for (label, begin), (_, end) in pairwise(self._changes[: count + 1]):
            self._seconds[label] += self._between(begin, end)
        del self._changes[:count]


_running: Stopwatch | None = None
"""State of the whole process, listed in docs/design.md."""


def start_stopwatch() -> Stopwatch:
    """Start this process's stopwatch, in place of one that ran."""
    global _running
    _running = Stopwatch()
    return _running


def drop_stopwatch() -> None:
    """From now on regions do nothing."""
    global _running
    _running = None


@contextmanager
def region(name: Region, *, whole: bool = False) -> Iterator[None]:
    """Count what is inside for `name`, if a stopwatch runs.

    Args:
        name: the region.
        whole: regions inside it count for it as well.
    """
    watch = _running
    if watch is None:
        yield
        return
    watch.start(name, whole=whole)
    try:
        yield
    finally:
        watch.stop(name)


MEGATRON_TIMERS: dict[str, Region] = {
    "forward-backward": "pipeline_wait",  # what is left of it without all below
    "forward-compute": "forward",
    "backward-compute": "backward",
    "forward-recv": "pipeline_wait",
    "forward-send": "pipeline_wait",
    "backward-recv": "pipeline_wait",
    "backward-send": "pipeline_wait",
    "forward-send-backward-recv": "pipeline_wait",
    "backward-send-forward-recv": "pipeline_wait",
    "forward-send-forward-recv": "pipeline_wait",
    "backward-send-backward-recv": "pipeline_wait",
    "forward-backward-send-forward-backward-recv": "pipeline_wait",
    "all-grads-sync": "sync",
    "conditional-embedder-grads-all-reduce": "sync",
    "non-tensor-parallel-grads-all-reduce": "sync",
    "embedding-grads-all-reduce": "sync",
}
"""The timers that megatron-core's schedules start and stop, and the region of each."""


class _MegatronTimer:
    def __init__(self, watch: Stopwatch, label: str) -> None:
        self._watch, self._label = watch, label

    def start(self, barrier: bool = False) -> None:
        self._watch.start(self._label)

    def stop(self, barrier: bool = False) -> None:
        self._watch.stop(self._label)


class _NoTimer:
    def start(self, barrier: bool = False) -> None: ...

    def stop(self, barrier: bool = False) -> None: ...


class MegatronTimers:
    """What megatron-core takes as `config.timers`, in front of a stopwatch.

    megatron's own synchronise the device at every start and stop; these never do.
    """

    def __init__(self, watch: Stopwatch, *, is_pipelined: bool, by_name: bool = False) -> None:
        """Bind.

        Args:
            watch: what counts the time.
            is_pipelined: whether there is a neighbour to wait for at all.
            by_name: count under `region/megatron's name`, not only under the region.
        """
        regions: dict[str, str] = dict(MEGATRON_TIMERS)
        if not is_pipelined:
            regions["forward-backward"] = "other"
        self._timers = {
            name: _MegatronTimer(watch, f"{region}/{name}" if by_name else region)
            for name, region in regions.items()
        }

    def __call__(self, name: str, log_level: int | None = None) -> _MegatronTimer | _NoTimer:
        """The timer of that name; one that does nothing, where we do not ask for its time."""
        return self._timers.get(name) or _NoTimer()
