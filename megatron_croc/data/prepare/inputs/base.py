"""Interface of an input."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from megatron_croc.data.bad_samples import BadSampleError

InputFormat = Literal["json", "jsonl", "parquet", "webdataset"]


@dataclass(frozen=True, kw_only=True)
class InputRecord:
    """One record of an input."""

    number: int
    """Number of the record in the input, from 0."""

    source: str
    """File of the record."""

    record: object
    """A dict as in records.py; "image" is a name, encoded bytes, or a list of these."""

    fault: BadSampleError | None = None
    """Fault of an unreadable record, whose `record` is then undefined; None: no fault."""


class InputSlice(Protocol):
    """Consecutive records; its pickle is small, and the process that unpickles it reads them."""

    def read(self) -> Iterator[InputRecord]:
        """Yield the records. Raises DataError if the input is damaged, and OSError."""
        ...


class RecordInput(Protocol):
    """An input with a known number of records."""

    num_records: int

    digest: str
    """Hex sha256 that identifies the content of the input."""

    def slice(self, begin: int, end: int) -> InputSlice:
        """Return the records begin .. end - 1."""
        ...


def bad_record(number: int, kind: str, reason: str) -> BadSampleError:
    """Build the error of one record."""
    return BadSampleError(f"record {number}", kind, reason)  # pyright: ignore[reportArgumentType]
