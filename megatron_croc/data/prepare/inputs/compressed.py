"""Tars as storages, compressed or not; a compressed one is read front to back, which is slower."""

import bz2
import gzip
import lzma
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_croc.data.store.storage import Storage, is_remote, open_storage, retry
from megatron_croc.errors import DataError, first_line

_OPENERS = {
    "gzip": (re.compile(rb"\x1f\x8b"), gzip.open),
    "bzip2": (re.compile(rb"BZh\d1AY&SY"), bz2.open),
    "xz": (re.compile(rb"\xfd7zXZ\0"), lzma.open),
    "zstandard": (re.compile(rb"\x28\xb5\x2f\xfd"), None),
}
_HEAD_BYTES = 10


class CompressedFile:
    """A compressed file as the bytes inside it. Reads in order are fast, others begin anew."""

    def __init__(self, path: Path, opener: Callable[..., Any]) -> None:
        """Args: path: the file. opener: gzip.open, bz2.open or lzma.open."""
        self.location = str(path)
        self._file = opener(path, "rb")
        self._lock = threading.Lock()
        self._size: int | None = None

    def size(self) -> int:
        """Return the number of bytes inside; the first call reads the whole file."""
        with self._lock:
            size = self._size
            if size is None:
                size = self._size = int(self._damaged_is_an_error(lambda: self._file.seek(0, 2)))
            return size

    def read(self, offset: int, length: int) -> bytes:
        """Read exactly `length` bytes at `offset`."""

        def read() -> bytes:
            self._file.seek(offset)
            return self._file.read(length)

        with self._lock:
            return self._damaged_is_an_error(read)

    def _damaged_is_an_error(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (EOFError, OSError, lzma.LZMAError) as error:
            raise DataError(
                f"{self.location} does not decompress: {first_line(error)}; get the file again"
            ) from error

    def __del__(self) -> None:
        """Close the file."""
        if hasattr(self, "_file"):
            self._file.close()


def compression_of(location: str) -> str | None:
    """Return the name of the compression of a file, by its first bytes; None: none."""
    storage = open_storage(location)
    head = retry(lambda: storage.read(0, min(_HEAD_BYTES, storage.size())), location)
    return next((name for name, (magic, _) in _OPENERS.items() if magic.match(head)), None)


def open_tar(location: str) -> Storage:
    """Open a tar, also one in gzip, bzip2 or xz.

    Raises:
        DataError: another compression, or a compressed tar on an object store.
        OSError: it cannot be read.
    """
    compression = compression_of(location)
    if compression is None:
        return open_storage(location)
    opener = _OPENERS[compression][1]
    if opener is None or is_remote(location):
        raise DataError(
            f"{location} is compressed ({compression}): copy it to a local disk and decompress it"
        )
    return CompressedFile(Path(location), opener)
