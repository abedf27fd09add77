import os
import signal
import time

import pytest

from megatron_croc.config.reliability import ReliabilityConfig
from megatron_croc.training.safety.stopping import SAME_PRESS, stop_requests


def test_a_signal_is_answered_at_the_end_of_the_step(pg_collection):
    before = signal.getsignal(signal.SIGUSR1)
    with stop_requests(ReliabilityConfig()) as stop:
        assert not stop.agreed(1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.agreed(2)
    assert signal.getsignal(signal.SIGUSR1) is before


def test_limits(pg_collection):
    with stop_requests(ReliabilityConfig(exit_interval=4)) as stop:
        assert [stop.agreed(i) for i in range(1, 6)] == [False, False, False, True, False]
    with stop_requests(ReliabilityConfig(exit_duration_in_mins=1e-9)) as stop:
        assert stop.agreed(1)
    with stop_requests(ReliabilityConfig(exit_duration_in_mins=60.0)) as stop:
        assert not stop.agreed(1)


def test_ctrl_c_ends_the_run_after_its_step(pg_collection, capfd):
    before = signal.getsignal(signal.SIGINT)
    with stop_requests(ReliabilityConfig()) as stop:
        stop.raise_if_interrupted()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.agreed(2)
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt, match="stopped by Ctrl-C after step 2"):
        stop.raise_if_interrupted()
    assert "press it again" in capfd.readouterr().err


def test_a_second_ctrl_c_ends_the_process_at_once(pg_collection, monkeypatch, capfd):
    clock, statuses = [100.0], list[int]()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(os, "_exit", statuses.append)
    with stop_requests(ReliabilityConfig()):
        for seconds in (0.0, SAME_PRESS, SAME_PRESS + 0.1):  # the second one: passed on by torchrun
            clock[0] = 100.0 + seconds
            os.kill(os.getpid(), signal.SIGINT)
            assert statuses == ([130] if seconds > SAME_PRESS else [])
    assert "stopped at once by the second Ctrl-C" in capfd.readouterr().err


def test_other_signals_than_ctrl_c_end_a_run_without_an_exception(pg_collection):
    with stop_requests(ReliabilityConfig()) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed(1)
        stop.raise_if_interrupted()


def test_an_ignored_ctrl_c_stays_ignored(pg_collection):
    """A shell starts background jobs so."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_requests(ReliabilityConfig()) as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.agreed(1)
    finally:
        signal.signal(signal.SIGINT, before)
