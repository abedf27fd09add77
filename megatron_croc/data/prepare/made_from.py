"""Record of everything that a folder's shards were made from; decides what a rerun may keep.

    made_from/job.made                 input, options, image folder, version of the rules
             /shard-000000.made        result of a shard, digest of its records
             /shard-000000.files.gz    path -> [size, mtime] of each file it looked for

A rerun of the same command compares: input and options with job.made, each file by size and time
of its last change. A shard is made again if something of its own differs: also if an image that
was missing is there now, so that no skipped record outlives its cause.
"""

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_croc.atomic_files import write_atomically
from megatron_croc.data.prepare.inputs import InputRecord
from megatron_croc.data.store.shard_writer import shard_name
from megatron_croc.errors import DataError
from megatron_croc.file_reading import parse_json

FOLDER = "made_from"
_JOB = "job.made"
"""The files end in .made: in a folder given as an input, .json would be taken for records."""

STAT_THREADS = 16
"""Threads that look up files; a network file system answers many at a time."""

FileState = list[int] | None
"""[bytes, nanoseconds of the last change] of a file; None: it is not there."""


class SourceFiles:
    """Reader of the files of one shard that notes the state of each."""

    def __init__(self) -> None:
        """Start with no file."""
        self.states: dict[str, FileState] = {}

    def read(self, path: Path) -> bytes:
        """Read a file, and note its state before. Raises OSError and ValueError as open does."""
        self.note(path)
        with open(path, "rb") as file:
            return file.read()

    def note(self, path: Path) -> None:
        """Note the state of a file, also of one that is not there."""
        name = os.path.join(os.getcwd(), path)
        self.states[name] = _state_of(name)


def _state_of(path: str | Path) -> FileState:
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None
    return [found.st_size, found.st_mtime_ns]


@dataclass(frozen=True, kw_only=True)
class MadeFrom:
    """Settings of a job that its shards depend on."""

    identity: dict[str, Any]
    """Digest of the input, and settings that only another output folder can change; they stand in
    the manifest too."""

    digest_key: str
    """Key of `identity` that holds the digest of the input."""

    inputs: list[str]
    """Absolute paths of the input, as given. Another content of the same paths is an input that
    has changed; other paths are another input."""

    rules: int
    """Version of the rules by which records are read."""

    options: dict[str, Any]
    """Options that change all shards."""

    image_folder: str | None = None
    """Absolute path; it changes the shards that looked for files."""


def absolute(paths: Iterable[str | Path]) -> list[str]:
    """Return the paths as absolute ones; s3:// locations stay as they are."""
    return [p if "://" in p else os.path.abspath(p) for p in map(str, paths)]


def digest_records(records: Iterable[InputRecord]) -> str:
    """Compute a digest of records as an input reads them."""
    digest = hashlib.sha256()
    for found in records:
        update_digest(digest, found)
    return digest.hexdigest()


def update_digest(digest: Any, found: InputRecord) -> None:
    """Add one record to a digest of hashlib."""
    digest.update(_ENCODER.encode([getattr(found, name) for name in _RECORD_FIELDS]).encode())


def _as_json(value: object) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)


_ENCODER = json.JSONEncoder(default=_as_json)
_RECORD_FIELDS = [field.name for field in fields(InputRecord)]


class Ledger:
    """The files under made_from of one dataset folder."""

    def __init__(self, output: Path) -> None:
        """Args: output: dataset folder."""
        self._output = output
        self.folder = output / FOLDER

    def read_job(self) -> dict[str, Any] | None:
        """Read the settings of the job that made the shards; None: there was none.

        Raises:
            DataError: the file is damaged.
        """
        path = self.folder / _JOB
        try:
            job = parse_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            job = None
        if not isinstance(job, dict) or not isinstance(job.get("identity"), dict):
            raise DataError(f"{path} is damaged: remove the folder and begin again")
        return job

    def write_job(self, made_from: MadeFrom) -> None:
        """Write the settings of a job."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / _JOB, json.dumps(asdict(made_from)).encode())

    def read_result(self, shard: int) -> dict[str, Any] | None:
        """Read the stored result of a shard; None if it is not finished."""
        try:
            result = parse_json(self._result_path(shard).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return result if isinstance(result, dict) else None

    def write_result(self, shard: int, result: dict[str, Any], files: dict[str, Any]) -> None:
        """Write a shard's result, which marks it as finished, and the files it looked for."""
        text = json.dumps(files, sort_keys=True).encode()
        write_atomically(self._files_path(shard), gzip.compress(text, 6, mtime=0))
        write_atomically(self._result_path(shard), json.dumps(result).encode())

    def drop(self, shard: int) -> None:
        """Forget the result of a shard: it will be made again."""
        self._result_path(shard).unlink(missing_ok=True)
        self._files_path(shard).unlink(missing_ok=True)

    def finished(self) -> list[int]:
        """Return the numbers of the shards with a result, ascending."""
        names = sorted(self.folder.glob("shard-*.made"))
        return [int(path.stem.removeprefix("shard-")) for path in names]

    def read_files(self, shard: int) -> dict[str, FileState]:
        """Read the states of the files that a shard looked for."""
        try:
            states = parse_json(gzip.decompress(self._files_path(shard).read_bytes()))
        except (OSError, EOFError, ValueError, zlib.error):
            states = None
        # Lost: no file has this state, so the shard is made again.
        return states if isinstance(states, dict) else {"": [0, 0]}

    def _result_path(self, shard: int) -> Path:
        return self.folder / f"{shard_name(shard)}.made"

    def _files_path(self, shard: int) -> Path:
        return self.folder / f"{shard_name(shard)}.files.gz"


def find_stale(
    ledger: Ledger,
    before: dict[str, Any],
    now: MadeFrom,
    records_of: Callable[[int], str],
    num_shards: int,
) -> dict[int, str]:
    """Find the finished shards that must be made again.

    Args:
        ledger: results of earlier jobs.
        before: settings of the job that made them.
        now: settings of this job.
        records_of: shard -> digest of its records now; called only if the input has changed.
        num_shards: number of shards now.

    Returns:
        Shard -> what has changed; also the shards that are too many now.
    """
    shards = ledger.finished()
    if before.get("rules") != now.rules:
        change = f"version {before.get('rules')} of the rules made them, this is {now.rules}"
        return dict.fromkeys(shards, change)
    if before.get("options") != json.loads(json.dumps(now.options)):  # as stored: tuples are lists
        change = f"the options were {before.get('options')}, now {now.options}"
        return dict.fromkeys(shards, change)
    is_changed = before["identity"].get(now.digest_key) != now.identity[now.digest_key]

    def change_of(shard: int) -> str | None:
        if shard >= num_shards:
            return "the input has fewer records"
        result = ledger.read_result(shard) or {}
        if is_changed and result.get("records_sha256") != records_of(shard):
            return f"records of the input have changed ({', '.join(now.inputs)[:200]})"
        states = ledger.read_files(shard)
        if states and before.get("image_folder") != now.image_folder:
            return f"the image folder was {before.get('image_folder')}, now {now.image_folder}"
        for path, was in states.items():
            if (is_now := _state_of(path)) != was:
                gone = "is gone" if is_now is None else "has changed"
                return f"{path} {'is there now' if was is None else gone}"
        return None

    with ThreadPoolExecutor(STAT_THREADS) as pool:
        changes = list(pool.map(change_of, shards))
    return {s: change for s, change in zip(shards, changes, strict=True) if change is not None}
