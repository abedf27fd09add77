"""Helper process that ends a rank whose interpreter cannot run: C code that keeps the GIL.

    watchdog thread --a byte per wake-up, through a pipe--> helper
    no byte in so many wake-ups of the helper: SIGUSR2 (stacks of all threads), then SIGKILL

The helper counts its own wake-ups instead of reading a clock, and does not count while the rank is
stopped. A suspended job (SIGSTOP, Slurm's suspend) therefore goes on when it is resumed. It ends
when the pipe is closed, also by the death of the rank.
"""

import faulthandler
import os
import signal
import subprocess
import sys
from contextlib import suppress
from typing import TextIO

_HELPER = """
import os, select, signal, sys, time

rank, pause, most = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)

def is_stopped():
    with open(f"/proc/{rank}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] in "Tt"

missed = 0
while missed < most and os.getppid() == rank:
    if select.select([0], [], [], pause)[0]:
        if not os.read(0, 4096):
            sys.exit()
        missed = 0
    else:
        missed = 0 if is_stopped() else missed + 1
if os.getppid() == rank:
    os.kill(rank, signal.SIGUSR2)
    time.sleep(0.5)
if os.getppid() == rank:
    os.kill(rank, signal.SIGKILL)
"""


class Minder:
    """Helper process of this rank."""

    def __init__(self, *, pause: float, most_missed: int, stacks: TextIO) -> None:
        """Start the helper.

        Args:
            pause: seconds between two wake-ups of the helper.
            most_missed: wake-ups in a row without a sign after which the rank is ended.
            stacks: open file for the stacks of a rank that is ended.
        """
        faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
        words = [sys.executable, "-S", "-E", "-c", _HELPER]
        self._process = subprocess.Popen(
            [*words, str(os.getpid()), str(pause), str(most_missed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)  # a stopped helper stops nobody

    def tick(self) -> None:
        """Tell the helper that this rank's interpreter runs."""
        assert self._process.stdin is not None
        with suppress(OSError):  # the helper was killed: the rank goes on without it
            self._process.stdin.write(b".")

    def close(self) -> None:
        """End the helper."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        self._process.wait()
        faulthandler.unregister(signal.SIGUSR2)
