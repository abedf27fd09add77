"""The parts put together in one process."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from tests.support.strict_device.collectives import Collectives
from tests.support.strict_device.job import Job, Options, place
from tests.support.strict_device.marks import Marks, Watch, install_marks
from tests.support.strict_device.streams import Copies
from tests.support.strict_device.transfers import Transfers


@contextmanager
def install(options: Options) -> Iterator[Job]:
    """Make this process strict for good; at the end of the block everything must be received."""
    job = Job(options)
    copies = Copies(job)
    marks = Marks(job, copies)
    transfers = Transfers(job, marks)
    transfers.install()
    Collectives(job, transfers).install()

    def synchronize(*_: object, **__: object) -> None:
        job.report.synchronizes[place()] += 1
        transfers.synchronize()
        copies.synchronize()

    torch.cuda.synchronize = synchronize
    if options.marks:
        copies.install()
        install_marks(marks)
    with Watch(marks) if options.marks else nullcontext():
        yield job
    transfers.synchronize()
    job.raise_faults()
