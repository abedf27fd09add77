"""Manifest of a checkpoint: manifest.json, with size and digests of every file.

It is written last, so a folder without it was never finished. Digests are SHA-256 of pieces of a
file, so ranks and threads can share the work even if one file holds most of a checkpoint.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_croc.atomic_files import sync_directory, write_atomically
from megatron_croc.errors import CheckpointError

MANIFEST_FILE = "manifest.json"

INDEX_FILE = ".metadata"
"""Index of the tensors: name, shape and file of each."""

TENSOR_FILES = ".distcp"
"""Suffix of the files that hold tensors, one or more of each rank that has any."""

PIECE_BYTES = 64 * 2**20
"""Bytes per digest; part of the format."""

THREADS = 4
"""Pieces that one process hashes at the same time; hashlib releases the GIL."""


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """Size and digests of one file."""

    num_bytes: int
    sha256: list[str]
    """Hex digest of each piece, in order; empty for an empty file."""


def digest_file(path: Path) -> FileDigest:
    """Compute the digests of a file, reading it once."""
    num_bytes = path.stat().st_size
    starts = range(0, num_bytes, PIECE_BYTES)
    with ThreadPoolExecutor(THREADS) as pool:
        pieces = list(pool.map(lambda start: _digest_piece(path, start), starts))
    return FileDigest(num_bytes=num_bytes, sha256=pieces)


def write_manifest(folder: Path, digests: dict[str, FileDigest] | None = None) -> None:
    """Write the manifest of all files in a folder, and flush the folder to disk.

    Args:
        folder: holds all other files already.
        digests: digests by file name of the files that the ranks have written; others are read now.

    Raises:
        CheckpointError: a file that a rank has written is not there.
    """
    known = digests or {}
    if lost := sorted(name for name in known if not (folder / name).is_file()):
        raise CheckpointError(f"{lost[0]} was written, but is not there any more")
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST_FILE)
    files = {name: known.get(name) or digest_file(folder / name) for name in names}
    entries = {n: {"bytes": d.num_bytes, "sha256": d.sha256} for n, d in files.items()}
    content = json.dumps({"piece_bytes": PIECE_BYTES, "files": entries}, indent=1) + "\n"
    write_atomically(folder / MANIFEST_FILE, content.encode())
    sync_directory(folder)


def is_finished(folder: Path) -> bool:
    """Return True if a folder has a manifest; the files are not checked."""
    return (folder / MANIFEST_FILE).is_file()


def read_manifest(folder: Path) -> dict[str, FileDigest]:
    """Read the manifest: file name -> size and digests.

    Raises:
        CheckpointError: the manifest is missing (the checkpoint was never finished) or damaged.
    """
    path = folder / MANIFEST_FILE
    try:
        content = json.loads(path.read_bytes())
        if content["piece_bytes"] != PIECE_BYTES:
            raise ValueError(f"piece_bytes is {content['piece_bytes']}, not {PIECE_BYTES}")
        files = {
            name: FileDigest(num_bytes=int(entry["bytes"]), sha256=list(entry["sha256"]))
            for name, entry in content["files"].items()
        }
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: the checkpoint was never finished") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from error
    if outside := [name for name in files if Path(name).name != name]:
        raise CheckpointError(f"{path} names {outside[0]!r}, which is not in its folder")
    return files


def find_damage(folder: Path, *, share: int = 0, shares: int = 1) -> list[str]:
    """Compare files with the manifest.

    Args:
        folder: a checkpoint.
        share: share of the pieces to read, 0..shares-1.
        shares: number of shares.

    Returns:
        one line per damaged piece; empty for an undamaged checkpoint.
    """
    if not folder.is_dir():
        return ["there is no such folder"]
    try:
        files = read_manifest(folder)
    except CheckpointError as error:
        return [str(error).removeprefix(f"{folder}/")]
    if lacking := _lacks(files):
        return [lacking]
    pieces = [
        (name, start)
        for name, digest in sorted(files.items())
        for start in range(0, max(digest.num_bytes, 1), PIECE_BYTES)
    ]
    with ThreadPoolExecutor(THREADS) as pool:
        checked = pool.map(
            lambda p: _check_piece(folder / p[0], files[p[0]], p[1]), pieces[share::shares]
        )
        return sorted({line for line in checked if line is not None})


def _lacks(files: dict[str, FileDigest]) -> str | None:
    """Say which file no checkpoint can do without; None if the manifest names them all."""
    if not any(name.endswith(TENSOR_FILES) for name in files):
        return f"{MANIFEST_FILE} names no file of tensors (*{TENSOR_FILES})"
    return None if INDEX_FILE in files else f"{MANIFEST_FILE} names no index of tensors"


def _check_piece(path: Path, written: FileDigest, start: int) -> str | None:
    try:
        num_bytes = path.stat().st_size
        if num_bytes != written.num_bytes:
            return f"{path.name} has {num_bytes} bytes, {written.num_bytes} were written"
        number = start // PIECE_BYTES
        if written.sha256[number : number + 1] != (
            [_digest_piece(path, start)] if num_bytes else []
        ):
            end = min(start + PIECE_BYTES, num_bytes)
            return f"{path.name} is not what was written (in bytes {start}..{end})"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return None


def _digest_piece(path: Path, start: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        left = PIECE_BYTES
        while left and (block := file.read(min(left, 2**20))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()
