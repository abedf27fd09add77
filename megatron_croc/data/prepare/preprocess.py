"""Preprocess records of any input to a dataset folder of shards.

    records [s * n, (s + 1) * n) --check, read images--> shard s
                                      \\--> skipped records, each with its reason

shard_job.py holds the part shared with indexing, inputs/ the readers of each input format.
"""

import errno
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from megatron_croc.data.bad_samples import BadSampleError
from megatron_croc.data.prepare.inputs import InputFormat, InputRecord, InputSlice, open_input
from megatron_croc.data.prepare.made_from import (
    MadeFrom,
    SourceFiles,
    absolute,
    digest_records,
    update_digest,
)
from megatron_croc.data.prepare.shard_job import Report, ShardJob, ShardResult, Skipped
from megatron_croc.data.sample.conversation import check_conversation, is_unicode
from megatron_croc.data.sample.image_transform import ImageError, read_header
from megatron_croc.data.store.records import conversation_of
from megatron_croc.data.store.shard_writer import ShardWriter
from megatron_croc.errors import DataError, first_line

RULES = 1
"""Version of the rules by which a record becomes a sample. Raise it when they change: shards that
were made by other rules are then made again."""

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
"""Extension of an image's member by its format; the name of its file may be wrong."""


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
    ) -> None:
        """Open the input and look for shards of an earlier, interrupted job.

        Args:
            input_path: file, files or folder, in a format of inputs/.
            image_folder: folder of the image names; None: records hold the bytes of images.
            output: dataset folder; created if missing.
            samples_per_shard: records of each shard.
            input_format: None: given by the suffix.

        Raises:
            DataError: the input is unusable, the image folder is missing, or the output was started
                with another input.
        """
        if samples_per_shard < 1:
            raise DataError(f"samples_per_shard = {samples_per_shard} must be at least 1")
        if image_folder is not None and not image_folder.is_dir():
            raise DataError(f"image folder {image_folder} does not exist")
        paths = [input_path] if isinstance(input_path, str | Path) else list(input_path)
        self._input = open_input(paths, input_format)
        self._image_folder = image_folder
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
                options={},
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
        """Write report and manifest once all shards are made (ShardJob.finish)."""
        return self._job.finish()

    def _records_of(self, shard: int) -> range:
        begin = shard * self._samples_per_shard
        return range(begin, min(begin + self._samples_per_shard, self._input.num_records))

    def _task_of(self, shard: int) -> tuple[Path | None, InputSlice]:
        return self._image_folder, self._slice_of(shard)

    def _slice_of(self, shard: int) -> InputSlice:
        records = self._records_of(shard)
        return self._input.slice(records.start, records.stop)


def _make_shard(
    output: Path, shard: int, image_folder: Path | None, records: InputSlice
) -> ShardResult:
    """Make one shard; runs in a worker process."""
    skipped: list[Skipped] = []
    num_records, digest, files = 0, hashlib.sha256(), SourceFiles()
    with ShardWriter(output, shard) as writer:
        for found in records.read():
            num_records += 1
            update_digest(digest, found)
            try:
                stored, images = _read_record(found, image_folder, files)
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
    assert writer.info is not None
    return ShardResult(
        info=writer.info,
        num_records=num_records,
        skipped=skipped,
        records_sha256=digest.hexdigest(),
        files=files.states,
    )


def _read_record(
    found: InputRecord, image_folder: Path | None, files: SourceFiles
) -> tuple[dict, list[tuple[str, bytes]]]:
    """Check one record and read its images."""
    if found.fault is not None:
        raise found.fault
    record, name = found.record, f"record {found.number}"
    if not isinstance(record, dict):
        raise BadSampleError(name, "record", f"must be a JSON object, got {record!r:.60}")
    image = record.get("image") or []
    images = image if isinstance(image, list) else [image]
    if not all(isinstance(entry, str | bytes) for entry in images):
        raise BadSampleError(name, "record", f'"image" must be a name or names, got {image!r:.60}')
    messages = conversation_of(record, len(images), name)
    check_conversation(messages, num_images=len(images), sample_id=name)
    assert isinstance(messages, list)
    kept = [{"from": message["from"], "value": message["value"]} for message in messages]
    encoded = [_read_image(image_folder, entry, name, files) for entry in images]
    return {"id": _plain_id(record.get("id")), "conversations": kept}, encoded


def _plain_id(value: object) -> str | int | None:
    """Return an id that can be stored, else None; ids are for display only."""
    if isinstance(value, str):
        return value if is_unicode(value) else None
    return value if isinstance(value, int) else None


def _read_image(
    image_folder: Path | None, image: str | bytes, name: str, files: SourceFiles
) -> tuple[str, bytes]:
    """Return (extension, bytes) of an image, from the record or from the image folder."""
    label = "image" if isinstance(image, bytes) else f"image {image}"
    data = image if isinstance(image, bytes) else _read_named(image_folder, image, name, files)
    try:
        header = read_header(data)
    except ImageError as error:
        raise BadSampleError(name, "image", f"{label}: {error}") from error
    return EXTENSIONS.get(header.format, header.format.lower()), data


def _read_named(image_folder: Path | None, image: str, name: str, files: SourceFiles) -> bytes:
    if image_folder is None:
        raise BadSampleError(
            name, "missing_image", f"image {image} is a name: say --image-folder to look it up"
        )
    place = PurePosixPath(image)
    if place.is_absolute() or ".." in place.parts:
        raise BadSampleError(name, "missing_image", f"image {image} lies outside the image folder")
    try:
        return files.read(image_folder / place)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise BadSampleError(
            name, "missing_image", f"image {image} is not in the image folder"
        ) from error
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
            raise DataError(f"image {image}: {first_line(error)}; run the command again") from error
        raise BadSampleError(
            name, "missing_image", f"image {image!r:.60} cannot be a file name"
        ) from error
