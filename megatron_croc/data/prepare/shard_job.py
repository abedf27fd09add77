"""Job that makes shards in parallel, each once; shared by preprocessing and indexing.

    task of shard s --worker--> shard s --> .progress/shard-s.json   (it is finished)
    all finished --> report.json, skipped.jsonl, manifest.json; .progress removed

A shard depends on its own task only: any number of workers gives equal bytes, and a second run
makes only the missing shards. `.progress/input.json` holds the input; another input is refused.
"""

import json
import multiprocessing
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_croc.atomic_files import write_atomically
from megatron_croc.data.store.shard_writer import (
    MANIFEST,
    ShardInfo,
    shard_name,
    write_manifest,
)
from megatron_croc.data.store.storage import is_remote, join_location
from megatron_croc.errors import DataError

REPORT = "report.json"
SKIPPED = "skipped.jsonl"
PROGRESS = ".progress"
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
    notes: Notes = field(default_factory=dict)


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
            yield f"  {text}{where}{f', first: {example}' if example else ''}"


class ShardJob:
    """Job that makes one dataset folder of one input."""

    def __init__(self, output: Path, identity: dict[str, Any], num_shards: int) -> None:
        """Look for shards of an earlier, interrupted job.

        Args:
            output: dataset folder; created if missing.
            identity: everything that the shards depend on; stored in the manifest.
            num_shards: number of shards.

        Raises:
            DataError: the output was started with another input.
        """
        self.output = output
        self.num_shards = num_shards
        self._identity = identity
        self.is_complete = (output / MANIFEST).exists()
        self._check_same_input()
        if not self.is_complete:
            (output / PROGRESS).mkdir(parents=True, exist_ok=True)
            write_atomically(output / PROGRESS / "input.json", json.dumps(identity).encode())

    def _check_same_input(self) -> None:
        for path in (self.output / MANIFEST, self.output / PROGRESS / "input.json"):
            if not path.exists():
                continue
            try:
                begun = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise DataError(f"{path} is damaged: remove the folder and begin again") from error
            for key, value in self._identity.items():
                if begun.get(key) != value:
                    raise DataError(
                        f"{self.output} was begun with another input ({key} {begun.get(key)}, now "
                        f"{value}): choose another output folder, or remove this one"
                    )

    def unfinished_shards(self) -> list[int]:
        """Return the numbers of the unfinished shards."""
        if self.is_complete:
            return []
        return [shard for shard in range(self.num_shards) if self._result(shard) is None]

    def _result(self, shard: int) -> ShardResult | None:
        """Read the stored result of a shard; None if it is unfinished."""
        try:
            done = json.loads(_done_path(self.output, shard).read_bytes())
        except FileNotFoundError:
            return None
        result = ShardResult(
            info=ShardInfo(**done["info"]),
            num_records=done["num_records"],
            skipped=[Skipped(**entry) for entry in done["skipped"]],
            notes=done.get("notes", {}),
        )
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
            write_manifest(self.output, infos, **self._identity)
            shutil.rmtree(self.output / PROGRESS)
            self.is_complete = True
        content = json.loads(report_path.read_text(encoding="utf-8"))
        content["skipped"] = [Skipped(**entry) for entry in content["skipped"]]
        return Report(**content)

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
    write_atomically(_done_path(output, shard), json.dumps(asdict(result)).encode())
    return result


def _done_path(output: Path, shard: int) -> Path:
    """Return the path of a finished shard's result, with its skipped records."""
    return output / PROGRESS / f"{shard_name(shard)}.json"
