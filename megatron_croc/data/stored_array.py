"""Arrays of a dataset folder, of which a few rows are looked up here and there."""

import io
import mmap
from pathlib import Path

import numpy as np

from megatron_croc.data.storage import is_remote, read_whole


def open_array(location: str | Path) -> np.ndarray:
    """A stored .npy array: a local one mapped into memory, a remote one read whole.

    Raises:
        EOFError, OSError, ValueError: it cannot be read.
    """
    if is_remote(location):
        return np.load(io.BytesIO(read_whole(location)), allow_pickle=False)
    array = np.load(location, mmap_mode="r", allow_pickle=False)
    # Otherwise the system reads ahead of every number that is looked up.
    array._mmap.madvise(mmap.MADV_RANDOM)
    return array


def let_go(array: np.ndarray) -> None:
    """Unmap what was read of a mapped array; it stays in the system's cache of files."""
    if isinstance(array, np.memmap):
        array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
