"""Opening of a run's folder by all ranks together: one run at a time, and always the same run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_croc.checkpoint.folder_lock import FolderLock
from megatron_croc.checkpoint.publishing import sweep
from megatron_croc.checkpoint.run_folder import refuse_other_run, resume_root
from megatron_croc.config.run import RunConfig
from megatron_croc.parallel.rank_zero import on_rank_zero


@contextmanager
def open_run_folder(run: RunConfig) -> Iterator[str | None]:
    """Hold the folder `save` inside the block, and yield the folder to resume from.

    Rank 0 takes the lock, and the other ranks hear of it. Every rank must call it.

    Raises:
        CheckpointError: another run holds the folder, it is another run's, or it cannot be written.
    """
    locks: list[FolderLock] = []

    def enter() -> str | None:
        if run.checkpoint.save is not None:
            folder = Path(run.checkpoint.save)
            locks.append(FolderLock(folder, make_room=lambda: sweep(folder)))
        refuse_other_run(run)
        return resume_root(run.checkpoint)

    try:
        yield on_rank_zero(enter)
    finally:
        for lock in locks:
            lock.release()
