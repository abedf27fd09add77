"""Settings of timeouts, early stopping and skipped steps."""

from dataclasses import dataclass

WATCHDOG_MARGIN = 1.5
"""Multiple of the limit at which a rank ends whose watchdog cannot run; torch waits longer."""


@dataclass(kw_only=True)
class ReliabilityConfig:
    """Timeouts, early stopping, and limits on skipped steps.

    SIGTERM and SIGUSR1 on any rank end the run after the current step, with a checkpoint.
    """

    stall_timeout_minutes: float = 10.0
    """Longest time in one phase of a step before the watchdog ends the rank and names it."""

    first_step_timeout_minutes: float = 20.0
    """stall_timeout_minutes in the first step of a run, which compiles and tunes kernels."""

    exit_duration_in_mins: float | None = None
    """Minutes of training after which the run stops with a checkpoint; None: no limit."""

    exit_interval: int | None = None
    """Stop with a checkpoint after the next step that is a multiple of this; None: never."""

    max_consecutive_skips: int = 10
    """Most steps in a row that may be skipped (loss or gradient not finite, or a spike); one more
    ends the run, with a checkpoint of the last good step."""

    spike_factor: float = 0.0
    """Skip a step whose loss is above this multiple of the mean of the last 32; 0: never."""
