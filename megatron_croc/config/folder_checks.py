"""Check of the folders that a run writes to, before anything is built."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_croc.config.run import RunConfig


def find_unwritable_folders(run: RunConfig) -> Iterator[str]:
    """Find folders of the run that cannot be made or written; a full disk is no fault here."""
    for name, folder in {"save": run.checkpoint.save, "log_dir": run.logging.log_dir}.items():
        if folder is None:
            continue
        probe = Path(folder) / f".probe-{os.getpid()}"
        try:
            probe.parent.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                yield f"{name}={folder}: cannot be written ({error.strerror}); name another folder"
