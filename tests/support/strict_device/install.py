"""The parts put together in one process."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_croc.parallel import device
from tests.support.strict_device.collectives import Collectives
from tests.support.strict_device.job import Job, Options, place
from tests.support.strict_device.transfers import Transfers


@contextmanager
def install(options: Options) -> Iterator[Job]:
    """Make this process strict for good; at the end of the block everything must be received."""
    job = Job(options)
    transfers = Transfers(job)
    transfers.install()
    Collectives(job, transfers).install()

    def synchronize(*_: object, **__: object) -> None:
        job.report.synchronizes[place()] += 1
        transfers.synchronize()

    torch.cuda.synchronize = synchronize
    yield job
    transfers.synchronize()
    job.raise_faults()
