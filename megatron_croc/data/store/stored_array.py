"""Arrays of a dataset folder, of which a few rows are looked up here and there."""

import io
import mmap
import threading
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_croc.data.store.storage import is_remote, read_whole

_parsing = threading.Lock()
"""State of the whole process, listed in docs/design.md."""


def load_array(file: str | Path | BinaryIO, **options: Any) -> np.ndarray:
    """`np.load` without pickles, which threads may call at once.

    It parses a header by Python's own parser, of which two at once may end in a SystemError before
    Python 3.11.8 and 3.12.2 (python/cpython#106905).

    Raises:
        EOFError, OSError, ValueError: it cannot be read.
    """
    with _parsing:
        return np.load(file, allow_pickle=False, **options)


def open_array(location: str | Path) -> np.ndarray:
    """A stored .npy array: a local one mapped into memory, a remote one read whole.

    Raises:
        EOFError, OSError, ValueError: it cannot be read.
    """
    if is_remote(location):
        return load_array(io.BytesIO(read_whole(location)))
    array = load_array(location, mmap_mode="r")
    # Otherwise the system reads ahead of every number that is looked up.
    array._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    return array


def let_go(array: np.ndarray) -> None:
    """Unmap what was read of a mapped array; it stays in the system's cache of files."""
    if isinstance(array, np.memmap):
        array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
