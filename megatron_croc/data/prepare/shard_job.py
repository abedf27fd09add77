"""Job that makes shards in parallel, each once; shared by preprocessing and indexing.

    task of shard s --worker--> shard s --> made_from/shard-s.made   (it is finished)
    all finished --> report.json, skipped.jsonl, manifest.json

A shard depends on its own task only: any number of workers gives equal bytes, and a second run
makes only the shards that are missing or no longer right (made_from.py). Another input is refused.
"""

import json
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_croc.atomic_files import write_atomically
from megatron_croc.data.prepare.made_from import FileState, Ledger, MadeFrom, find_stale
from megatron_croc.data.store.shard_writer import (
    MANIFEST,
    ShardInfo,
    lengths_files,
    shard_name,
    update_manifest,
    write_manifest,
)
from megatron_croc.data.store.storage import is_remote, join_location
from megatron_croc.errors import DataError, one_line
from megatron_croc.file_reading import parse_json

REPORT = "report.json"
SKIPPED = "skipped.jsonl"
MAX_LISTED = 20
"""Number of skipped records of each kind in the report; skipped.jsonl has all."""


Notes = dict[str, list]
"""Text of what was not read or had to be decided -> [number of records, first example]."""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """One skipped record."""

    record: int
    """Number of the record in the input, from 0."""

    source: str
    """File of the record."""

    kind: str
    """Key of its count."""

    reason: str
    """Fault of the record."""


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """Result of one shard's task."""

    info: ShardInfo
    num_records: int
    skipped: list[Skipped]
    notes: Notes

    records_sha256: str
    """Digest of the shard's records in the input."""

    files: dict[str, FileState] = field(default_factory=dict)
    """State of each file that was read or looked for beside the input."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Result of the whole job."""

    num_records: int
    num_samples: int
    num_images: int
    num_text_only: int
    num_skipped: dict[str, int]
    num_skipped_by_source: dict[str, int]
    skipped: list[Skipped]
    notes: Notes = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """Format the counts and examples of skipped records for the terminal."""
        yield (
            f"{self.num_records} records: {self.num_samples} samples ({self.num_images} images, "
            f"{self.num_text_only} samples of text only), "
            f"{sum(self.num_skipped.values())} skipped"
        )
        for kind, count in self.num_skipped.items():
            yield f"  {kind}: {count}"
            for entry in [s for s in self.skipped if s.kind == kind][:3]:
                yield f"    record {entry.record}: {entry.reason}"
        for text, (count, example) in self.notes.items():
            where = f" ({count} records)" if count else ""
            yield one_line(f"  {text}{where}{f', first: {example}' if example else ''}")


class ShardJob:
    """Job that makes one dataset folder of one input."""

    def __init__(
        self,
        output: Path,
        made_from: MadeFrom,
        num_shards: int,
        *,
        records_of: Callable[[int], str],
        owns_tars: bool,
    ) -> None:
        """Look for shards of an earlier job, and drop those that are no longer right.

        Args:
            output: dataset folder; created if missing.
            made_from: everything that the shards depend on.
            num_shards: number of shards.
            records_of: shard -> digest of its records in the input.
            owns_tars: True if the job writes the tars, False if it indexes tars of the user.

        Raises:
            DataError: the output was started with another input.
        """
        self.output = output
        self.num_shards = num_shards
        self._made_from = made_from
        self._ledger = Ledger(output)
        self._owns_tars = owns_tars
        self.is_complete = (output / MANIFEST).exists()
        self.note: str | None = None
        """One line on what is made again, and why; None: nothing is."""
        before = self._ledger.read_job()
        self._check_same_input(before)
        if before is not None:
            stale = find_stale(self._ledger, before, made_from, records_of, num_shards)
            self._drop(stale)
            if not stale and self.is_complete:
                update_manifest(output, made_from.identity)
        elif self.is_complete:
            self.note = (
                f"{output} does not say which files it was made from (an older version made it): "
                "changes of images are not noticed; remove the folder to make it anew"
            )
        if before is not None or not self.is_complete:
            self._ledger.write_job(made_from)

    def _check_same_input(self, before: dict[str, Any] | None) -> None:
        """Refuse an output of another input; a changed input is no other input."""
        begun = None if before is None else before["identity"]
        if begun is None and self.is_complete:
            path = self.output / MANIFEST
            try:
                begun = parse_json(path.read_bytes())
            except ValueError as error:
                raise DataError(f"{path} is damaged: remove the folder and begin again") from error
        same_paths = before is not None and before.get("inputs") == self._made_from.inputs
        if begun is None:
            return
        for key, value in self._made_from.identity.items():
            if begun.get(key) != value and not (same_paths and key == self._made_from.digest_key):
                raise DataError(
                    f"{self.output} was begun with another input ({key} {begun.get(key)}, now "
                    f"{value}): choose another output folder, or remove this one"
                )

    def _drop(self, stale: dict[int, str]) -> None:
        """Forget stale shards; until they are made again the folder counts as unfinished."""
        if not stale:
            return
        tables = lengths_files(self.output) if self.is_complete else []
        (self.output / MANIFEST).unlink(missing_ok=True)
        for table in tables:
            (self.output / table).unlink(missing_ok=True)
        for shard in stale:
            self._ledger.drop(shard)
            if shard >= self.num_shards:
                (self.output / f"{shard_name(shard)}.idx.npy").unlink(missing_ok=True)
                if self._owns_tars:
                    (self.output / f"{shard_name(shard)}.tar").unlink(missing_ok=True)
        self.is_complete = False
        number = len(stale)
        first = next(iter(stale.values()))
        more = "" if len(set(stale.values())) == 1 else ", the first of them"
        self.note = (
            f"{self.output}: {number} of {max(self.num_shards, *(s + 1 for s in stale))} shard(s) "
            f"made earlier are dropped and made again: {first}{more}"
        )
        if tables:
            self.note += "; its sample lengths must be measured again (croc data lengths)"

    def unfinished_shards(self) -> list[int]:
        """Return the numbers of the unfinished shards."""
        if self.is_complete:
            return []
        return [shard for shard in range(self.num_shards) if self._result(shard) is None]

    def _result(self, shard: int) -> ShardResult | None:
        """Read the stored result of a shard; None if it is unfinished."""
        done = self._ledger.read_result(shard)
        if done is None:
            return None
        try:
            result = ShardResult(
                info=ShardInfo(**done["info"]),
                num_records=done["num_records"],
                skipped=[Skipped(**entry) for entry in done["skipped"]],
                notes=done.get("notes", {}),
                records_sha256=done["records_sha256"],
            )
        except (KeyError, TypeError):  # damaged: the shard is made again
            return None
        index = self.output / f"{shard_name(shard)}.idx.npy"
        tar = join_location(self.output, result.info.tar)
        return result if index.exists() and (is_remote(tar) or Path(tar).exists()) else None

    def make_shards(
        self,
        make: Callable[..., ShardResult],
        task_of: Callable[[int], tuple],
        num_workers: int,
    ) -> Iterator[tuple[int, ShardResult]]:
        """Make the unfinished shards; yield the number and result of each finished one.

        Args:
            make: called in a worker process as make(output, shard, *task).
            task_of: shard -> task; the task is pickled.
            num_workers: number of processes.
        """
        shards = self.unfinished_shards()
        if num_workers <= 1 or len(shards) <= 1:
            for shard in shards:
                yield shard, _make(make, self.output, shard, task_of(shard))
            return
        # spawn: forking a process that has threads (torch, DALI) can deadlock.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(num_workers, mp_context=context)
        try:
            jobs = {
                pool.submit(_make, make, self.output, shard, task_of(shard)): shard
                for shard in shards
            }
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        finally:
            pool.shutdown(cancel_futures=True)  # interrupted: running tasks finish, no more start

    def finish(
        self, notes: Notes | None = None, check: Callable[[Report], None] | None = None
    ) -> Report:
        """Write report and manifest of finished shards; a second call reads the report.

        Args:
            notes: on the input as a whole; they come before those on records.
            check: raises DataError if the result must not be kept.

        Raises:
            DataError: a shard is unfinished, every record was skipped, or `check` refuses.
        """
        report_path = self.output / REPORT
        if not self.is_complete:
            if missing := self.unfinished_shards():
                raise DataError(f"{self.output} still lacks {len(missing)} shard(s)")
            report, infos, skipped = self._collect(notes or {})
            if not report.num_samples:
                first = report.skipped[0].reason if report.skipped else "the input is empty"
                raise DataError(
                    f"not one of {report.num_records} records can be used; the first: {first}"
                )
            if check is not None:
                check(report)
            lines = (json.dumps(asdict(entry)) + "\n" for entry in skipped)
            write_atomically(self.output / SKIPPED, "".join(lines).encode())
            text = json.dumps(asdict(report), indent=1) + "\n"
            write_atomically(report_path, text.encode())
            identity = self._made_from.identity | {"rules": self._made_from.rules}
            write_manifest(self.output, infos, **identity)
            self.is_complete = True
        try:
            content = parse_json(report_path.read_bytes())
            skipped = [Skipped(**entry) for entry in content["skipped"]]
            return Report(**{**content, "skipped": skipped})
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{report_path} is damaged: remove the folder and begin again"
            ) from error

    def _collect(self, notes: Notes) -> tuple[Report, list[ShardInfo], list[Skipped]]:
        results = [result for s in range(self.num_shards) if (result := self._result(s))]
        skipped = [entry for result in results for entry in result.skipped]
        counts: Counter[str] = Counter()
        listed: list[Skipped] = []
        for entry in skipped:
            counts[entry.kind] += 1
            if counts[entry.kind] <= MAX_LISTED:
                listed.append(entry)
        infos = [result.info for result in results]
        report = Report(
            num_records=sum(result.num_records for result in results),
            num_samples=sum(info.num_samples for info in infos),
            num_images=sum(info.num_images for info in infos),
            num_text_only=sum(info.num_text_only for info in infos),
            num_skipped=dict(counts.most_common()),
            num_skipped_by_source=dict(Counter(entry.source for entry in skipped).most_common()),
            skipped=listed,
            notes=add_notes(dict(notes), *(result.notes for result in results)),
        )
        return report, infos, skipped


def add_notes(notes: Notes, *more: Mapping[str, list]) -> Notes:
    """Add counts of records to notes, which keep their first example; return the notes."""
    for some in more:
        for text, (count, example) in some.items():
            notes.setdefault(text, [0, example])[0] += count
    return notes


def _make(make: Callable[..., ShardResult], output: Path, shard: int, task: tuple) -> ShardResult:
    """Make one shard and store its result; runs in a worker process."""
    result = make(output, shard, *task)
    stored = asdict(replace(result, files={}))  # asdict copies, and the files are many
    del stored["files"]
    Ledger(output).write_result(shard, stored, result.files)
    return result
