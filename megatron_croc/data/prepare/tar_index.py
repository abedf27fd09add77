"""Index existing WebDataset tars as a dataset folder; no tar is rewritten.

    tar --scan_tar: one sequential read--> index rows, digest, skipped samples with reasons

Texts are read by the rules of preprocessing, so both make the same samples of a tar. Images are not
looked at: training checks them when it decodes them.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_croc.data.bad_samples import BadSampleError
from megatron_croc.data.prepare.inputs.compressed import compression_of
from megatron_croc.data.prepare.inputs.files import find_files
from megatron_croc.data.prepare.inputs.tars import no_text, notes_of, with_damage
from megatron_croc.data.prepare.made_from import MadeFrom, SourceFiles, absolute
from megatron_croc.data.prepare.preprocess import RULES, refuse_remote_output
from megatron_croc.data.prepare.shard_job import (
    Notes,
    Report,
    ShardJob,
    ShardResult,
    Skipped,
    add_notes,
)
from megatron_croc.data.prepare.tar_scan import Place, TarSample, scan_tar
from megatron_croc.data.records.reading import (
    TextFormat,
    is_json_object,
    join_texts,
    read_record,
)
from megatron_croc.data.records.splits import check_split, wanted_splits
from megatron_croc.data.store.shard_writer import ShardInfo, sha256_of, shard_name, write_index
from megatron_croc.data.store.storage import is_remote, join_location, open_storage, retry
from megatron_croc.errors import DataError


class TarIndexer:
    """Job that indexes tars as one dataset folder."""

    def __init__(
        self, *, input_path: Sequence[str | Path], output: Path, split: Sequence[str] = ()
    ) -> None:
        """Read the sizes of the tars and look for indexes of an earlier, interrupted job.

        Args:
            input_path: tars, folders, globs or s3:// prefixes of them.
            output: dataset folder; may be the folder of the tars.
            split: splits to take; empty: train.

        Raises:
            DataError: a tar is missing, or the output was started with other tars.
        """
        refuse_remote_output(output)
        found = find_files(input_path, split=split, input_format="webdataset")
        self._notes: Notes = {note.text: [0, note.example] for note in found.notes}
        self._splits = wanted_splits(split)
        self._tars = [_location(path, output) for path in found.files]
        self.sizes = [_size(output, tar) for tar in self._tars]
        """Size of each tar in bytes."""
        names = "\n".join(f"{n} {tar}" for tar, n in zip(self._tars, self.sizes, strict=True))
        digest = hashlib.sha256(names.encode()).hexdigest()
        self._job = ShardJob(
            output,
            MadeFrom(
                identity={"indexed_tars_sha256": digest},
                digest_key="indexed_tars_sha256",
                inputs=absolute(input_path),
                rules=RULES,
                options={"split": sorted(wanted_splits(split))},
            ),
            num_shards=len(self._tars),
            records_of=lambda shard: _digest_of(self._tars[shard]),
            owns_tars=False,
        )

    @property
    def note(self) -> str | None:
        """One line on tars indexed earlier that are indexed again; None: there are none."""
        return self._job.note

    @property
    def num_unfinished_bytes(self) -> int:
        """Number of bytes of the tars without an index."""
        return sum(self.sizes[shard] for shard in self._job.unfinished_shards())

    def make_indices(self, num_workers: int) -> Iterator[int]:
        """Index the remaining tars; yield the size of each finished one."""
        for shard, _ in self._job.make_shards(index_tar, self._task_of, num_workers):
            yield self.sizes[shard]

    def _task_of(self, shard: int) -> tuple[str, frozenset[str]]:
        return self._tars[shard], self._splits

    def finish(self) -> Report:
        """Write report and manifest once all tars are indexed (ShardJob.finish)."""
        return self._job.finish(self._notes)


def index_tar(
    output: Path, shard: int, tar: str, splits: frozenset[str] = frozenset()
) -> ShardResult:
    """Write one tar's index; runs in a worker process."""
    files = SourceFiles()
    if not is_remote(tar):
        files.note(output / tar)
    scan = scan_tar(_open(output, tar), keeps_texts=True)
    rows: list[tuple[int, int, int]] = []
    skipped: list[Skipped] = []
    notes: Notes = {note.text: [0, note.example] for note in notes_of(scan, tar)}
    formats: set[TextFormat] = set()
    num_samples = num_text_only = 0
    samples = with_damage(scan)
    for number, sample in enumerate(samples):
        try:
            read_format, places, decided = _read_sample(sample, splits)
        except BadSampleError as error:
            reason = f"{sample.key!r:.80}: {error.reason}"
            skipped.append(Skipped(record=number, source=tar, kind=error.kind, reason=reason))
            continue
        formats.add(read_format)
        add_notes(notes, {text: [1, example or sample.key] for text, example in decided.items()})
        rows += [(num_samples, *place) for place in places]
        num_samples += 1
        num_text_only += len(places) == 1
    formats = formats or {"json"}
    text_format: TextFormat = formats.pop() if len(formats) == 1 else "mixed"
    index_path = write_index(output, shard, rows)
    info = ShardInfo(
        name=shard_name(shard),
        tar=tar,
        text_format=text_format,
        num_samples=num_samples,
        num_images=len(rows) - num_samples,
        num_text_only=num_text_only,
        tar_bytes=scan.num_bytes,
        tar_sha256=scan.sha256,
        idx_bytes=index_path.stat().st_size,
        idx_sha256=sha256_of(index_path),
    )
    return ShardResult(
        info=info,
        num_records=len(samples),
        skipped=skipped,
        notes=notes,
        records_sha256=_digest_of(tar),
        files=files.states,
    )


def _read_sample(
    sample: TarSample, splits: frozenset[str]
) -> tuple[TextFormat, list[Place], dict[str, str]]:
    """Return the format of a sample's text, the places of text and images, and the decisions."""
    if sample.fault is not None:
        raise BadSampleError(sample.key, *sample.fault)
    contents = sample.contents
    if not contents:
        raise BadSampleError(sample.key, *no_text(sample))
    try:
        record, is_in_txt = join_texts(contents.get("json"), contents.get("txt"))
    except ValueError as error:
        raise BadSampleError(sample.key, "record", str(error)) from error
    text_format: TextFormat = "txt" if is_in_txt else "json"
    if is_in_txt and is_json_object(contents["txt"]):
        raise BadSampleError(sample.key, "record", "its .txt holds a JSON object: name it .json")
    check_split(record, splits, sample.key)
    reading = read_record(
        {"id": sample.key, **record},
        sample.key,
        members=sample.image_names,
        other_members=sample.others,
    )
    images = [sample.images[n][1] for n in reading.images if isinstance(n, int)]
    if len(images) < len(reading.images):
        raise BadSampleError(
            sample.key,
            "missing_image",
            "its images are no members of the tar: make shards of it (croc data preprocess)",
        )
    return text_format, [sample.texts[text_format], *images], reading.notes


def _digest_of(tar: str) -> str:
    """Compute the digest of a tar's place; its content is compared by size and time."""
    return hashlib.sha256(tar.encode()).hexdigest()


def _location(path: str, output: Path) -> str:
    """Return a tar's location, relative if it is inside the dataset folder, which can then move."""
    if is_remote(path):
        return path
    tar, folder = Path(path).resolve(), output.resolve()
    return os.fspath(tar.relative_to(folder) if tar.is_relative_to(folder) else tar)


def _open(output: Path, tar: str):
    return open_storage(join_location(output, tar))


def _size(output: Path, tar: str) -> int:
    try:
        if (
            compression := compression_of(tar if is_remote(tar) else str(output / tar))
        ) is not None:
            raise DataError(
                f"tar {tar} is compressed ({compression}) and cannot be read at any place: "
                "decompress it, or make shards of it (croc data preprocess)"
            )
        return retry(lambda: _open(output, tar).size(), tar)
    except OSError as error:
        raise DataError(f"tar {tar} cannot be read: {error}; correct the path") from error
