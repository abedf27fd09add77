"""WebDataset tars: scanned once for their samples, then read by offset."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_croc.data.bad_samples import BadKind, BadSampleError
from megatron_croc.data.prepare.inputs.base import InputRecord
from megatron_croc.data.prepare.tar_scan import TarSample, TarScan, place_of_text, scan_tar
from megatron_croc.data.store.records import parse_text
from megatron_croc.data.store.shard_writer import TextFormat
from megatron_croc.data.store.storage import open_storage, retry
from megatron_croc.errors import DataError


@dataclass(frozen=True, kw_only=True)
class TarSlice:
    """Consecutive samples of several tars."""

    first: int
    samples: tuple[tuple[str, TextFormat, TarSample], ...]
    """(location of the tar, format of its texts, sample) of each record."""

    def read(self) -> Iterator[InputRecord]:
        """Yield the records."""
        location, storage = None, None
        for number, (tar, text_format, sample) in enumerate(self.samples, start=self.first):
            if storage is None or tar != location:
                location, storage = tar, open_storage(tar)

            def read(place: tuple[int, int], storage=storage, tar=tar) -> bytes:
                return retry(lambda: storage.read(*place), tar)

            record, fault = None, None
            try:
                if sample.fault is not None:
                    raise BadSampleError(f"record {number}", *sample.fault)
                if (place := place_of_text(sample, text_format)) is None:
                    raise BadSampleError(
                        f"record {number}", "missing_caption", f"{sample.key} has no {text_format}"
                    )
                record = {"id": sample.key, **parse_text(read(place), text_format)}
                # Images of the tar; a name in the JSON is that of the original file.
                record["image"] = [read(place) for _, place in sample.images]
            except BadSampleError as error:
                fault = error
            except ValueError as error:
                if isinstance(error, DataError):
                    raise
                fault = BadSampleError(f"record {number}", "record", f"{sample.key}: {error}")
            yield InputRecord(number=number, source=tar, record=record, fault=fault)


class TarInput:
    """One or several WebDataset tars, in the given order."""

    def __init__(self, locations: Sequence[str]) -> None:
        """Scan the tars. Raises DataError: a tar cannot be read."""
        digest = hashlib.sha256()
        self._samples: list[tuple[str, TextFormat, TarSample]] = []
        for location in locations:
            try:
                scan = scan_tar(open_storage(location))
            except OSError as error:
                raise DataError(f"input {location} cannot be read: {error}") from error
            digest.update(scan.sha256.encode())
            text_format: TextFormat = scan.text_format
            for sample in with_damage(scan):
                self._samples.append((location, text_format, sample))
        self.num_records = len(self._samples)
        self.digest = digest.hexdigest()

    def slice(self, begin: int, end: int) -> TarSlice:
        """Return the records begin .. end - 1."""
        return TarSlice(first=begin, samples=tuple(self._samples[begin:end]))


def with_damage(scan: TarScan) -> list[TarSample]:
    """Return the samples; for a damaged archive also one faulty sample for the lost rest."""
    if scan.damage is None:
        return scan.samples
    fault: tuple[BadKind, str] = ("damaged_tar", f"what follows is lost: {scan.damage}")
    return [*scan.samples, TarSample(key="rest of the archive", fault=fault)]
