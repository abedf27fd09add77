"""Arrays of a dataset folder, read at random rows."""

import io
import mmap
import os
import threading
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_croc.data.store.storage import is_remote, read_whole
from megatron_croc.tensor_headers import check_npy_header

_parsing = threading.Lock()
"""Global state of the process, listed in docs/design.md."""


def load_array(file: str | Path | BinaryIO, **options: Any) -> np.ndarray:
    """Load an array with `np.load`, without pickles; safe to call from several threads.

    `np.load` parses headers with Python's parser; two threads at once may raise a SystemError
    before Python 3.11.8 and 3.12.2 (python/cpython#106905).

    Raises:
        EOFError, OSError, ValueError: the array cannot be read.
    """
    if isinstance(file, str | Path):
        with open(file, "rb") as header:
            check_npy_header(header, os.fstat(header.fileno()).st_size)
    else:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        check_npy_header(file, size)
    with _parsing:
        return np.load(file, allow_pickle=False, **options)


def open_array(location: str | Path) -> np.ndarray:
    """Open a .npy array: memory-map a local file, read a remote one completely.

    Raises:
        EOFError, OSError, ValueError: the array cannot be read.
    """
    if is_remote(location):
        return load_array(io.BytesIO(read_whole(location)))
    array = load_array(location, mmap_mode="r")
    # Without it the system reads ahead at every lookup.
    array._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    return array


def let_go(array: np.ndarray) -> None:
    """Unmap the pages that were read of a mapped array; they stay in the page cache."""
    if isinstance(array, np.memmap):
        array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
