"""Naming of checkpoints: at every moment, a whole checkpoint keeps a name that a start finds.

iter_0000100.incomplete    being written
iter_0000100               finished
iter_0000100.superseded    whole, from before the run was set back and came here again; kept
iter_0000100.removed       being deleted
"""

import os
import shutil
from pathlib import Path

from megatron_croc.atomic_files import exchange, sync_directory
from megatron_croc.checkpoint.manifest import find_damage, is_finished
from megatron_croc.checkpoint.retention import REMOVED, STAGED, claimed
from megatron_croc.checkpoint.state import iteration_of, tracked_checkpoint
from megatron_croc.errors import CheckpointError
from megatron_croc.log import get_logger

logger = get_logger(__name__)

SUPERSEDED = ".superseded"
"""Suffix of a whole checkpoint whose name another one took."""


def publish(staged: Path, final: Path) -> list[Path]:
    """Give a finished checkpoint its name; a whole one of that name is kept beside it.

    Args:
        staged: folder with a manifest, flushed to disk.
        final: its name.

    Returns:
        folders to delete: a damaged checkpoint that had the name.

    Raises:
        CheckpointError: another process reads a checkpoint of that name.
    """
    gone: list[Path] = []
    if not final.exists():
        os.replace(staged, final)
    else:
        with claimed(final) as is_free:
            if not is_free:
                raise CheckpointError("a checkpoint of that name is being read")
            if find_damage(final):
                aside = final.with_name(final.name + REMOVED)
                shutil.rmtree(aside, ignore_errors=True)
                gone = [aside]
            else:
                aside = _free_name(final)
                logger.warning("%s is there already and whole: kept as %s", final, aside.name)
            _take_name(staged, final, aside)
    sync_directory(final.parent)
    return gone


def _take_name(staged: Path, final: Path, aside: Path) -> None:
    """Rename final to aside and staged to final, or change nothing."""
    if exchange(staged, final):
        try:
            os.replace(staged, aside)
        except OSError:
            exchange(staged, final)
            raise
    else:
        os.replace(final, aside)
        try:
            os.replace(staged, final)
        except OSError:
            os.replace(aside, final)
            raise


def sweep(root: Path) -> None:
    """Delete half-written and half-deleted checkpoints of killed runs; keep those that are whole.

    A run that was killed while it gave a name away leaves the checkpoint under another name: the
    latest one gets its own name back, and any other is kept as superseded.
    """
    _restore_latest(root)
    for left in root.glob("iter_*"):
        final = left.with_suffix("")
        if left.suffix not in (STAGED, REMOVED) or iteration_of(final) is None:
            continue
        if left.suffix == STAGED and final.exists() and is_finished(left) and not find_damage(left):
            os.replace(left, _free_name(final))
        else:
            shutil.rmtree(left, ignore_errors=True)


def _restore_latest(root: Path) -> None:
    """Give the checkpoint that the tracker names its name back."""
    try:
        latest = tracked_checkpoint(root)
    except CheckpointError:
        return  # reported by the resume
    if latest is None or latest.exists():
        return
    for ending in (SUPERSEDED, REMOVED, STAGED):
        left = latest.with_name(latest.name + ending)
        if left.is_dir() and not find_damage(left):
            os.replace(left, latest)
            sync_directory(root)
            logger.warning("%s was left as %s by a killed run: restored", latest, left.name)
            return


def _free_name(final: Path) -> Path:
    """Return a name for a superseded checkpoint: .superseded, .superseded2, ..."""
    number = 1
    while True:
        name = f"{final.name}{SUPERSEDED}{number if number > 1 else ''}"
        if not (aside := final.with_name(name)).exists():
            return aside
        number += 1
