"""Removal of old checkpoints; a checkpoint that is being read is never removed."""

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_croc.checkpoint.manifest import MANIFEST_FILE, is_finished
from megatron_croc.checkpoint.run_folder import checkpoint_run_id, is_foreign
from megatron_croc.checkpoint.state import iteration_of
from megatron_croc.log import get_logger, log_once

logger = get_logger(__name__)

STAGED = ".incomplete"
"""Suffix of a checkpoint that is being written."""

REMOVED = ".removed"
"""Suffix of a checkpoint that is being deleted."""


@contextmanager
def being_read(folder: Path) -> Iterator[None]:
    """Lock a checkpoint against removal by other runs, if the file system has locks."""
    try:
        handle = os.open(folder / MANIFEST_FILE, os.O_RDONLY)
    except OSError:
        yield  # missing or not readable: the reader reports it
        return
    try:
        _lock(handle, fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Lock a checkpoint that is to be renamed; False inside if another process reads it."""
    try:
        handle = os.open(folder / MANIFEST_FILE, os.O_RDONLY)
    except FileNotFoundError:
        yield True
        return
    try:
        yield _lock(handle, fcntl.LOCK_EX)
    finally:
        os.close(handle)


def retire(folder: Path) -> Path | None:
    """Rename a checkpoint, so that it no longer counts as one.

    Returns:
        the renamed folder, to be deleted; None when another process reads the checkpoint.
    """
    away = folder.with_name(folder.name + REMOVED)
    shutil.rmtree(away, ignore_errors=True)
    with claimed(folder) as is_free:
        if not is_free:
            return None
        os.replace(folder, away)
    return away


def _lock(handle: int, kind: int) -> bool:
    """Return True if the lock was acquired, or if the file system has no locks."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN)
    return True


def superfluous(latest: Path, *, keep_last: int | None, keep_every: int | None) -> list[Path]:
    """List the checkpoints beside `latest` that may be removed, oldest first.

    Never the latest, never a later one (the run was set back), never one of another run, and never
    a folder without a manifest; such folders do not count towards `keep_last` either.
    """
    now = iteration_of(latest)
    if keep_last is None or now is None:
        return []
    older = {
        n: folder
        for folder in latest.parent.glob("iter_*")
        if (n := iteration_of(folder)) is not None and n < now and is_finished(folder)
    }
    run_id = checkpoint_run_id(latest)
    for n in [n for n, folder in older.items() if is_foreign(folder, run_id)]:
        log_once(logger, logging.WARNING, "kept %s: it is of another run", older.pop(n))
    newest = sorted(older, reverse=True)[: keep_last - 1]
    return [
        older[n]
        for n in sorted(older)
        if n not in newest and not (keep_every is not None and n % keep_every == 0)
    ]


def prune(latest: Path, *, keep_last: int | None, keep_every: int | None) -> list[Path]:
    """Rename superfluous checkpoints; return the folders to delete."""
    gone = []
    for folder in superfluous(latest, keep_last=keep_last, keep_every=keep_every):
        if (away := retire(folder)) is None:
            logger.info("kept %s: another process is reading it", folder)
        else:
            gone.append(away)
    return gone
