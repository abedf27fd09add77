"""Preprocess records of any input to a dataset folder of shards.

    records [s * n, (s + 1) * n) --check, read images--> shard s
                                      \\--> skipped records, each with its reason

shard_job.py holds the part shared with indexing, inputs/ the readers of each input format.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from megatron_croc.data.bad_samples import BadSampleError
from megatron_croc.data.prepare.inputs import InputFormat, InputRecord, InputSlice, open_input
from megatron_croc.data.prepare.made_from import (
    MadeFrom,
    SourceFiles,
    absolute,
    digest_records,
    update_digest,
)
from megatron_croc.data.prepare.record_images import RecordImages
from megatron_croc.data.prepare.shard_job import (
    Notes,
    Report,
    ShardJob,
    ShardResult,
    Skipped,
    add_notes,
)
from megatron_croc.data.records.fields import FieldRules
from megatron_croc.data.records.reading import NO_RULES, read_record
from megatron_croc.data.records.splits import check_split, wanted_splits
from megatron_croc.data.sample.conversation import is_unicode
from megatron_croc.data.store.shard_writer import ShardWriter
from megatron_croc.errors import DataError

RULES = 2
"""Version of the rules by which a record becomes a sample. Raise it when they change: shards that
were made by other rules are then made again."""


class Preprocessor:
    """Job that preprocesses one input to one dataset folder."""

    def __init__(
        self,
        *,
        input_path: Path | Sequence[str | Path],
        image_folder: Path | None,
        output: Path,
        samples_per_shard: int,
        input_format: InputFormat | None = None,
        split: Sequence[str] = (),
        rules: FieldRules = NO_RULES,
        image_aspect_ratio: Literal["pad", "square"] = "pad",
    ) -> None:
        """Open the input and look for shards of an earlier, interrupted job.

        Args:
            input_path: file, files or folder, in a format of inputs/.
            image_folder: folder of the image names; None: records hold the bytes of images.
            output: dataset folder; created if missing.
            samples_per_shard: records of each shard.
            input_format: None: given by the suffix.
            split: splits to take; empty: train.
            rules: fields that are renamed or ignored.
            image_aspect_ratio: setting of training, which refuses images that are too long for it.

        Raises:
            DataError: the input is unusable, the image folder is missing, or the output was started
                with another input.
        """
        if samples_per_shard < 1:
            raise DataError(f"samples_per_shard = {samples_per_shard} must be at least 1")
        if image_folder is not None and not image_folder.is_dir():
            raise DataError(f"image folder {image_folder} does not exist")
        refuse_remote_output(output)
        paths = [input_path] if isinstance(input_path, str | Path) else list(input_path)
        self._input = open_input(paths, input_format, split=split)
        self._image_folder = image_folder
        self._options = ReadOptions(
            image_folder=image_folder,
            rules=rules,
            image_aspect_ratio=image_aspect_ratio,
            splits=wanted_splits(split),
        )
        self._samples_per_shard = samples_per_shard
        self._job = ShardJob(
            output,
            MadeFrom(
                identity={
                    "input_sha256": self._input.digest,
                    "samples_per_shard": samples_per_shard,
                },
                digest_key="input_sha256",
                inputs=absolute(paths),
                rules=RULES,
                options={
                    "split": sorted(self._options.splits),
                    "fields": rules.as_json,
                    "image_aspect_ratio": image_aspect_ratio,
                },
                image_folder=None if image_folder is None else str(image_folder.absolute()),
            ),
            num_shards=-(-self._input.num_records // samples_per_shard),
            records_of=lambda shard: digest_records(self._slice_of(shard).read()),
            owns_tars=True,
        )

    @property
    def note(self) -> str | None:
        """One line on shards of an earlier run that are made again; None: there are none."""
        return self._job.note

    @property
    def num_unfinished(self) -> int:
        """Number of records of unfinished shards."""
        return sum(len(self._records_of(shard)) for shard in self._job.unfinished_shards())

    def make_shards(self, num_workers: int) -> Iterator[int]:
        """Make the unfinished shards; yield the number of records of each finished one."""
        for _, result in self._job.make_shards(_make_shard, self._task_of, num_workers):
            yield result.num_records

    def finish(self) -> Report:
        """Write report and manifest once all shards are made (ShardJob.finish).

        Raises:
            DataError: also if an image folder was given and no record has an image.
        """
        notes: Notes = {note.text: [0, note.example] for note in self._input.notes}
        return self._job.finish(notes, self._check_images)

    def _check_images(self, report: Report) -> None:
        if self._image_folder is None or report.num_images:
            return
        first = f"; the first record left out: {report.skipped[0].reason}" if report.skipped else ""
        raise DataError(
            f"--image-folder {self._image_folder} was given and none of {report.num_records} "
            f"records has an image that can be read{first}; name the field of the images with "
            "--rename FIELD=image, or leave --image-folder out"
        )

    def _records_of(self, shard: int) -> range:
        begin = shard * self._samples_per_shard
        return range(begin, min(begin + self._samples_per_shard, self._input.num_records))

    def _task_of(self, shard: int) -> tuple["ReadOptions", InputSlice]:
        return self._options, self._slice_of(shard)

    def _slice_of(self, shard: int) -> InputSlice:
        records = self._records_of(shard)
        return self._input.slice(records.start, records.stop)


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Settings by which records are read."""

    image_folder: Path | None
    rules: FieldRules
    image_aspect_ratio: Literal["pad", "square"]
    splits: frozenset[str]


def refuse_remote_output(output: Path) -> None:
    """Refuse an s3:// location, which Path has shortened to s3:/.

    Raises:
        DataError: says the way out.
    """
    if str(output).startswith("s3:/"):
        raise DataError(
            "--output is an object store: shards are written to a local disk; copy the finished "
            "folder there (aws s3 sync), training reads s3://bucket/prefix"
        )


def _make_shard(output: Path, shard: int, options: ReadOptions, records: InputSlice) -> ShardResult:
    """Make one shard; runs in a worker process."""
    skipped: list[Skipped] = []
    notes: Notes = {}
    num_records, digest, files = 0, hashlib.sha256(), SourceFiles()
    with ShardWriter(output, shard) as writer:
        for found in records.read():
            num_records += 1
            update_digest(digest, found)
            try:
                stored, images, decided = _read_record(found, options, files)
            except BadSampleError as error:
                skipped.append(
                    Skipped(
                        record=found.number,
                        source=found.source,
                        kind=error.kind,
                        reason=error.reason,
                    )
                )
                continue
            writer.add({"source_index": found.number, **stored}, images)
            add_notes(notes, {text: [1, example] for text, example in decided.items()})
    assert writer.info is not None
    return ShardResult(
        info=writer.info,
        num_records=num_records,
        skipped=skipped,
        notes=notes,
        records_sha256=digest.hexdigest(),
        files=files.states,
    )


def _read_record(
    found: InputRecord, options: ReadOptions, files: SourceFiles
) -> tuple[dict, list[tuple[str, bytes]], dict[str, str]]:
    """Check one record and read its images; also return the decisions for the report."""
    if found.fault is not None:
        raise found.fault
    record, name = found.record, f"record {found.number}"
    if not isinstance(record, dict):
        raise BadSampleError(name, "record", f"must be a JSON object, got {record!r:.60}")
    check_split(record, options.splits, name)
    members, others = found.members, found.other_members
    if ignored := options.rules.ignore:
        members = [one for one in members if not _is_ignored_member(one[0], ignored)]
        others = [one for one in others if not _is_ignored_member(one, ignored)]
    reading = read_record(
        record,
        name,
        members=[member for member, _ in members],
        other_members=others,
        rules=options.rules,
    )
    notes = dict(reading.notes)
    for image in reading.images if found.folder is not None else ():
        if isinstance(image, str) and len(PurePosixPath(image).parts) > 1:
            check_split({}, options.splits, name, PurePosixPath(image).parts[0])
    images = RecordImages(
        name=name,
        folder=options.image_folder or found.folder,
        image_aspect_ratio=options.image_aspect_ratio,
        files=files,
        notes=notes,
    )
    encoded = [
        images.read(members[image] if isinstance(image, int) else image) for image in reading.images
    ]
    return {"id": _plain_id(record.get("id")), "conversations": reading.messages}, encoded, notes


def _is_ignored_member(member: str, ignored: frozenset[str]) -> bool:
    return PurePosixPath(member).name.partition(".")[2].lower() in ignored


def _plain_id(value: object) -> str | int | None:
    """Return an id that can be stored, else None; ids are for display only."""
    if isinstance(value, str):
        return value if is_unicode(value) else None
    return value if isinstance(value, int) else None
