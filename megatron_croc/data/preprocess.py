"""LLaVA-style JSON and a folder of images -> a dataset folder, in parallel and resumable.

    records [s * n, (s + 1) * n) --worker--> shard s --> .progress/shard-s.json   (it is finished)
                                      \\--> skipped records, each with its reason
    all shards finished --> report.json, manifest.json, .progress removed

A shard depends on its own records only, so any number of workers gives equal bytes, and a second
run does only what is missing. `.progress/input.json` remembers the input; another one is refused.
"""

import hashlib
import json
import multiprocessing
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from megatron_croc.data.bad_samples import BadSampleError
from megatron_croc.data.conversation import check_conversation
from megatron_croc.data.image_transform import ImageError, read_header
from megatron_croc.data.shard_writer import (
    MANIFEST,
    ShardInfo,
    ShardWriter,
    shard_name,
    write_atomically,
    write_manifest,
)
from megatron_croc.errors import DataError

REPORT = "report.json"
PROGRESS = ".progress"
MAX_LISTED = 20
"""Skipped records quoted per reason in the report; all are counted."""

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
"""Member extension by what an image is, not by what its file is called."""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """One record that was left out."""

    record: int
    """Place in the input, from 0."""

    kind: str
    """What it is counted as."""

    reason: str
    """What is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of the input."""

    num_records: int
    num_samples: int
    num_images: int
    num_text_only: int
    num_skipped: dict[str, int]
    skipped: list[Skipped]

    def lines(self) -> Iterator[str]:
        """For people: the counts, and examples of what was skipped."""
        yield (
            f"{self.num_records} records: {self.num_samples} samples ({self.num_images} images, "
            f"{self.num_text_only} samples of text only), "
            f"{sum(self.num_skipped.values())} skipped"
        )
        for kind, count in self.num_skipped.items():
            yield f"  {kind}: {count}"
            for entry in [s for s in self.skipped if s.kind == kind][:3]:
                yield f"    record {entry.record}: {entry.reason}"


class Preprocessor:
    """One input file on its way to one dataset folder."""

    def __init__(
        self, *, input_path: Path, image_folder: Path, output: Path, samples_per_shard: int
    ) -> None:
        """Read the input and find out what is already there.

        Args:
            input_path: JSON list of records {"conversations": [...], "image": name or names}.
            image_folder: what image names are relative to.
            output: dataset folder; made when missing.
            samples_per_shard: records each shard is made of.

        Raises:
            DataError: the input is no JSON list, the image folder is missing, or the output was
                begun with another input.
        """
        if samples_per_shard < 1:
            raise DataError(f"samples_per_shard = {samples_per_shard} must be at least 1")
        if not image_folder.is_dir():
            raise DataError(f"image folder {image_folder} does not exist")
        self.records, digest = _read_records(input_path)
        self.image_folder = image_folder
        self.output = output
        self.samples_per_shard = samples_per_shard
        self._identity = {"input_sha256": digest, "samples_per_shard": samples_per_shard}
        self.num_shards = -(-len(self.records) // samples_per_shard)
        self.is_complete = (output / MANIFEST).exists()
        self._check_same_input()
        if not self.is_complete:
            (output / PROGRESS).mkdir(parents=True, exist_ok=True)
            identity = json.dumps(self._identity).encode()
            write_atomically(output / PROGRESS / "input.json", identity)

    def _check_same_input(self) -> None:
        for path in (self.output / MANIFEST, self.output / PROGRESS / "input.json"):
            if not path.exists():
                continue
            begun = json.loads(path.read_text(encoding="utf-8"))
            for key, value in self._identity.items():
                if begun.get(key) != value:
                    raise DataError(
                        f"{self.output} was begun with another input ({key} {begun.get(key)}, now "
                        f"{value}): choose another output folder, or remove this one"
                    )

    def unfinished_shards(self) -> list[int]:
        """Shards still to be made."""
        if self.is_complete:
            return []
        return [
            shard
            for shard in range(self.num_shards)
            if not (
                _done_path(self.output, shard).exists()
                and (self.output / f"{shard_name(shard)}.tar").exists()
            )
        ]

    def make_shards(self, num_workers: int) -> Iterator[int]:
        """Make the unfinished shards; yields the number of records of each as it is done."""
        shards = self.unfinished_shards()
        if num_workers <= 1 or len(shards) <= 1:
            for shard in shards:
                yield _make_shard(self.output, self.image_folder, shard, self._records_of(shard))
            return
        # spawn: forking a process that has threads (torch, DALI) can deadlock.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(num_workers, mp_context=context)
        try:
            jobs = [
                pool.submit(
                    _make_shard, self.output, self.image_folder, shard, self._records_of(shard)
                )
                for shard in shards
            ]
            for job in as_completed(jobs):
                yield job.result()
        finally:
            pool.shutdown(cancel_futures=True)  # interrupted: finish what runs, start no more

    def _records_of(self, shard: int) -> list[tuple[int, object]]:
        begin = shard * self.samples_per_shard
        records = self.records[begin : begin + self.samples_per_shard]
        return list(enumerate(records, start=begin))

    def finish(self) -> Report:
        """Write report and manifest once all shards are made; called again, read the report.

        Raises:
            DataError: shards are missing, or every record was skipped.
        """
        report_path = self.output / REPORT
        if not self.is_complete:
            if missing := self.unfinished_shards():
                raise DataError(f"{self.output} still lacks {len(missing)} shard(s)")
            report, infos = self._collect()
            if not report.num_samples:
                first = report.skipped[0].reason if report.skipped else "the input is empty"
                raise DataError(
                    f"not one of {report.num_records} records can be used; the first: {first}"
                )
            text = json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n"
            write_atomically(report_path, text.encode())
            write_manifest(self.output, infos, **self._identity)
            shutil.rmtree(self.output / PROGRESS)
            self.is_complete = True
        content = json.loads(report_path.read_text(encoding="utf-8"))
        content["skipped"] = [Skipped(**entry) for entry in content["skipped"]]
        return Report(**content)

    def _collect(self) -> tuple[Report, list[ShardInfo]]:
        infos: list[ShardInfo] = []
        counts: Counter[str] = Counter()
        listed: list[Skipped] = []
        for shard in range(self.num_shards):
            done = json.loads(_done_path(self.output, shard).read_text(encoding="utf-8"))
            infos.append(ShardInfo(**done["info"]))
            for entry in done["skipped"]:
                counts[entry["kind"]] += 1
                if counts[entry["kind"]] <= MAX_LISTED:
                    listed.append(Skipped(**entry))
        report = Report(
            num_records=len(self.records),
            num_samples=sum(info.num_samples for info in infos),
            num_images=sum(info.num_images for info in infos),
            num_text_only=sum(info.num_text_only for info in infos),
            num_skipped=dict(counts.most_common()),
            skipped=listed,
        )
        return report, infos


def _read_records(path: Path) -> tuple[list, str]:
    try:
        content = path.read_bytes()
        records = json.loads(content)
    except OSError as error:
        raise DataError(f"input {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"input {path} is not valid JSON: {error}") from error
    if not isinstance(records, list):
        raise DataError(f"input {path} must be a JSON list, got {type(records).__name__}")
    return records, hashlib.sha256(content).hexdigest()


def _done_path(output: Path, shard: int) -> Path:
    """What says that a shard is finished, and what was skipped on the way."""
    return output / PROGRESS / f"{shard_name(shard)}.json"


def _make_shard(
    output: Path, image_folder: Path, shard: int, records: list[tuple[int, object]]
) -> int:
    """Make one shard from (place in the input, record) pairs; runs in a worker process.

    Returns:
        Records read.
    """
    skipped: list[Skipped] = []
    with ShardWriter(output, shard) as writer:
        for number, record in records:
            try:
                stored, images = _read_record(record, image_folder, name=f"record {number}")
            except BadSampleError as error:
                skipped.append(Skipped(record=number, kind=error.kind, reason=error.reason))
                continue
            writer.add({"source_index": number, **stored}, images)
    assert writer.info is not None
    done = {"info": asdict(writer.info), "skipped": [asdict(entry) for entry in skipped]}
    write_atomically(_done_path(output, shard), json.dumps(done).encode())
    return len(records)


def _read_record(
    record: object, image_folder: Path, *, name: str
) -> tuple[dict, list[tuple[str, bytes]]]:
    """Check one record and read its images."""
    if not isinstance(record, dict):
        raise BadSampleError(name, "record", f"must be a JSON object, got {record!r:.60}")
    image = record.get("image") or []
    names = [image] if isinstance(image, str) else image
    if not isinstance(names, list) or not all(isinstance(entry, str) for entry in names):
        raise BadSampleError(name, "record", f'"image" must be a name or names, got {image!r:.60}')
    messages = record.get("conversations")
    check_conversation(messages, num_images=len(names), sample_id=name)
    images = [_read_image(image_folder, entry, name) for entry in names]
    return {"id": record.get("id"), "conversations": messages}, images


def _read_image(image_folder: Path, image: str, name: str) -> tuple[str, bytes]:
    """(extension, bytes) of an image that lies inside the image folder."""
    place = PurePosixPath(image)
    if place.is_absolute() or ".." in place.parts:
        raise BadSampleError(name, "missing_image", f"image {image} lies outside the image folder")
    try:
        data = (image_folder / place).read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise BadSampleError(
            name, "missing_image", f"image {image} is not in the image folder"
        ) from error
    try:
        header = read_header(data)
    except ImageError as error:
        raise BadSampleError(name, "image", f"image {image}: {error}") from error
    return EXTENSIONS.get(header.format, header.format.lower()), data
