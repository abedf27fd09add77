"""Reading dataset folders: any sample by its number, from any thread.

    number --manifest.json--> shard, row --idx.npy--> offsets --read--> text and image bytes

Folders are local paths or s3:// prefixes (storage.py). Files are opened by the manifest's own
names; keys and names inside a tar are never used as paths.
What was written how is told in shard_writer.py.
"""

import bisect
import hashlib
import io
import itertools
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from megatron_croc.data.bad_samples import BadSampleError
from megatron_croc.data.records import conversation_of, parse_text
from megatron_croc.data.shard_writer import (
    FORMAT_NAME,
    FORMAT_VERSION,
    MANIFEST,
    LengthsInfo,
    ShardInfo,
    let_go,
    map_array,
    sample_key,
    shard_name,
)
from megatron_croc.data.storage import (
    Storage,
    is_remote,
    join_location,
    open_storage,
    read_whole,
    retry,
)
from megatron_croc.data.storage_cache import StorageCache
from megatron_croc.errors import DataError, first_line

MAX_OPEN_FILES = 64
"""Tars held open at once by one dataset."""

_PIECE_BYTES = 8 << 20
"""Read at once when a whole file is read."""

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

    folder: str
    """Path or s3:// prefix."""

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
    path = join_location(folder, MANIFEST)
    try:
        content = json.loads(read_whole(path))
    except FileNotFoundError as error:
        there = is_remote(folder) or Path(folder).is_dir()
        state = "holds no finished dataset (no manifest.json)" if there else "is missing"
        raise DataError(
            f"data_path {folder} {state}: finish it with tools/preprocess_data.py, which goes on "
            "where it stopped"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not readable: {first_line(error)}; {_AGAIN}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT_NAME:
        raise DataError(f"{path} is no manifest of {FORMAT_NAME}; {_AGAIN}")
    if content.get("version") != FORMAT_VERSION:
        raise DataError(
            f"{path} has version {content.get('version')}, this code reads {FORMAT_VERSION}; "
            f"{_AGAIN}"
        )
    try:
        shards = tuple(
            ShardInfo(**{field.name: shard[field.name] for field in fields(ShardInfo)})
            for shard in content["shards"]
        )
        manifest = Manifest(
            folder=str(folder),
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

    def __init__(
        self, data_path: Sequence[str | Path] | str | Path, *, cache: StorageCache | None = None
    ) -> None:
        """Open the folders; checks every index and the size of every tar.

        Args:
            data_path: local folders or s3:// prefixes.
            cache: where copies of remote tars are kept; None: they are read range by range.

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
        self._files = _FileCache(MAX_OPEN_FILES, cache)

    def __len__(self) -> int:
        """Samples in all folders."""
        return self._starts[-1]

    def index_of(self, sample_id: str) -> int:
        """Number of the sample of this name, as in a log or a report of bad samples.

        Raises:
            DataError: no such sample.
        """
        for shard, start in zip(self._shards, self._starts, strict=False):
            key = sample_id.removeprefix(shard.id_prefix)
            prefix = sample_key(shard.number, 0)[:-6]
            if key != sample_id and key.startswith(prefix):
                row = key.removeprefix(prefix)
                if row.isdigit() and int(row) < shard.num_samples:
                    return start + int(row)
        raise DataError(
            f"sample {sample_id} is not in data_path; names are <dataset>/<shard>-<row>"
        )

    def read(self, index: int) -> RawSample:
        """Read one sample.

        Raises:
            BadSampleError: its stored text does not parse, or holds no conversation or caption.
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
        sample_id = shard.id_prefix + sample_key(shard.number, row)
        file = self._files.open(shard.tar, shard.info)
        try:
            text, *images = (file.read(offset, length) for offset, length in shard.members(row))
        except DataError as error:
            raise DataError(f"sample {sample_id}: {error}") from error
        try:
            record = parse_text(text, shard.info.text_format)
        except ValueError as error:
            raise BadSampleError(
                sample_id, "record", f"{shard.tar} stores no valid text for it: {error}"
            ) from error
        conversations = conversation_of(record, len(images), sample_id)
        return RawSample(sample_id=sample_id, conversations=conversations, image_bytes=images)


def verify_shards(folder: str | Path) -> None:
    """Compare every file of a dataset folder with its digest (reads everything once).

    Raises:
        DataError: names the first file that differs.
    """
    manifest = read_manifest(folder)
    for info in manifest.shards:
        index = join_location(folder, f"{info.name}.idx.npy")
        for path, digest in (
            (join_location(folder, info.tar), info.tar_sha256),
            (index, info.idx_sha256),
        ):
            try:
                found = _sha256_of(open_storage(path))
            except FileNotFoundError:
                found = None
            if found != digest:
                raise DataError(f"{path} is not the file that was written; {_AGAIN}")
    for lengths in manifest.lengths:
        path = manifest.folder / lengths.file
        if not path.is_file() or sha256_of(path) != lengths.sha256:
            raise DataError(f"{path} is not the file that was written; run tools/index_lengths.py")


def _sha256_of(storage: Storage) -> str:
    digest, size = hashlib.sha256(), storage.size()
    for offset in range(0, size, _PIECE_BYTES):
        length = min(_PIECE_BYTES, size - offset)
        digest.update(retry(lambda o=offset, n=length: storage.read(o, n), storage.location))
    return digest.hexdigest()


def _distinct_names(folders: list[str]) -> list[str]:
    """Shortest endings of the paths, in whole folders, that tell the datasets apart."""
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
    """One tar and its index, by name."""

    def __init__(self, folder: str, number: int, info: ShardInfo, id_prefix: str) -> None:
        self.number = number
        self.info = info
        self.num_samples = info.num_samples
        self.tar = join_location(folder, info.tar)
        self.id_prefix = id_prefix
        index_path = join_location(folder, f"{info.name}.idx.npy")
        try:
            stored = read_whole(index_path)
            tar_bytes = retry(lambda: open_storage(self.tar).size(), self.tar)
        except OSError as error:
            raise DataError(f"shard file missing: {first_line(error)}; {_AGAIN}") from error
        if hashlib.sha256(stored).hexdigest() != info.idx_sha256:
            raise DataError(f"{index_path} is not the index that was written; {_AGAIN}")
        rows = _read_index(stored, index_path)
        # Members of sample r are the rows _first[r] .. _first[r + 1] - 1; its text comes first.
        self._first = np.searchsorted(rows[:, 0], np.arange(info.num_samples + 1))
        self._places = rows[:, 1:]
        end = int(self._places.sum(axis=1).max(initial=0))
        if tar_bytes != info.tar_bytes or end > tar_bytes:
            raise DataError(
                f"{self.tar} has {tar_bytes} bytes, its manifest says {info.tar_bytes} and "
                f"its index reaches to {end}; {_AGAIN}"
            )
        if (rows < 0).any() or (np.diff(self._first) < 1).any() or self._first[-1] != len(rows):
            raise DataError(f"{index_path} does not fit the samples of {self.tar}; {_AGAIN}")

    def members(self, row: int) -> list[tuple[int, int]]:
        """(offset, length) of a sample's text and images."""
        return [(int(o), int(n)) for o, n in self._places[self._first[row] : self._first[row + 1]]]


def _read_index(stored: bytes, path: str) -> np.ndarray:
    """int64 [members, 3]."""
    try:
        rows = np.load(io.BytesIO(stored), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path} is no index: {first_line(error)}; {_AGAIN}") from error
    if rows.ndim != 2 or rows.shape[1] != 3 or rows.dtype != np.int64:
        raise DataError(f"{path} is no index: {rows.dtype} {rows.shape}; {_AGAIN}")
    return rows


_Opened = TypeVar("_Opened", "_File", "_Index")

    def __init__(self, max_open: int, copies: StorageCache | None) -> None:
        self._max_open = max_open
        self._copies = copies
        self._files: OrderedDict[str, Storage] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, location: str, info: ShardInfo) -> Storage:
        with self._lock:
            if (file := self._files.get(location)) is not None:
                self._files.move_to_end(location)
                return file
        # Outside the lock: opening may download the file, and other shards need not wait.
        file = open_storage(location)
        if self._copies is not None and is_remote(location):
            file = self._copies.open(file, digest=info.tar_sha256, size=info.tar_bytes)
        with self._lock:
            file = self._files.setdefault(location, file)
            self._files.move_to_end(location)
            if len(self._files) > self._max_open:
                self._files.popitem(last=False)
            return file
