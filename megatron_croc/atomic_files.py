"""Files that are complete under their name, or not there at all, also after a power cut.

A power cut may lose everything that was not flushed: the content of a file, and every name that was
made, moved or removed since its folder was flushed.
"""

import ctypes
import errno
import os
import tempfile
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""Arguments of renameat2(2)."""

_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
"""Errors of kernels and file systems that cannot exchange two names."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it, rename it, and flush the name.

    Args:
        path: file to write; one of that name is replaced.
        data: its content.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_file(path: Path) -> None:
    """Flush the content of a file to disk that others have written and closed."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_directory(folder: Path) -> None:
    """Flush the names in a folder to disk, so that a rename in it survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush all files of a folder to disk, their names, and those of its subfolders."""
    for place, _, names in os.walk(folder):
        for name in names:
            sync_file(Path(place) / name)
        sync_directory(Path(place))


def make_directory(folder: Path) -> None:
    """Make a folder with its parents, and flush their names to disk; it may exist."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in reversed(missing):
        sync_directory(place.parent)


def exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two files or folders in one step.

    Returns:
        True; False if the kernel or the file system cannot do it (nothing is changed then).

    Raises:
        OSError: the exchange failed for another reason.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(first))


def why_unwritable(folder: Path) -> str | None:
    """Try to write to a folder, or where it would be made; leaves nothing behind.

    Returns:
        the reason why files cannot be written there; None if they can.
    """
    try:
        place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        # An empty file needs no room: a run may start on a full disk that it can clear itself.
        with tempfile.NamedTemporaryFile(prefix=".writable-", dir=place):
            pass
    except OSError as error:
        return error.strerror or str(error)
    return None
