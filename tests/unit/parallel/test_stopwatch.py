"""Own times of nested regions, by a clock that the test sets."""

import re
import threading
from pathlib import Path

import pytest

from megatron_croc.parallel import stopwatch
from megatron_croc.parallel.stopwatch import MEGATRON_TIMERS, MegatronTimers, Stopwatch, region


class Clock:
    def __init__(self) -> None:
        self.time = 0.0
        self.asked = 0

    def now(self) -> float:
        self.asked += 1
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(clock: Clock) -> Stopwatch:
    return Stopwatch(clock.now, lambda begin, end: end - begin)


def test_a_moment_counts_for_the_innermost_region_only(watch: Stopwatch, clock: Clock):
    clock.time = 1.0
    watch.start("forward")
    clock.time = 3.0
    watch.start("vision")
    clock.time = 6.0
    watch.stop("vision")
    clock.time = 10.0
    watch.stop("forward")
    clock.time = 15.0
    assert watch.read() == {"other": 1.0 + 5.0, "forward": 2.0 + 4.0, "vision": 3.0}
    clock.time = 16.0
    assert watch.read() == {"other": 1.0}  # only what came since


def test_laps_cut_the_time_into_steps(watch: Stopwatch, clock: Clock):
    """Laps are returned after the next read; time after the last one belongs to the next."""
    for seconds in (2.0, 3.0):
        watch.start("forward")
        clock.time += seconds
        watch.stop("forward")
        clock.time += 1.0
        watch.end_lap()
    watch.start("validation")
    clock.time += 5.0
    watch.stop("validation")
    assert watch.read() == {"other": 2.0, "forward": 5.0, "validation": 5.0}
    assert (
        watch.take_laps()
        == [
            {"other": 1.0, "forward": 2.0},
            {"other": 1.0, "forward": 3.0},
        ]
        and not watch.take_laps()
    )
    clock.time += 1.0
    watch.end_lap()
    watch.read()
    assert watch.take_laps() == [{"other": 1.0, "validation": 5.0}]


def test_a_region_that_is_open_is_cut_by_a_read(watch: Stopwatch, clock: Clock):
    watch.start("backward")
    clock.time = 2.0
    assert watch.read() == {"other": 0.0, "backward": 2.0}
    clock.time = 5.0
    watch.stop("backward")
    assert watch.read()["backward"] == 3.0


def test_a_whole_region_takes_what_is_inside_it(watch: Stopwatch, clock: Clock):
    watch.start("validation", whole=True)
    watch.start("forward")
    clock.time = 2.0
    watch.stop("forward")
    clock.time = 3.0
    watch.stop("validation")
    assert watch.read() == {"other": 0.0, "validation": 3.0}


def test_what_an_error_left_open_is_closed_with_its_outer_region(watch: Stopwatch, clock: Clock):
    watch.start("forward")
    watch.start("vision")
    clock.time = 1.0
    watch.stop("forward")  # vision was never stopped
    watch.stop("vision")  # and comes too late
    clock.time = 3.0
    assert watch.read() == {"other": 2.0, "forward": 0.0, "vision": 1.0}


def test_other_threads_take_no_time(watch: Stopwatch, clock: Clock):
    thread = threading.Thread(target=lambda: (watch.start("matching"), watch.stop("forward")))
    watch.start("forward")
    thread.start()
    thread.join()
    clock.time = 4.0
    assert watch.read() == {"other": 0.0, "forward": 4.0}


def test_many_changes_are_added_up_on_the_way(watch: Stopwatch, clock: Clock, monkeypatch):
    monkeypatch.setattr(stopwatch, "_MAX_CHANGES", 8)
    for number in range(100):
        clock.time = 2.0 * number
        watch.start("forward")
        clock.time += 1.0
        watch.stop("forward")
        assert len(watch._changes) <= 8
    assert watch.read() == {"other": 99.0, "forward": 100.0}


def test_without_a_stopwatch_a_region_does_nothing(monkeypatch):
    monkeypatch.setattr(stopwatch, "_running", None)
    calls = []

    @region("vision")
    def work() -> int:
        calls.append(1)
        return 7

    assert work() == 7 and calls == [1]


def test_a_region_closes_after_an_error(monkeypatch, watch: Stopwatch, clock: Clock):
    monkeypatch.setattr(stopwatch, "_running", watch)
    with pytest.raises(KeyError), region("vision"):
        clock.time = 2.0
        raise KeyError
    clock.time = 3.0
    assert watch.read() == {"other": 1.0, "vision": 2.0}


def test_every_timer_megatrons_schedules_start_is_known():
    import megatron.core

    root = Path(next(iter(megatron.core.__path__)))
    sources = ["pipeline_parallel/schedules.py", "pipeline_parallel/p2p_communication.py"]
    sources += ["distributed/finalize_model_grads.py"]
    text = "".join((root / source).read_text() for source in sources)
    named = set(re.findall(r"""timers\(\s*['"]([a-z-]+)['"]""", text))
    assert named == set(MEGATRON_TIMERS)


def test_megatrons_timers_run_on_the_stopwatch(watch: Stopwatch, clock: Clock):
    timers = MegatronTimers(watch, is_pipelined=True)
    timers("forward-backward", log_level=1).start(barrier=False)
    timers("forward-compute", log_level=2).start()
    clock.time = 2.0
    timers("forward-compute").stop()
    timers("a-timer-of-tomorrow").start()
    clock.time = 5.0
    timers("a-timer-of-tomorrow").stop()
    timers("forward-backward").stop()
    # What the schedule does between compute is waiting for neighbours, if there are any.
    assert watch.read() == {"other": 0.0, "forward": 2.0, "pipeline_wait": 3.0}
    alone = MegatronTimers(watch, is_pipelined=False)
    alone("forward-backward").start()
    clock.time = 6.0
    alone("forward-backward").stop()
    assert watch.read() == {"other": 1.0}
    named = MegatronTimers(watch, is_pipelined=True, by_name=True)
    named("forward-recv").start()
    clock.time = 7.0
    named("forward-recv").stop()
    assert watch.read() == {"other": 0.0, "pipeline_wait/forward-recv": 1.0}
