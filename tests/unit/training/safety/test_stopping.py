import os
import signal

from megatron_croc.config.reliability import ReliabilityConfig
from megatron_croc.training.safety.stopping import stop_requests


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
