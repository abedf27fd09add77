"""WebDataset tars: scanned once for their samples, then read by offset."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_croc.data.bad_samples import BadKind, BadSampleError
from megatron_croc.data.prepare.inputs.base import InputNote, InputRecord
from megatron_croc.data.prepare.inputs.compressed import open_tar
from megatron_croc.data.prepare.tar_scan import Place, TarSample, TarScan, scan_tar
from megatron_croc.data.records.reading import join_texts
from megatron_croc.data.store.storage import retry
from megatron_croc.errors import DataError


@dataclass(frozen=True, kw_only=True)
class TarSlice:
    """Consecutive samples of one tar."""

    location: str
    first: int
    samples: tuple[TarSample, ...]

    def read(self) -> Iterator[InputRecord]:
        """Yield the records."""
        storage = open_tar(self.location)

        def read(place: Place) -> bytes:
            return retry(lambda: storage.read(*place), self.location)

        for number, sample in enumerate(self.samples, start=self.first):
            record, images, fault = None, [], None
            try:
                if sample.fault is not None:
                    raise BadSampleError(f"record {number}", *sample.fault)
                texts = [read(sample.texts[k]) if k in sample.texts else None for k in _TEXTS]
                if texts == [None, None]:
                    raise BadSampleError(f"record {number}", *no_text(sample))
                record = {"id": sample.key, **join_texts(*texts)[0]}
                images = [(name, read(place)) for name, place in sample.images]
            except BadSampleError as error:
                fault = error
            except ValueError as error:
                if isinstance(error, DataError):
                    raise
                fault = BadSampleError(f"record {number}", "record", f"{sample.key}: {error}")
            yield InputRecord(
                number=number,
                source=self.location,
                record=record,
                fault=fault,
                members=images,
                other_members=sample.others,
            )


class TarInput:
    """One WebDataset tar, local, compressed or s3://."""

    def __init__(self, location: str) -> None:
        """Scan the tar. Raises DataError: it cannot be read."""
        try:
            scan = scan_tar(open_tar(location))
        except OSError as error:
            raise DataError(f"input {location} cannot be read: {error}") from error
        self._location = location
        self._samples = with_damage(scan)
        self.num_records = len(self._samples)
        self.digest = scan.sha256
        self.notes: list[InputNote] = notes_of(scan, location)

    def slice(self, begin: int, end: int) -> TarSlice:
        """Return the records begin .. end - 1."""
        samples = tuple(self._samples[begin:end])
        return TarSlice(location=self._location, first=begin, samples=samples)


_TEXTS = ("json", "txt")


def no_text(sample: TarSample) -> tuple[BadKind, str]:
    """Return the fault of a sample without a text."""
    members = [*sample.image_names, *sample.others]
    reason = f"{sample.key!r:.80} has no .json and no .txt"
    if members:
        reason += f", only {', '.join(members)!s:.80}: store its text under one of these suffixes"
    return "missing_caption", reason


def with_damage(scan: TarScan) -> list[TarSample]:
    """Return the samples; for a damaged archive also one faulty sample for the lost rest."""
    if scan.damage is None:
        return scan.samples
    fault: tuple[BadKind, str] = ("damaged_tar", f"what follows is lost: {scan.damage}")
    return [*scan.samples, TarSample(key="rest of the archive", fault=fault)]


def notes_of(scan: TarScan, location: str) -> list[InputNote]:
    """Return what the report says about a tar as a whole."""
    if not scan.num_joined:
        return []
    return [InputNote("tars laid end to end: what follows an end mark is read too", location)]
