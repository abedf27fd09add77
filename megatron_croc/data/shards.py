"""Reading dataset folders: any sample by its number, from any thread.

    number --manifest.json--> shard, row --idx.npy--> offsets --pread--> JSON and image bytes

An index is memory-mapped when its shard is first read, so a dataset of 10^9 samples opens as fast
as its manifest is read.

Files are opened by the manifest's own names; keys and names inside a tar are never used as paths.
What was written how is told in shard_writer.py.
"""

import bisect
import hashlib
import io
import itertools
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from megatron_croc.data.bad_samples import BadSampleError
from megatron_croc.data.shard_writer import (
    FORMAT_NAME,
    FORMAT_VERSION,
    MANIFEST,
    LengthsInfo,
    ShardInfo,
    let_go,
    map_array,
    sample_key,
    sha256_of,
    shard_name,
)
from megatron_croc.errors import DataError

MAX_OPEN_FILES = 64
"""Tars held open at once by one dataset."""

MAX_OPEN_INDEXES = 64
"""Indexes mapped into memory at once by one dataset."""

CHECKED_AT_ONCE = 1024
"""Shards up to which a dataset is checked when it is opened; larger ones shard by shard, at the
first sample read from each."""

_AGAIN = "run tools/preprocess_data.py for it again"


@dataclass(frozen=True, kw_only=True)
class RawSample:
    """One sample as stored."""

    sample_id: str
    """<dataset folder>/<key>: the same on every machine."""

    conversations: object
    """The stored messages, not yet checked."""

    image_bytes: list[bytes]
    """Encoded images, in the order of their marks."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a dataset folder holds."""

    folder: Path
    num_samples: int
    num_images: int
    num_text_only: int
    shards: tuple[ShardInfo, ...]
    lengths: tuple[LengthsInfo, ...] = ()


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check a folder's manifest.

    Raises:
        DataError: no such folder, no manifest (writing was not finished), or not one of ours.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        state = "holds no finished dataset (no manifest.json)" if folder.is_dir() else "is missing"
        raise DataError(
            f"data_path {folder} {state}: finish it with tools/preprocess_data.py, which goes on "
            "where it stopped"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not readable: {error}; {_AGAIN}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT_NAME:
        raise DataError(f"{path} is no manifest of {FORMAT_NAME}; {_AGAIN}")
    if content.get("version") != FORMAT_VERSION:
        raise DataError(
            f"{path} has version {content.get('version')}, this code reads {FORMAT_VERSION}; "
            f"{_AGAIN}"
        )
    try:
        names = [field.name for field in fields(ShardInfo)]
        shards = tuple(
            ShardInfo(**{name: shard[name] for name in names}) for shard in content["shards"]
        )
        manifest = Manifest(
            folder=folder,
            num_samples=content["num_samples"],
            num_images=content["num_images"],
            num_text_only=content["num_text_only"],
            shards=shards,
            lengths=tuple(LengthsInfo(**entry) for entry in content.get("lengths", ())),
        )
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} lacks or misuses the key {error}; {_AGAIN}") from error
    named = all(shard.name == shard_name(i) for i, shard in enumerate(shards))
    if not named or manifest.num_samples != sum(shard.num_samples for shard in shards):
        raise DataError(f"{path} contradicts itself (shard names or counts); {_AGAIN}")
    return manifest


def count_samples(data_path: Sequence[str | Path]) -> int:
    """Samples in all folders together, from their manifests alone."""
    return sum(read_manifest(folder).num_samples for folder in data_path)


class ShardedDataset:
    """Samples of one or several dataset folders, one after the other. Threads may share it."""

    def __init__(self, data_path: Sequence[str | Path] | str | Path) -> None:
        """Open the folders; checks every index and the size of every tar, unless they are many.

        Raises:
            DataError: a folder is unfinished, or an index or tar is not the one written.
        """
        folders = [data_path] if isinstance(data_path, str | Path) else list(data_path)
        if not folders:
            raise DataError("data_path is empty: give at least one folder of shards")
        manifests = [read_manifest(folder) for folder in folders]
        names = _distinct_names([manifest.folder for manifest in manifests])
        self._shards = [
            _Shard(manifest.folder, shard, info, f"{name}/")
            for manifest, name in zip(manifests, names, strict=True)
            for shard, info in enumerate(manifest.shards)
        ]
        counts = (shard.num_samples for shard in self._shards)
        self._starts = list(itertools.accumulate(counts, initial=0))
        self._files = _Recent(_File, MAX_OPEN_FILES)
        self._indexes = _Recent(_Index, MAX_OPEN_INDEXES)
        if len(self._shards) <= CHECKED_AT_ONCE:
            for shard in self._shards:
                shard.check()

    def __len__(self) -> int:
        """Samples in all folders."""
        return self._starts[-1]

    def read(self, index: int) -> RawSample:
        """Read one sample.

        Raises:
            BadSampleError: its stored JSON does not parse.
            DataError: its tar ends early.
            OSError: the file system failed; the same call may succeed later.
        """
        shard, sample_id, members = self._locate(index)
        file = self._files.open(shard.tar_path)
        text, *images = (file.read(offset, length, sample_id) for offset, length in members)
        conversations = _parse(text, shard, sample_id)
        return RawSample(sample_id=sample_id, conversations=conversations, image_bytes=images)

    def read_conversations(self, index: int) -> tuple[str, object, int]:
        """Sample id, stored messages and number of images; the images are not read.

        Raises:
            The same as `read`.
        """
        shard, sample_id, members = self._locate(index)
        offset, length = members[0]
        text = self._files.open(shard.tar_path).read(offset, length, sample_id)
        return sample_id, _parse(text, shard, sample_id), len(members) - 1

    def _locate(self, index: int) -> tuple["_Shard", str, list[tuple[int, int]]]:
        """A sample's shard, id, and the (offset, length) of its members."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        position = bisect.bisect_right(self._starts, index) - 1
        shard, row = self._shards[position], index - self._starts[position]
        shard.check()
        members = self._indexes.open(shard.index_path).members(row)
        return shard, shard.id_prefix + sample_key(shard.number, row), members


def _parse(text: bytes, shard: "_Shard", sample_id: str) -> object:
    try:
        return json.loads(text)["conversations"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadSampleError(
            sample_id, "record", f"{shard.tar_path} stores no valid JSON for it: {error!r}"
        ) from error


def verify_shards(folder: str | Path) -> None:
    """Compare every file of a dataset folder with its digest (reads everything once).

    Raises:
        DataError: names the first file that differs.
    """
    manifest = read_manifest(folder)
    for info in manifest.shards:
        for suffix, digest in ((".tar", info.tar_sha256), (".idx.npy", info.idx_sha256)):
            path = manifest.folder / f"{info.name}{suffix}"
            if not path.is_file() or sha256_of(path) != digest:
                raise DataError(f"{path} is not the file that was written; {_AGAIN}")
    for lengths in manifest.lengths:
        path = manifest.folder / lengths.file
        if not path.is_file() or sha256_of(path) != lengths.sha256:
            raise DataError(f"{path} is not the file that was written; run tools/index_lengths.py")


def _distinct_names(folders: list[Path]) -> list[str]:
    """Shortest endings of the paths, in whole folders, that tell the datasets apart."""
    parts = [folder.resolve().parts[1:] for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise DataError(f"data_path names a folder twice: {', '.join(map(str, folders))}")


class _Shard:
    """One tar and its index, by name."""

    def __init__(self, folder: Path, number: int, info: ShardInfo, id_prefix: str) -> None:
        self.number = number
        self.num_samples = info.num_samples
        self.tar_path = folder / f"{info.name}.tar"
        self.index_path = folder / f"{info.name}.idx.npy"
        self.id_prefix = id_prefix
        self._info: ShardInfo | None = info

    def check(self) -> None:
        """Compare index and tar with the manifest, once."""
        info = self._info
        if info is None:
            return
        try:
            stored = self.index_path.read_bytes()
            tar_bytes = self.tar_path.stat().st_size
        except OSError as error:
            raise DataError(f"shard file missing: {error}; {_AGAIN}") from error
        if hashlib.sha256(stored).hexdigest() != info.idx_sha256:
            raise DataError(f"{self.index_path} is not the index that was written; {_AGAIN}")
        places = np.load(io.BytesIO(stored), allow_pickle=False)[:, 1:]
        end = int(places.sum(axis=1).max(initial=0))
        if tar_bytes != info.tar_bytes or end > tar_bytes:
            raise DataError(
                f"{self.tar_path} has {tar_bytes} bytes, its manifest says {info.tar_bytes} and "
                f"its index reaches to {end}; {_AGAIN}"
            )
        self._info = None


class _Index:
    """A shard's index, mapped into memory: int64 rows (sample, offset, length)."""

    def __init__(self, path: Path) -> None:
        self._rows = map_array(path)

    def members(self, row: int) -> list[tuple[int, int]]:
        """(offset, length) of a sample's JSON, which comes first, and its images."""
        first, last = (
            bisect.bisect_left(range(len(self._rows)), r, key=lambda i: self._rows[i, 0])
            for r in (row, row + 1)
        )
        members = [(int(offset), int(length)) for _, offset, length in self._rows[first:last]]
        let_go(self._rows)
        return members


class _File:
    """An open file; closes when the last user lets go of it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, length: int, sample_id: str) -> bytes:
        """Exactly `length` bytes at `offset`; pread, so threads do not disturb each other."""
        pieces, missing = [], length
        while missing:
            piece = os.pread(self._descriptor, missing, offset + length - missing)
            if not piece:
                raise DataError(f"{self._path} ends inside sample {sample_id}; {_AGAIN}")
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


_Opened = TypeVar("_Opened", "_File", "_Index")


class _Recent(Generic[_Opened]):
    """The most recently used files, open. An evicted one stays open for those still reading."""

    def __init__(self, opener: Callable[[Path], _Opened], max_open: int) -> None:
        self._opener = opener
        self._max_open = max_open
        self._files: OrderedDict[Path, _Opened] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, path: Path) -> _Opened:
        with self._lock:
            if path not in self._files:
                self._files[path] = self._opener(path)
                if len(self._files) > self._max_open:
                    self._files.popitem(last=False)
            self._files.move_to_end(path)
            return self._files[path]
