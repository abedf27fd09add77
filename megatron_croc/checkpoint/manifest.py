"""The final marker of a checkpoint: manifest.json, with size and digests of every file in it.

A folder without it was never finished. Digests are SHA-256 of pieces of a file, so that ranks and
threads share the work even when one file holds most of a checkpoint.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_croc.atomic_files import sync_directory, write_atomically
from megatron_croc.errors import CheckpointError

MANIFEST_FILE = "manifest.json"

PIECE_BYTES = 64 * 2**20
"""Bytes per digest; part of the format."""

THREADS = 4
"""Pieces hashed at a time by one process; hashlib lets go of the interpreter's lock."""


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """What one file holds."""

    num_bytes: int
    sha256: list[str]
    """One per piece, in order; none for an empty file."""


def digest_file(path: Path) -> FileDigest:
    """Read a file once, a few pieces at a time."""
    num_bytes = path.stat().st_size
    starts = range(0, num_bytes, PIECE_BYTES)
    with ThreadPoolExecutor(THREADS) as pool:
        pieces = list(pool.map(lambda start: _digest_piece(path, start), starts))
    return FileDigest(num_bytes=num_bytes, sha256=pieces)


def write_manifest(folder: Path, digests: dict[str, FileDigest] | None = None) -> None:
    """Finish a checkpoint: name every file in it, and put all of it on the disk.

    Args:
        folder: holds every file already.
        digests: of files that were read back before; the others are read now.
    """
    known = digests or {}
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST_FILE)
    files = {name: known.get(name) or digest_file(folder / name) for name in names}
    rows = {n: {"bytes": d.num_bytes, "sha256": d.sha256} for n, d in files.items()}
    content = json.dumps({"piece_bytes": PIECE_BYTES, "files": rows}, indent=1) + "\n"
    write_atomically(folder / MANIFEST_FILE, content.encode())
    sync_directory(folder)


def is_finished(folder: Path) -> bool:
    """Whether a folder has the final marker; says nothing about later damage."""
    return (folder / MANIFEST_FILE).is_file()


def read_manifest(folder: Path) -> dict[str, FileDigest]:
    """Files of a checkpoint by name.

    Raises:
        CheckpointError: no manifest (the checkpoint was never finished), or an unreadable one.
    """
    path = folder / MANIFEST_FILE
    try:
        content = json.loads(path.read_bytes())
        if content["piece_bytes"] != PIECE_BYTES:
            raise ValueError(f"piece_bytes is {content['piece_bytes']}, not {PIECE_BYTES}")
        files = {
            name: FileDigest(num_bytes=int(row["bytes"]), sha256=list(row["sha256"]))
            for name, row in content["files"].items()
        }
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: the checkpoint was never finished") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from error
    if outside := [name for name in files if Path(name).name != name]:
        raise CheckpointError(f"{path} names {outside[0]!r}, which is not in its folder")
    return files


def find_damage(folder: Path, *, share: int = 0, shares: int = 1) -> list[str]:
    """Compare files with the manifest; a line per damaged piece, empty when all is well.

    Args:
        folder: a checkpoint.
        share: which share of the pieces to read, 0..shares-1.
        shares: into how many the pieces are dealt.
    """
    if not folder.is_dir():
        return ["there is no such folder"]
    try:
        files = read_manifest(folder)
    except CheckpointError as error:
        return [str(error).removeprefix(f"{folder}/")]
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
