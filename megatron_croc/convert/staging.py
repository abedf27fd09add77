"""Write a directory atomically: complete, or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_croc.atomic_files import make_directory, sync_directory, sync_tree
from megatron_croc.errors import CheckpointError


@contextmanager
def staged_directory(final: Path) -> Iterator[Path]:
    """Create a directory under a temporary name; rename it when the block ends without error.

    Args:
        final: final name; must not exist.

    Raises:
        CheckpointError: `final` exists, or writing in the block failed (disk full, no permission).
            The temporary directory is then removed.
    """
    if final.exists():
        raise CheckpointError(f"{final}: exists already; remove it or name another")
    staged = final.with_name(final.name + ".incomplete")
    try:
        shutil.rmtree(staged, ignore_errors=True)
        make_directory(staged)
        yield staged
        sync_tree(staged)  # a power cut must not leave a name with empty files
        os.replace(staged, final)
        sync_directory(final.parent)
    except OSError as error:
        raise CheckpointError(f"{final}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
