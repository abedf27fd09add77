"""Writing a dataset folder: plain WebDataset tars, an index beside each, a manifest last.

    samples --ShardWriter--> shard-000000.tar       000000-000000.json, 000000-000000.0.jpg, ...
                             shard-000000.idx.npy   int64 rows (sample, offset, length), per member
    all shards ------------> manifest.json          counts, sizes, sha256 digests
    (lengths.py adds         lengths-*.npy          int32 [samples, 2]: text tokens, images)

A file appears under its name only when it is complete, and the manifest only when all shards are.
Equal samples give equal bytes: members carry no time, owner or path of the machine.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_croc.atomic_files import write_atomically

TextFormat = Literal["json", "txt"]

MANIFEST = "manifest.json"
FORMAT_NAME = "megatron_croc shards"
FORMAT_VERSION = 2

TAR_HEADER_BYTES = 512
"""A member's data starts this far behind its header (names here are short, so one block)."""


def shard_name(shard: int) -> str:
    """File name of a shard, without suffix."""
    return f"shard-{shard:06d}"


def sample_key(shard: int, row: int) -> str:
    """WebDataset key of a sample: a function of its place, so it is never read from a file."""
    return f"{shard:06d}-{row:06d}"


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One shard's entry in the manifest."""

    name: str
    """Of the index (name.idx.npy) and, where the shard was written here, of the tar."""

    tar: str
    """Where the tar lies: relative to the folder, or a location of its own (indexed in place)."""

    text_format: TextFormat
    """What the first member of a sample holds."""

    num_samples: int
    num_images: int
    num_text_only: int
    tar_bytes: int
    tar_sha256: str
    idx_bytes: int
    idx_sha256: str


@dataclass(frozen=True, kw_only=True)
class LengthsInfo:
    """One table of sample lengths in the manifest: by which tokenizer and template it was made."""

    file: str
    sha256: str
    tokenizer_sha256: str
    tokenizer_model: str
    conversation_template: str


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


class ShardWriter:
    """Writes one shard. Use as a context manager: leaving it without error finishes the shard."""

    def __init__(self, folder: Path, shard: int) -> None:
        """Args: folder: an existing dataset folder. shard: number of the shard."""
        self._folder = folder
        self._shard = shard
        self._tar_path = folder / f"{shard_name(shard)}.tar"
        self._temporary = folder / f".{shard_name(shard)}.tar.tmp"
        # Closed by __exit__.
        self._tar = tarfile.open(self._temporary, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._rows: list[tuple[int, int, int]] = []
        self._num_samples = 0
        self._num_text_only = 0
        self.info: ShardInfo | None = None

    def add(self, record: dict, images: Sequence[tuple[str, bytes]]) -> None:
        """Add a sample.

        Args:
            record: what the sample's JSON holds; its "conversations" are read back by training.
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
        member = tarfile.TarInfo(name)  # mtime, uid, gid are 0 and mode 0644 by default
        member.size = len(data)
        offset = self._tar.offset + TAR_HEADER_BYTES
        self._tar.addfile(member, io.BytesIO(data))
        self._rows.append((self._num_samples, offset, len(data)))

    def __enter__(self) -> "ShardWriter":
        """The writer itself."""
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        """Finish the shard, or leave nothing under its name when there was an error."""
        self._tar.close()
        if error_type is not None:
            self._temporary.unlink()
            return
        with open(self._temporary, "rb") as file:
            os.fsync(file.fileno())
        index_path = write_index(self._folder, self._shard, self._rows)
        self._temporary.replace(self._tar_path)
        self.info = ShardInfo(
            name=shard_name(self._shard),
            tar=self._tar_path.name,
            text_format="json",
            num_samples=self._num_samples,
            num_images=len(self._rows) - self._num_samples,
            num_text_only=self._num_text_only,
            tar_bytes=self._tar_path.stat().st_size,
            tar_sha256=sha256_of(self._tar_path),
            idx_bytes=index_path.stat().st_size,
            idx_sha256=sha256_of(index_path),
        )


def write_index(folder: Path, shard: int, rows: Sequence[tuple[int, int, int]]) -> Path:
    """Write a shard's index from its (sample, offset, length) rows; returns its path."""
    buffer = io.BytesIO()
    np.save(buffer, np.array(rows, dtype=np.int64).reshape(-1, 3))
    path = folder / f"{shard_name(shard)}.idx.npy"
    write_atomically(path, buffer.getvalue())
    return path


def write_manifest(folder: Path, shards: Sequence[ShardInfo], **extra: object) -> None:
    """Declare a dataset folder complete.

    Args:
        folder: where the shards lie.
        shards: their entries, in order.
        extra: further keys to keep, such as the digest of the input.
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


def add_lengths(folder: Path, info: LengthsInfo) -> None:
    """Enter a table of lengths into a finished dataset's manifest; one of the same name goes."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    others = [entry for entry in manifest.get("lengths", ()) if entry["file"] != info.file]
    shards = manifest.pop("shards")  # stays last: it is long
    manifest |= {"lengths": [*others, asdict(info)], "shards": shards}
    write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
