"""Processes that end together: with their launcher, and children with their parent (Linux)."""

import ctypes
import os
import signal
import socket
import stat

PR_SET_PDEATHSIG = 1
"""prctl's option: the signal this process gets when its parent ends."""

_installed = False
"""State of the whole process, listed in docs/design.md."""


def tie_processes_together() -> None:
    """Leave no process behind, however this one or its launcher ends; idempotent.

    - A worker of torchrun is killed with it; by SIGKILL a launcher would leave workers training on.
    - A child forked from here is killed with this process.
    - Such a child gives up the connections to other ranks it has inherited. As long as it held
      them, a rank that was killed would look alive to its peers, until their timeout.
    """
    global _installed
    if _installed or not hasattr(os, "register_at_fork"):
        return
    _installed = True
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a plain parent may be a shell that is closed
        _die_with_parent()
    os.register_at_fork(after_in_child=_become_a_tied_child)


def _become_a_tied_child() -> None:
    _die_with_parent()
    _close_inherited_connections()


def _die_with_parent() -> None:
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    except (AttributeError, OSError):  # no Linux
        return


def _close_inherited_connections() -> None:
    """Close every internet socket; pipes and local sockets are how a child talks to its parent."""
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        try:
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            inherited = socket.socket(fileno=descriptor)
        except OSError:  # the listing's own descriptor, closed by now
            continue
        if inherited.family in (socket.AF_INET, socket.AF_INET6):
            inherited.close()
        else:
            inherited.detach()
