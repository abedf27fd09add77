"""A CPU and gloo with the manners of CUDA and NCCL, so that a device's faults show without one.

    job          options, faults, what every rank is doing
    transfers    sends are late and open until received; the first use of a pair is a rendezvous
    collectives  the same order, op, shape and dtype on every rank of a group
    streams      side streams, events, copies to the host that arrive late
    marks        which tensors are the device's; reads by the host are counted

Use `run_strict` as the function of a job, or `install` in a forked rank; `pytest --strict-device`
puts every job of `run_distributed` under it. Not there: the order in which NCCL runs the operations
of one communicator (each is a stream), its buffers (a small send may end before it is received),
functional collectives, and kernels that are late themselves.
"""

from collections.abc import Callable
from typing import Any

from tests.support.strict_device.install import install
from tests.support.strict_device.job import Job, Options, Report, StrictFault

__all__ = ["Job", "Options", "Report", "StrictFault", "install", "result_of", "run_strict"]


def run_strict(options: Options, function: Callable[..., Any], *args: Any) -> tuple[Any, Report]:
    """function(*args) on this rank under the stand-in; its result and what was seen."""
    with install(options) as job:
        result = function(*args)
    return result, job.report


def result_of(options: Options, function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) on this rank under the stand-in."""
    return run_strict(options, function, *args)[0]
