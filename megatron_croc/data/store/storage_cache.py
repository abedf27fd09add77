"""Cache of remote files in a local folder of bounded size, shared by the processes of a node.

    remote tar --download, digest checked--> .<sha256>.part --rename--> <sha256>

A file is named by its digest, so runs can share it. The downloading process locks the `.part` file;
others wait for the lock. The least recently used files are removed to make room, but none that was
used in the last KEEP_SECONDS: otherwise data larger than the cache would replace each shard after a
few samples. Ranges of a file without room are read from the remote storage.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_croc.data.store.storage import LocalFile, Storage, retry
from megatron_croc.errors import DataError, first_line
from megatron_croc.log import get_logger

KEEP_SECONDS = 3600.0
"""Time since its last use in which a file is not removed."""

PIECE_BYTES = 8 << 20
"""Bytes of one ranged GET of a download."""

GIGABYTE = 10**9

logger = get_logger(__name__)


class _UnwritableError(Exception):
    """Error of the local disk, for example a full one; not an error of the remote storage."""


@contextmanager
def _local_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _UnwritableError(first_line(error)) from error


class StorageCache:
    """Local copies of remote files, at most `max_bytes` together."""

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        """Args: folder: on the node; created if missing. max_bytes: of all files together.

        Raises:
            DataError: the folder cannot be created.
        """
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"data_cache_dir {folder} cannot be made: {error}; name a local folder"
            ) from error

    def open(self, remote: Storage, *, digest: str, size: int) -> Storage:
        """Return the local copy of a file, downloaded if there is room; else the remote file.

        Args:
            remote: the file.
            digest: expected sha256, hex.
            size: number of bytes.

        Raises:
            DataError: the downloaded file has another digest.
            OSError: every attempt to download failed.
        """
        final, part = self.folder / digest, self.folder / f".{digest}.part"
        while True:
            try:
                os.utime(final)  # the time of last use
                return LocalFile(final)
            except FileNotFoundError:
                pass
            with _locked(part) as descriptor:
                # The previous holder of the lock may have finished or removed the file.
                if not _is_same_file(part, descriptor) or final.exists():
                    continue
                if not self._reserve(descriptor, size):
                    part.unlink()
                    return remote
                try:
                    self._download(remote, descriptor, digest, size)
                except _UnwritableError as error:
                    part.unlink(missing_ok=True)
                    logger.warning("%s: not cached (%s); read from the storage", final, error)
                    return remote
                except BaseException:
                    part.unlink(missing_ok=True)
                    raise
                part.replace(final)

    def _reserve(self, descriptor: int, size: int) -> bool:
        """Make room and reserve it by extending the file; return False if there is none."""
        with _locked(self.folder / ".lock"):
            now, used = time.time(), 0
            old: list[tuple[float, Path, int]] = []
            for path in self.folder.iterdir():
                if path.name == ".lock":
                    continue
                try:
                    if path.suffix == ".part" and _is_abandoned(path):
                        path.unlink()
                        continue
                    status = path.stat()
                except FileNotFoundError:
                    continue
                used += status.st_size
                if path.suffix != ".part" and now - status.st_mtime >= KEEP_SECONDS:
                    old.append((status.st_mtime, path, status.st_size))
            old.sort()
            removable = sum(entry[2] for entry in old)
            if used - removable + size > self.max_bytes:
                return False
            for _, path, length in old:
                if used + size <= self.max_bytes:
                    break
                path.unlink(missing_ok=True)  # its readers keep it open
                used -= length
            os.ftruncate(descriptor, size)
            return True

    def _download(self, remote: Storage, descriptor: int, digest: str, size: int) -> None:
        found, begin = hashlib.sha256(), time.monotonic()
        for offset in range(0, size, PIECE_BYTES):
            length = min(PIECE_BYTES, size - offset)
            piece = retry(lambda o=offset, n=length: remote.read(o, n), remote.location)
            found.update(piece)
            with _local_errors():
                os.pwrite(descriptor, piece, offset)
        if found.hexdigest() != digest:
            raise DataError(
                f"{remote.location} is not the file that was written (another sha256): "
                "copy it again, or run croc data preprocess for it again"
            )
        with _local_errors():
            os.fsync(descriptor)
        seconds = time.monotonic() - begin
        logger.info("cached %s: %.1f MB in %.1f s", remote.location, size / 1e6, seconds)


def build_cache(data_cache_dir: str | None, data_cache_gb: float) -> StorageCache | None:
    """Build the cache of a run; None if the run has none."""
    if data_cache_dir is None:
        return None
    return StorageCache(data_cache_dir, int(data_cache_gb * GIGABYTE))


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Hold the lock of a file, created if missing; excludes threads of this process too."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _is_same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _is_abandoned(path: Path) -> bool:
    """Return True if no process holds the lock of a download: its process was killed."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
