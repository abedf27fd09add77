"""Index existing WebDataset tars as a dataset folder; no tar is rewritten.

    tar --scan_tar: one sequential read--> index rows, digest, skipped samples with reasons

Indexing checks neither texts nor images, so its speed is that of reading and hashing the tars.
Training checks texts when it reads them, and images when it decodes them.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_croc.data.prepare.inputs.choose import expand_folders
from megatron_croc.data.prepare.inputs.tars import with_damage
from megatron_croc.data.prepare.made_from import MadeFrom, SourceFiles, absolute
from megatron_croc.data.prepare.preprocess import RULES
from megatron_croc.data.prepare.shard_job import Report, ShardJob, ShardResult, Skipped
from megatron_croc.data.prepare.tar_scan import place_of_text, scan_tar
from megatron_croc.data.store.shard_writer import ShardInfo, sha256_of, shard_name, write_index
from megatron_croc.data.store.storage import is_remote, open_storage, retry
from megatron_croc.errors import DataError


class TarIndexer:
    """Job that indexes tars as one dataset folder."""

    def __init__(self, *, input_path: Sequence[str | Path], output: Path) -> None:
        """Read the sizes of the tars and look for indexes of an earlier, interrupted job.

        Args:
            input_path: tars, local or s3://, or folders of them.
            output: dataset folder; may be the folder of the tars.

        Raises:
            DataError: a tar is missing, or the output was started with other tars.
        """
        self._tars = [_location(path, output) for path in expand_folders(input_path)]
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
                options={},
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
        for shard, _ in self._job.make_shards(index_tar, lambda s: (self._tars[s],), num_workers):
            yield self.sizes[shard]

    def finish(self) -> Report:
        """Write report and manifest once all tars are indexed (ShardJob.finish)."""
        return self._job.finish()


def index_tar(output: Path, shard: int, tar: str) -> ShardResult:
    """Write one tar's index; runs in a worker process."""
    files = SourceFiles()
    if not is_remote(tar):
        files.note(output / tar)
    scan = scan_tar(_open(output, tar))
    text_format = scan.text_format
    rows: list[tuple[int, int, int]] = []
    skipped: list[Skipped] = []
    num_samples = num_text_only = 0
    samples = with_damage(scan)
    for number, sample in enumerate(samples):
        text, fault = place_of_text(sample, text_format), sample.fault
        if fault is None and text is None:
            fault = ("missing_caption", f"there is no {text_format}")
        if fault is not None:
            kind, reason = fault
            reason = f"{sample.key!r:.80}: {reason}"
            skipped.append(Skipped(record=number, source=tar, kind=kind, reason=reason))
            continue
        places = [text, *(place for _, place in sample.images)]
        rows += [(num_samples, *place) for place in places if place is not None]
        num_samples += 1
        num_text_only += not sample.images
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
        records_sha256=_digest_of(tar),
        files=files.states,
    )


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
    return open_storage(tar if is_remote(tar) else output / tar)


def _size(output: Path, tar: str) -> int:
    try:
        return retry(lambda: _open(output, tar).size(), tar)
    except OSError as error:
        raise DataError(f"tar {tar} cannot be read: {error}; correct the path") from error
