"""Write a dataset folder: WebDataset tars, an index for each, and a manifest at the end.

    samples --ShardWriter--> shard-000000.tar       000000-000000.json, 000000-000000.0.jpg, ...
                             shard-000000.idx.npy   int64 rows (sample, offset, length), per member
    all shards ------------> manifest.json          counts, sizes, sha256 digests
    (lengths.py adds         lengths-*.npy          int32 [samples, 2]: text tokens, images)

A file gets its name when it is complete, and the manifest is written when all shards are complete.
Equal samples give equal bytes: members hold no time, owner or path.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_croc.atomic_files import sync_directory, write_atomically
from megatron_croc.data.records.reading import TextFormat
from megatron_croc.errors import DataError
from megatron_croc.file_reading import parse_json

MANIFEST = "manifest.json"
FORMAT_NAME = "megatron_croc shards"
FORMAT_VERSION = 2


def shard_name(shard: int) -> str:
    """Return the file name of a shard, without suffix."""
    return f"shard-{shard:06d}"


def sample_key(shard: int, row: int) -> str:
    """Return the WebDataset key of a sample, computed from its shard and its row in the index."""
    return f"{shard:06d}-{row:06d}"


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """Entry of a shard in the manifest."""

    name: str
    """Name of the index (name.idx.npy) and, for shards written here, of the tar."""

    tar: str
    """Location of the tar: relative to the folder, or absolute if it was indexed in place."""

    text_format: TextFormat
    """Format of the first member of each sample."""

    num_samples: int
    num_images: int
    num_text_only: int
    tar_bytes: int
    tar_sha256: str
    idx_bytes: int
    idx_sha256: str


@dataclass(frozen=True, kw_only=True)
class LengthsInfo:
    """Entry of a table of sample lengths in the manifest, with its tokenizer and template."""

    file: str
    sha256: str
    tokenizer_sha256: str
    tokenizer_model: str
    conversation_template: str
    legacy: bool | None = None
    """Flag of LLaMA tokenizers that was used (sample/legacy.py); None in older manifests."""


def sha256_of(path: Path) -> str:
    """Compute the hex digest of a file."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


class ShardWriter:
    """Writes one shard. A context manager: leaving it without an error finishes the shard."""

    def __init__(self, folder: Path, shard: int) -> None:
        """Args: folder: existing dataset folder. shard: number of the shard."""
        self._folder = folder
        self._shard = shard
        self._tar_path = folder / f"{shard_name(shard)}.tar"
        self._temporary = folder / f".{shard_name(shard)}.tar.tmp"
        self._file = open(self._temporary, "wb")  # noqa: SIM115  closed by __exit__
        self._digest, self._offset = hashlib.sha256(), 0
        self._rows: list[tuple[int, int, int]] = []
        self._num_samples = 0
        self._num_text_only = 0
        self.info: ShardInfo | None = None

    def add(self, record: dict, images: Sequence[tuple[str, bytes]]) -> None:
        """Add a sample.

        Args:
            record: content of the sample's JSON; training reads its "conversations".
            images: (extension such as "jpg", encoded bytes) in the order of the <image> marks.
        """
        key = sample_key(self._shard, self._num_samples)
        text = json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        self._add_member(f"{key}.json", text.encode())
        for position, (extension, data) in enumerate(images):
            self._add_member(f"{key}.{position}.{extension}", data)
        self._num_samples += 1
        self._num_text_only += not images

    def _add_member(self, name: str, data: bytes) -> None:
        self._write(_header(name, len(data)))
        self._rows.append((self._num_samples, self._offset, len(data)))
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._offset += len(data)

    def __enter__(self) -> "ShardWriter":
        """Return the writer."""
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        """Finish the shard; after an error, remove the temporary file."""
        with self._file:
            if error_type is not None:
                self._temporary.unlink()
                return
            self._write(bytes(2 * tarfile.BLOCKSIZE))  # the end mark
            self._write(bytes(-self._offset % tarfile.RECORDSIZE))
            self._file.flush()
            os.fsync(self._file.fileno())
        index_path = write_index(self._folder, self._shard, self._rows)
        os.replace(self._temporary, self._tar_path)
        sync_directory(self._folder)
        self.info = ShardInfo(
            name=shard_name(self._shard),
            tar=self._tar_path.name,
            text_format="json",
            num_samples=self._num_samples,
            num_images=len(self._rows) - self._num_samples,
            num_text_only=self._num_text_only,
            tar_bytes=self._offset,
            tar_sha256=self._digest.hexdigest(),
            idx_bytes=index_path.stat().st_size,
            idx_sha256=sha256_of(index_path),
        )


_BLANK_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)  # of time 0 and mode 0644
_BLANK_SUM = sum(_BLANK_HEADER[:148]) + 8 * ord(" ") + sum(_BLANK_HEADER[156:])
_SIZE_DIGITS = 11


def _header(name: str, size: int) -> bytes:
    """Return a member's header as tarfile writes it, at a tenth of its cost.

    Raises:
        DataError: a member of 8 GiB or more, whose size has no place in a header.
    """
    label, digits = name.encode(), b"%011o" % size
    if len(digits) > _SIZE_DIGITS:
        raise DataError(f"member {name} has {size} bytes: a tar holds less than 8 GiB of each")
    assert len(label) <= 100, name
    checksum = b"%06o" % (_BLANK_SUM + sum(label) + sum(digits) - _SIZE_DIGITS * ord("0"))
    parts = (label, _BLANK_HEADER[len(label) : 124], digits, _BLANK_HEADER[135:148], checksum)
    return b"".join((*parts, _BLANK_HEADER[154:]))


def write_index(folder: Path, shard: int, rows: Sequence[tuple[int, int, int]]) -> Path:
    """Write a shard's index from its rows (sample, offset, length); return its path."""
    buffer = io.BytesIO()
    np.save(buffer, np.array(rows, dtype=np.int64).reshape(-1, 3))
    path = folder / f"{shard_name(shard)}.idx.npy"
    write_atomically(path, buffer.getvalue())
    return path


def write_manifest(folder: Path, shards: Sequence[ShardInfo], **extra: object) -> None:
    """Write the manifest, which marks a dataset folder as complete.

    Args:
        folder: folder of the shards.
        shards: entries of the shards, in order.
        extra: further keys, such as the digest of the input.
    """
    manifest = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "num_samples": sum(shard.num_samples for shard in shards),
        "num_images": sum(shard.num_images for shard in shards),
        "num_text_only": sum(shard.num_text_only for shard in shards),
        **extra,
        "shards": [asdict(shard) for shard in shards],
    }
    write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    sync_directory(folder.parent)  # the folder may be new


def update_manifest(folder: Path, changed: Mapping[str, object]) -> None:
    """Set keys of a manifest; the shards stay as they are."""
    manifest = parse_json((folder / MANIFEST).read_bytes())
    if all(manifest.get(key) == value for key, value in changed.items()):
        return
    manifest |= changed
    write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def lengths_files(folder: Path) -> list[str]:
    """Return the names of a folder's tables of sample lengths."""
    manifest = parse_json((folder / MANIFEST).read_bytes())
    return [entry["file"] for entry in manifest.get("lengths", ())]


def add_lengths(folder: Path, info: LengthsInfo) -> None:
    """Add a table of lengths to the manifest, in place of one with the same name."""
    manifest = parse_json((folder / MANIFEST).read_bytes())
    others = [entry for entry in manifest.get("lengths", ()) if entry["file"] != info.file]
    shards = manifest.pop("shards")  # the longest entry stays last
    manifest |= {"lengths": [*others, asdict(info)], "shards": shards}
    write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
