"""Processes end together: workers with their launcher, children with their parent (Linux)."""

import ctypes
import os
import signal
import socket
import stat

PR_SET_PDEATHSIG = 1
"""Option of prctl: signal that this process gets when its parent ends."""

_installed = False
"""State of the whole process, listed in docs/design.md."""


def tie_processes_together() -> None:
    """End workers and child processes with their parent, even after SIGKILL; idempotent.

    - A worker of torchrun is killed when torchrun ends. Otherwise it would go on training.
    - A child that is forked from this process is killed when this process ends.
    - The child closes the connections to other ranks that it inherited. While they are open, the
      other ranks do not notice that this rank was killed, until their timeout.
    """
    global _installed
    if _installed or not hasattr(os, "register_at_fork"):
        return
    _installed = True
    if "TORCHELASTIC_RUN_ID" in os.environ:  # another parent may be a shell that the user closes
        die_with_parent()
    os.register_at_fork(after_in_child=_tie_child)


def _tie_child() -> None:
    die_with_parent()
    _close_inherited_connections()


def die_with_parent() -> None:
    """Let this process be killed when the thread that started it ends."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    except (AttributeError, OSError):  # not Linux
        return


def _close_inherited_connections() -> None:
    """Close all internet sockets, but no pipes and local sockets, which lead to the parent."""
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        try:
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            inherited = socket.socket(fileno=descriptor)
        except OSError:  # descriptor of the listing itself, already closed
            continue
        if inherited.family in (socket.AF_INET, socket.AF_INET6):
            inherited.close()
        else:
            inherited.detach()
