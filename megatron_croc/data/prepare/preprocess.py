"""Preprocess records of any input to a dataset folder of shards.

    records [s * n, (s + 1) * n) --check, read images--> shard s
                                      \\--> skipped records, each with its reason

shard_job.py holds the part shared with indexing, inputs/ the readers of each input format.
"""

import errno
import functools
import hashlib
import itertools
import os
import re
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
from megatron_croc.data.prepare.shard_job import (
    Notes,
    Report,
    ShardJob,
    ShardResult,
    Skipped,
    add_notes,
)
from megatron_croc.data.records.fields import IMAGE_SUFFIXES, FieldRules, suffix_of
from megatron_croc.data.records.reading import NO_RULES, read_record
from megatron_croc.data.records.splits import check_split, wanted_splits
from megatron_croc.data.sample.conversation import is_unicode
from megatron_croc.data.sample.image_transform import ImageError, check_shape, read_header
from megatron_croc.data.store.shard_writer import ShardWriter
from megatron_croc.errors import DataError, first_line

RULES = 2
"""Version of the rules by which a record becomes a sample. Raise it when they change: shards that
were made by other rules are then made again."""

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
"""Extension of an image's member by its format; the name of its file may be wrong."""

_COMMON_SUFFIXES = ("jpg", "jpeg", "png", "gif", "webp", "JPG")
_LFS_POINTER = b"version https://git"
_MAX_LOOKED_AT = 1000
"""Entries of an image folder among which an archive is looked for."""


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
    ignored = options.rules.ignore
    members = [one for one in found.members if not _is_ignored_member(one[0], ignored)]
    reading = read_record(
        record,
        name,
        members=[member for member, _ in members],
        other_members=[m for m in found.other_members if not _is_ignored_member(m, ignored)],
        rules=options.rules,
    )
    notes = dict(reading.notes)
    for image in reading.images if found.folder is not None else ():
        if isinstance(image, str) and len(PurePosixPath(image).parts) > 1:
            check_split({}, options.splits, name, PurePosixPath(image).parts[0])
    folder = options.image_folder or found.folder
    encoded = [
        _read_image(
            name,
            members[image] if isinstance(image, int) else image,
            folder,
            options.image_aspect_ratio,
            notes,
            files,
        )
        for image in reading.images
    ]
    return {"id": _plain_id(record.get("id")), "conversations": reading.messages}, encoded, notes


def _is_ignored_member(member: str, ignored: frozenset[str]) -> bool:
    return PurePosixPath(member).name.partition(".")[2].lower() in ignored


def _plain_id(value: object) -> str | int | None:
    """Return an id that can be stored, else None; ids are for display only."""
    if isinstance(value, str):
        return value if is_unicode(value) else None
    return value if isinstance(value, int) else None


def _read_image(
    name: str,
    image: str | bytes | tuple[str, bytes],
    image_folder: Path | None,
    image_aspect_ratio: Literal["pad", "square"],
    notes: dict[str, str],
    files: SourceFiles,
) -> tuple[str, bytes]:
    """Return (extension, bytes) of an image, from the record or from the image folder."""
    label, data = "image", image
    if isinstance(image, str):
        label, data = f"image {image}", _read_named(image_folder, image, name, notes, files)
    elif isinstance(image, tuple):
        label, data = f"image {image[0]}", image[1]
    assert isinstance(data, bytes)
    try:
        header = read_header(data)
        check_shape(header.width, header.height, image_aspect_ratio)
    except ImageError as error:
        cause = "a pointer of Git LFS: run git lfs pull" if data[:19] == _LFS_POINTER else error
        raise BadSampleError(name, "image", f"{label}: {cause}") from error
    return EXTENSIONS.get(header.format, header.format.lower()), data


def _read_named(
    image_folder: Path | None, image: str, name: str, notes: dict[str, str], files: SourceFiles
) -> bytes:
    if re.match(r"[a-z0-9]+://", image):
        raise BadSampleError(
            name,
            "missing_image",
            f"image {image:.120} is an address and not fetched: download it and name the file",
        )
    if image_folder is None:
        raise BadSampleError(
            name, "missing_image", f"image {image:.120} is a name: say --image-folder to look it up"
        )
    place = PurePosixPath(image)
    if place.is_absolute() and place.is_relative_to(image_folder.absolute()):
        place = place.relative_to(image_folder.absolute())
    if place.is_absolute() or ".." in place.parts:
        raise BadSampleError(
            name, "missing_image", f"image {image:.120} lies outside the image folder"
        )
    try:
        return files.read(image_folder / place)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        if (other := _other_suffix(image_folder / place, files)) is not None:
            note = "file found under another suffix than its record says"
            notes.setdefault(note, f"{image} is {other.name}")
            return files.read(other)
        reason = f"image {image:.120} is not in the image folder"
        if (packed := _archive_in(image_folder)) is not None:
            reason += f"; unpack {packed} there first"
        raise BadSampleError(name, "missing_image", reason) from error
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            reason = f"image {image:.120} is a link that leads in a circle"
            raise BadSampleError(name, "missing_image", reason) from error
        if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
            raise DataError(f"image {image}: {first_line(error)}; run the command again") from error
        raise BadSampleError(
            name, "missing_image", f"image {image!r:.60} cannot be a file name"
        ) from error


@functools.lru_cache(maxsize=64)
def _archive_in(folder: Path) -> str | None:
    """Return the name of an archive in a folder, whose images are not files yet."""
    with os.scandir(folder) as entries:
        names = (entry.name for entry in itertools.islice(entries, _MAX_LOOKED_AT))
        return next((name for name in names if name.endswith((".zip", ".tar", ".tar.gz"))), None)


def _other_suffix(path: Path, files: SourceFiles) -> Path | None:
    """Return the one image of this name with another suffix: OCR-VQA's GIFs are listed as .jpg."""
    if suffix_of(path.name) not in IMAGE_SUFFIXES:
        return None
    others = [path.with_suffix(f".{suffix}") for suffix in _COMMON_SUFFIXES]
    for other in others:
        files.note(other)
    there = [other for other in others if other != path and other.is_file()]
    return there[0] if len(there) == 1 else None
