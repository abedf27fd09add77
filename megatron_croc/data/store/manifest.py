"""Manifest of a dataset folder: read it, and verify the files against its digests."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from megatron_croc.data.store.shard_writer import (
    FORMAT_NAME,
    FORMAT_VERSION,
    MANIFEST,
    LengthsInfo,
    ShardInfo,
    shard_name,
)
from megatron_croc.data.store.storage import (
    is_remote,
    join_location,
    open_storage,
    read_whole,
    retry,
)
from megatron_croc.errors import DataError, first_line
from megatron_croc.file_reading import UnreadableError, build, parse_json

AGAIN = "run croc data preprocess for it again"
"""Remedy of most faults of a dataset folder, for messages."""

_PIECE_BYTES = 8 << 20
"""Bytes of one read when a whole file is read."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Content of a dataset folder."""

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
        DataError: no such folder, no manifest (writing was not finished), or another format.
    """
    path = join_location(folder, MANIFEST)
    try:
        content = parse_json(read_whole(path))
    except FileNotFoundError as error:
        there = is_remote(folder) or Path(folder).is_dir()
        state = "holds no finished dataset (no manifest.json)" if there else "is missing"
        raise DataError(
            f"data_path {folder} {state}: finish it with croc data preprocess, which goes on "
            "where it stopped"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not readable: {first_line(error)}; {AGAIN}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT_NAME:
        raise DataError(f"{path} is no manifest of {FORMAT_NAME}; {AGAIN}")
    if content.get("version") != FORMAT_VERSION:
        raise DataError(
            f"{path} has version {content.get('version')}, this code reads {FORMAT_VERSION}; "
            f"{AGAIN}"
        )
    try:
        shards = tuple(
            build(ShardInfo, {field.name: shard[field.name] for field in fields(ShardInfo)})
            for shard in content["shards"]
        )
        counts = {name: content[name] for name in ("num_samples", "num_images", "num_text_only")}
        lengths = content.get("lengths", [])
        manifest = build(
            Manifest, {"folder": str(folder), **counts, "shards": [], "lengths": lengths}
        )
        manifest = replace(manifest, shards=shards)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} lacks or misuses the key {error}; {AGAIN}") from error
    except UnreadableError as error:
        raise DataError(f"{path}: {error}; {AGAIN}") from error
    for entry in manifest.lengths:
        if Path(entry.file).name != entry.file:
            raise DataError(f"{path} names {entry.file!r:.80}, which is not in its folder; {AGAIN}")
    named = all(shard.name == shard_name(i) for i, shard in enumerate(shards))
    if not named or manifest.num_samples != sum(shard.num_samples for shard in shards):
        raise DataError(f"{path} contradicts itself (shard names or counts); {AGAIN}")
    return manifest


def count_samples(data_path: Sequence[str | Path]) -> int:
    """Count the samples of all folders, from their manifests alone."""
    return sum(read_manifest(folder).num_samples for folder in data_path)


def content_digest(manifests: Sequence[Manifest]) -> str:
    """Compute a digest, 16 hex digits, of the samples of some folders and their order.

    It is made of the digests of tars and indices in the manifests; no shard is read. Moved and
    renamed folders keep it.
    """
    digest = hashlib.sha256()
    for manifest in manifests:
        for shard in manifest.shards:
            digest.update(f"{shard.tar_sha256} {shard.idx_sha256}\n".encode())
    return digest.hexdigest()[:16]


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
            if _sha256_at(path) != digest:
                raise DataError(f"{path} is not the file that was written; {AGAIN}")
    for lengths in manifest.lengths:
        path = join_location(folder, lengths.file)
        if _sha256_at(path) != lengths.sha256:
            raise DataError(f"{path} is not the file that was written; run croc data lengths")


def _sha256_at(location: str) -> str | None:
    """Compute the hex digest of a file; None if it does not exist."""
    try:
        storage = open_storage(location)
        size = storage.size()
    except FileNotFoundError:
        return None
    digest = hashlib.sha256()
    for offset in range(0, size, _PIECE_BYTES):
        length = min(_PIECE_BYTES, size - offset)
        digest.update(retry(lambda o=offset, n=length: storage.read(o, n), location))
    return digest.hexdigest()
