"""A directory that is there complete or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_croc.errors import CheckpointError


@contextmanager
def staged_directory(final: Path) -> Iterator[Path]:
    """A directory to fill under a temporary name; it gets its name when the block ends well.

    Args:
        final: must not exist.

    Raises:
        CheckpointError: `final` exists, or something in the block could not be written (disk
            full, no permission); whatever was begun is removed.
    """
    if final.exists():
        raise CheckpointError(f"{final}: exists already; remove it or name another")
    staged = final.with_name(final.name + ".incomplete")
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        yield staged
        os.replace(staged, final)
    except OSError as error:
        raise CheckpointError(f"{final}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
