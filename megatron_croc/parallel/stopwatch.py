"""Stopwatch for the parts of a step: named regions whose times add up to the whole time.

    with region("vision"):        as a block, or @region("vision") on a function
        ...

Regions can be nested. Time counts for the innermost region only: `forward` around `vision` is the
forward pass without vision. Time outside all regions is `other`. There is one stopwatch per
process, as there is one logger; without it a region does nothing.

On a GPU each change of region records a CUDA event on the compute stream, without a sync. The times
are those of the stream, so a region includes idle time of the stream (waiting for data or for a
pipeline stage). On a CPU they are times of the host. Regions have names in torch.profiler too.
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
"""All regions, in the order of a step."""

_MAX_CHANGES = 8192
"""Largest number of stored changes; the older half is added up then."""


class Stopwatch:
    """Sum of the time in each region; begins in `other`."""

    def __init__(
        self,
        now: Callable[[], Any] = moment,
        between: Callable[[Any, Any], float] = seconds_between,
    ) -> None:
        """Start the stopwatch.

        Args:
            now: returns the present moment, of any type.
            between: returns the seconds from one moment to a later one.
        """
        self._now, self._between = now, between
        self._thread = threading.get_ident()
        self._open: list[tuple[str, bool, record_function]] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._lap: defaultdict[str, float] = defaultdict(float)
        self._laps: list[dict[str, float]] = []
        # (region from now on, moment, True at the end of a lap)
        self._changes = [(self._label(), now(), False)]

    def start(self, name: str, *, whole: bool = False) -> None:
        """Enter a region; if `whole`, time of the regions inside it counts for it."""
        if threading.get_ident() != self._thread:
            return  # other threads are not part of the step
        seen = record_function(name)
        seen.__enter__()
        self._open.append((name, whole, seen))
        self._change()

    def stop(self, name: str) -> None:
        """Leave a region, and regions inside it that an exception left open."""
        if threading.get_ident() != self._thread or all(name != n for n, _, _ in self._open):
            return
        while True:
            left, _, seen = self._open.pop()
            seen.__exit__(None, None, None)
            if left == name:
                break
        self._change()

    def read(self) -> dict[str, float]:
        """Return the seconds of each region since the last call; waits for the device."""
        self._changes.append((self._label(), self._now(), False))
        self._add_up(len(self._changes) - 1)
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds

    def end_lap(self) -> None:
        """End a lap, such as one step; does not wait for the device."""
        self._changes.append((self._label(), self._now(), True))

    def take_laps(self) -> list[dict[str, float]]:
        """Return the seconds of each region in the laps that the last `read` found ended."""
        laps, self._laps = self._laps, []
        return laps

    def _label(self) -> str:
        names = [name for name, _, _ in self._open]
        whole = (name for name, is_whole, _ in self._open if is_whole)
        return next(whole, names[-1] if names else "other")

    def _change(self) -> None:
        label = self._label()
        if label == self._changes[-1][0]:
            return
        self._changes.append((label, self._now(), False))
        if len(self._changes) > _MAX_CHANGES:
            self._add_up(_MAX_CHANGES // 2)

    def _add_up(self, count: int) -> None:
        """Convert the oldest `count` changes to seconds."""
        for (label, begin, _), (_, end, is_lap) in pairwise(self._changes[: count + 1]):
            seconds = self._between(begin, end)
            self._seconds[label] += seconds
            self._lap[label] += seconds
            if is_lap:
                self._laps.append(dict(self._lap))
                self._lap.clear()
        del self._changes[:count]


_running: Stopwatch | None = None
"""State of the whole process, listed in docs/design.md."""


def start_stopwatch() -> Stopwatch:
    """Start the stopwatch of this process; an earlier one is dropped."""
    global _running
    _running = Stopwatch()
    return _running


def drop_stopwatch() -> None:
    """Drop the stopwatch of this process; regions do nothing from now on."""
    global _running
    _running = None


@contextmanager
def region(name: Region, *, whole: bool = False) -> Iterator[None]:
    """Count the time of a block for the region `name`, if there is a stopwatch.

    Args:
        name: the region.
        whole: time of the regions inside it counts for it.
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
    "forward-backward": "pipeline_wait",  # without the timers below
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
"""Timers of megatron-core's schedules, and the region of each."""


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
    """`config.timers` of megatron-core, on top of a stopwatch.

    megatron's own timers synchronise the device at every start and stop; these do not.
    """

    def __init__(self, watch: Stopwatch, *, is_pipelined: bool, by_name: bool = False) -> None:
        """Create the timers.

        Args:
            watch: the stopwatch.
            is_pipelined: there is more than one pipeline stage.
            by_name: count for `region/megatron's name` instead of the region.
        """
        regions: dict[str, str] = dict(MEGATRON_TIMERS)
        if not is_pipelined:
            regions["forward-backward"] = "other"
        self._timers = {
            name: _MegatronTimer(watch, f"{region}/{name}" if by_name else region)
            for name, region in regions.items()
        }

    def __call__(self, name: str, log_level: int | None = None) -> _MegatronTimer | _NoTimer:
        """Return the timer of that name; for unknown names one that does nothing."""
        return self._timers.get(name) or _NoTimer()
