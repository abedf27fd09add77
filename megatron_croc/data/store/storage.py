"""Access to files on local disk, network file systems and S3-compatible object stores.

    location --open_storage--> Storage.size(), Storage.read(offset, length)
      /a/b.tar          pread, any thread
      s3://bucket/key   ranged GET (boto3, the extra `s3`); AWS_ENDPOINT_URL names another server

A failure of the storage raises an OSError that names the location; `retry` repeats the call. A file
that ends early is truncated and raises a DataError, as another read would not help.
"""

import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from megatron_croc.errors import DataError, first_line
from megatron_croc.log import get_logger

ATTEMPTS = 4
"""Number of attempts when the storage fails."""

FIRST_PAUSE_SECONDS = 0.2
"""Pause before the second attempt; each later pause is twice as long."""

S3_SCHEME = "s3://"

logger = get_logger(__name__)

T = TypeVar("T")


class Storage(Protocol):
    """One file or object. Safe to share between threads."""

    location: str
    """Path or URL, for messages."""

    def size(self) -> int:
        """Return the number of bytes. Raises OSError."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Read exactly `length` bytes at `offset`. Raises OSError; DataError if it ends early."""
        ...


def is_remote(location: str | Path) -> bool:
    """Return True if a location is an object store's, not a local path."""
    return str(location).startswith(S3_SCHEME)


def join_location(folder: str | Path, name: str) -> str:
    """Return the location of `name` in a folder; `name` may be an absolute location."""
    if is_remote(name):
        return name
    if is_remote(folder):
        return f"{str(folder).rstrip('/')}/{name}"
    return str(Path(folder) / name)


def is_inside(location: str, folders: Iterable[str]) -> bool:
    """Return True if a file lies in one of these folders, its links followed."""
    if is_remote(location):
        is_plain = ".." not in location.split("/")
        return is_plain and any(location.startswith(f"{f.rstrip('/')}/") for f in folders)
    place = Path(os.path.realpath(location))
    local = (Path(os.path.realpath(folder)) for folder in folders if not is_remote(folder))
    return any(place.is_relative_to(folder) for folder in local)


def open_storage(location: str | Path) -> Storage:
    """Open the storage of a location.

    Raises:
        DataError: an s3:// location without boto3, or without a key.
        OSError: no such file, or it cannot be opened.
    """
    return S3Object(str(location)) if is_remote(location) else LocalFile(location)


def read_whole(location: str | Path) -> bytes:
    """Read all bytes of a small file, with retries."""

    def read() -> bytes:
        storage = open_storage(location)
        return storage.read(0, storage.size())

    return retry(read, str(location))


def list_objects(prefix: str) -> list[str]:
    """Return the s3:// locations whose keys begin with a prefix, in order of name.

    Raises:
        DataError: boto3 is missing, or the prefix names no bucket.
        OSError: every attempt failed.
    """
    bucket, _, key = prefix.removeprefix(S3_SCHEME).partition("/")
    if not bucket:
        raise DataError(f"{prefix} names no bucket: write s3://bucket/prefix")
    pages = _s3_client(os.getpid()).get_paginator("list_objects_v2")

    def read() -> list[str]:
        with _as_os_error(prefix):
            found = pages.paginate(Bucket=bucket, Prefix=key)
            return [entry["Key"] for page in found for entry in page.get("Contents", ())]

    return [f"{S3_SCHEME}{bucket}/{name}" for name in sorted(retry(read, prefix))]


def retry(call: Callable[[], T], what: str) -> T:
    """Repeat a call after an OSError, except for missing files and missing rights.

    Raises:
        OSError: of the last attempt.
    """
    for attempt in range(1, ATTEMPTS):
        try:
            return call()
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError):
            raise
        except OSError as error:
            logger.warning("%s: attempt %d failed, trying again: %s", what, attempt, error)
        time.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
    return call()


def _ends_early(location: str, offset: int, length: int) -> DataError:
    return DataError(
        f"{location} ends inside the {length} bytes at {offset}: it is truncated; copy it again"
    )


class LocalFile:
    """An open file, closed with its last reference. Reads use pread, so threads may share it."""

    def __init__(self, path: str | Path) -> None:
        """Args: path: an existing file."""
        self.location = str(path)
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def size(self) -> int:
        """Return the size of the file."""
        return os.fstat(self._descriptor).st_size

    def read(self, offset: int, length: int) -> bytes:
        """Read exactly `length` bytes at `offset`."""
        pieces, missing = [], length
        while missing:
            piece = os.pread(self._descriptor, missing, offset + length - missing)
            if not piece:
                raise _ends_early(self.location, offset, length)
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)

    def __del__(self) -> None:
        """Close the file."""
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


class S3Object:
    """An S3 object, read by ranged GETs."""

    def __init__(self, url: str) -> None:
        """Args: url: s3://bucket/key."""
        self.location = url
        self._bucket, _, self._key = url.removeprefix(S3_SCHEME).partition("/")
        if not self._bucket or not self._key:
            raise DataError(f"{url} is no object: write s3://bucket/key")
        _s3_client(os.getpid())  # fails here if boto3 is missing

    def size(self) -> int:
        """Return the size of the object."""
        return int(self._request("head_object")["ContentLength"])

    def read(self, offset: int, length: int) -> bytes:
        """Read exactly `length` bytes at `offset`."""
        if not length:
            return b""
        answer = self._request("get_object", Range=f"bytes={offset}-{offset + length - 1}")
        with _as_os_error(self.location):
            data = answer["Body"].read()
        if len(data) != length:
            raise _ends_early(self.location, offset, length)
        return data

    def _request(self, operation: str, **arguments: str) -> dict[str, Any]:
        client = _s3_client(os.getpid())
        with _as_os_error(self.location):
            return getattr(client, operation)(Bucket=self._bucket, Key=self._key, **arguments)


@functools.cache
def _s3_client(process: int) -> Any:
    """Return the client of this process: threads may share it, forked processes must not.

    Global state of the process, listed in docs/design.md.
    """
    try:
        import boto3
        from botocore.config import Config
    except ImportError as error:
        raise DataError(
            f"s3:// data needs boto3, which does not import ({error}): pip install -e '.[s3]'"
        ) from error
    # `retry` repeats calls; without retries of boto3 each is logged and counted once.
    config = Config(
        retries={"total_max_attempts": 1},
        max_pool_connections=64,
        connect_timeout=20,
        read_timeout=60,
    )
    return boto3.client("s3", config=config)


@contextmanager
def _as_os_error(location: str) -> Iterator[None]:
    """Convert boto3's errors to OSErrors that name the location."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if status == 416:  # the range begins after the end
            raise DataError(
                f"{location} ends before the bytes asked for: it is truncated; copy it again"
            ) from error
        kind = {404: FileNotFoundError, 403: PermissionError}.get(status, OSError)
        raise kind(f"{location}: {first_line(error)}") from error
    except Exception as error:
        if isinstance(error, BotoCoreError | OSError) or _is_transfer(error):
            raise OSError(f"{location}: {first_line(error)}") from error
        raise


def _is_transfer(error: BaseException) -> bool:
    """Return True for urllib3's errors, which boto3 does not wrap while it reads a body."""
    return type(error).__module__.startswith("urllib3")
