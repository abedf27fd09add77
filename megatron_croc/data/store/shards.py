"""Read dataset folders: any sample by its number, from any thread.

    number --manifest.json--> shard, row --idx.npy--> offsets --read--> text and image bytes

An index is memory-mapped at the first read of its shard, so a dataset of 10^9 samples opens in the
time of reading its manifest (manifest.py).

Folders are local paths or s3:// prefixes (storage.py). Files are opened by the names in the
manifest; keys and names inside a tar are never used as paths. shard_writer.py defines the format.
"""

import bisect
import functools
import hashlib
import io
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from megatron_croc.data.bad_samples import BadSampleError
from megatron_croc.data.records.reading import conversation_of, parse_text
from megatron_croc.data.store.manifest import AGAIN, read_manifest
from megatron_croc.data.store.shard_writer import ShardInfo, sample_key
from megatron_croc.data.store.storage import (
    Storage,
    is_inside,
    is_remote,
    join_location,
    open_storage,
    read_whole,
    retry,
)
from megatron_croc.data.store.storage_cache import StorageCache
from megatron_croc.data.store.stored_array import let_go, load_array, open_array
from megatron_croc.errors import DataError, first_line
from megatron_croc.file_reading import whole_number

MAX_OPEN_FILES = 64
"""Largest number of open tars of a dataset."""

MAX_OPEN_INDEXES = 64
"""Largest number of open indexes of a dataset."""

CHECKED_AT_ONCE = 1024
"""Largest number of shards that are checked when a dataset is opened. Shards of larger datasets are
checked at their first read."""


@dataclass(frozen=True, kw_only=True)
class RawSample:
    """One stored sample."""

    sample_id: str
    """<dataset folder>/<key>: the same on every machine."""

    conversations: object
    """Stored messages, unchecked."""

    image_bytes: list[bytes]
    """Encoded images, in the order of their marks."""


class ShardedDataset:
    """Samples of several dataset folders, numbered through. Safe to share between threads."""

    def __init__(
        self,
        data_path: Sequence[str | Path] | str | Path,
        *,
        cache: StorageCache | None = None,
        roots: Sequence[str] | None = None,
    ) -> None:
        """Open the folders; check indexes and sizes of up to CHECKED_AT_ONCE shards.

        Args:
            data_path: local folders or s3:// prefixes.
            cache: local copies of remote tars; None: ranges are read from the remote tars.
            roots: folders in which tars may lie besides the dataset folder; None: anywhere, for
                commands that only count.

        Raises:
            DataError: a folder is unfinished, an index or tar differs from its manifest, or a tar
                lies elsewhere.
        """
        folders = [data_path] if isinstance(data_path, str | Path) else list(data_path)
        if not folders:
            raise DataError("data_path is empty: give at least one folder of shards")
        manifests = [read_manifest(folder) for folder in folders]
        names = _distinct_names([manifest.folder for manifest in manifests])
        self._shards = [
            _Shard(manifest.folder, shard, info, f"{name}/", roots)
            for manifest, name in zip(manifests, names, strict=True)
            for shard, info in enumerate(manifest.shards)
        ]
        counts = (shard.num_samples for shard in self._shards)
        self._starts = list(itertools.accumulate(counts, initial=0))
        # No method of its own: a dataset in a cycle would keep its files until the next collection.
        self._files = _Recent(functools.partial(_open_tar, cache), MAX_OPEN_FILES)
        self._indexes = _Recent(_Index, MAX_OPEN_INDEXES)
        if len(self._shards) <= CHECKED_AT_ONCE:
            for shard in self._shards:
                shard.check()

    def __len__(self) -> int:
        """Number of samples in all folders."""
        return self._starts[-1]

    def index_of(self, sample_id: str) -> int:
        """Return the number of a sample, given its id from a log or a report of bad samples.

        Raises:
            DataError: no such sample.
        """
        for shard, start in zip(self._shards, self._starts, strict=False):
            key = sample_id.removeprefix(shard.id_prefix)
            prefix = sample_key(shard.number, 0)[:-6]
            if key != sample_id and key.startswith(prefix):
                row = key.removeprefix(prefix)
                if (number := whole_number(row)) is not None and number < shard.num_samples:
                    return start + number
        raise DataError(
            f"sample {sample_id} is not in data_path; names are <dataset>/<shard>-<row>"
        )

    def read(self, index: int) -> RawSample:
        """Read one sample.

        Raises:
            BadSampleError: the stored text does not parse, or has no conversation or caption.
            DataError: the tar ends early.
            OSError: the file system failed; the same call may succeed later.
        """
        shard, sample_id, members = self._locate(index)
        text, *images = self._read(shard, sample_id, members)
        record = _parse(text, shard, sample_id)
        conversations = conversation_of(record, len(images), sample_id)
        return RawSample(sample_id=sample_id, conversations=conversations, image_bytes=images)

    def read_conversations(self, index: int) -> tuple[str, object, int]:
        """Read sample id, stored messages and number of images, without the images.

        Raises:
            The same as `read`.
        """
        shard, sample_id, members = self._locate(index)
        (text,) = self._read(shard, sample_id, members[:1])
        num_images = len(members) - 1
        record = _parse(text, shard, sample_id)
        return sample_id, conversation_of(record, num_images, sample_id), num_images

    def _locate(self, index: int) -> tuple["_Shard", str, list[tuple[int, int]]]:
        """Return a sample's shard, id, and the (offset, length) of its members."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        position = bisect.bisect_right(self._starts, index) - 1
        shard, row = self._shards[position], index - self._starts[position]
        shard.check()
        members = self._indexes.open(shard.index).members(row)
        return shard, shard.id_prefix + sample_key(shard.number, row), members

    def _read(self, shard: "_Shard", sample_id: str, members: list[tuple[int, int]]) -> list[bytes]:
        file = self._files.open(shard)
        try:
            return [file.read(offset, length) for offset, length in members]
        except DataError as error:
            raise DataError(f"sample {sample_id}: {error}") from error


def _open_tar(copies: StorageCache | None, shard: "_Shard") -> Storage:
    file = open_storage(shard.tar)
    if copies is None or not is_remote(shard.tar):
        return file
    return copies.open(file, digest=shard.info.tar_sha256, size=shard.info.tar_bytes)


def _parse(text: bytes, shard: "_Shard", sample_id: str) -> dict[str, Any]:
    try:
        return parse_text(text, shard.info.text_format)
    except ValueError as error:
        raise BadSampleError(
            sample_id, "record", f"{shard.tar} stores no valid text for it: {error}"
        ) from error


def _distinct_names(folders: list[str]) -> list[str]:
    """Compute the shortest path endings, in whole folders, that distinguish the datasets."""
    parts = [
        folder.rstrip("/").split("/")[2:] if is_remote(folder) else Path(folder).resolve().parts[1:]
        for folder in folders
    ]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise DataError(f"data_path names a folder twice: {', '.join(map(str, folders))}")


class _Shard:
    """One tar and its index."""

    def __init__(
        self,
        folder: str,
        number: int,
        info: ShardInfo,
        id_prefix: str,
        roots: Sequence[str] | None,
    ) -> None:
        self.number = number
        self.allowed = None if roots is None else [folder, *roots]
        self.info = info
        self.num_samples = info.num_samples
        self.tar = join_location(folder, info.tar)
        self.index = join_location(folder, f"{info.name}.idx.npy")
        self.id_prefix = id_prefix
        self._is_checked = False

    def check(self) -> None:
        """Compare index and tar with the manifest; the result is kept."""
        if self._is_checked:
            return
        for file in (self.tar, self.index):
            if self.allowed is not None and not is_inside(file, self.allowed):
                raise DataError(
                    f"data_path {self.allowed[0]} names {file}, which is outside of it: if its "
                    f"bytes may be trained on, name their folder: --data-roots "
                    f"{file.rpartition('/')[0]}"
                )
        try:
            stored = read_whole(self.index)
            tar_bytes = retry(lambda: open_storage(self.tar).size(), self.tar)
        except OSError as error:
            raise DataError(f"shard file missing: {first_line(error)}; {AGAIN}") from error
        if hashlib.sha256(stored).hexdigest() != self.info.idx_sha256:
            raise DataError(f"{self.index} is not the index that was written; {AGAIN}")
        rows = _read_index(stored, self.index)
        if (rows < 0).any() or (rows[:, 2] > np.iinfo(np.int64).max - rows[:, 1]).any():
            raise DataError(
                f"{self.index} does not fit the samples of {self.tar}: it names bytes that no file "
                f"has; {AGAIN}"
            )
        end = int((rows[:, 1] + rows[:, 2]).max(initial=0))
        if tar_bytes != self.info.tar_bytes or end > tar_bytes:
            raise DataError(
                f"{self.tar} has {tar_bytes} bytes, its manifest says {self.info.tar_bytes} and "
                f"its index reaches to {end}; {AGAIN}"
            )
        steps = np.diff(rows[:, 0], prepend=-1, append=self.num_samples)  # no sample is missing
        in_order = 0 <= steps.min() <= steps.max() <= 1 == steps[-1]
        if not in_order:
            raise DataError(f"{self.index} does not fit the samples of {self.tar}; {AGAIN}")
        self._is_checked = True


def _read_index(stored: bytes, path: str) -> np.ndarray:
    """Read an index, int64 [members, 3]."""
    try:
        rows = load_array(io.BytesIO(stored))
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path} is no index: {first_line(error)}; {AGAIN}") from error
    if rows.ndim != 2 or rows.shape[1] != 3 or rows.dtype != np.int64:
        raise DataError(f"{path} is no index: {rows.dtype} {rows.shape}; {AGAIN}")
    return rows


class _Index:
    """Index of a shard, int64 rows (sample, offset, length); memory-mapped if local."""

    def __init__(self, location: str) -> None:
        self._rows = open_array(location)

    def members(self, row: int) -> list[tuple[int, int]]:
        """Return (offset, length) of a sample's text and of its images, in this order."""
        first, last = (
            bisect.bisect_left(range(len(self._rows)), r, key=lambda i: self._rows[i, 0])
            for r in (row, row + 1)
        )
        members = [(int(offset), int(length)) for _, offset, length in self._rows[first:last]]
        let_go(self._rows)
        return members


_Key = TypeVar("_Key", bound=Hashable)
_Opened = TypeVar("_Opened")


class _Recent(Generic[_Key, _Opened]):
    """Cache of open files, least recently used first out. Readers keep an evicted file open."""

    def __init__(self, opener: Callable[[_Key], _Opened], max_open: int) -> None:
        self._opener = opener
        self._max_open = max_open
        self._files: OrderedDict[_Key, _Opened] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, key: _Key) -> _Opened:
        with self._lock:
            if (file := self._files.get(key)) is not None:
                self._files.move_to_end(key)
                return file
        # Outside the lock: opening may download the file; other shards do not wait for it.
        file = self._opener(key)
        with self._lock:
            file = self._files.setdefault(key, file)
            self._files.move_to_end(key)
            if len(self._files) > self._max_open:
                self._files.popitem(last=False)
            return file
