"""The interface of an input."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from megatron_croc.data.bad_samples import BadSampleError

InputFormat = Literal["json", "jsonl", "parquet", "webdataset"]


@dataclass(frozen=True, kw_only=True)
class InputRecord:
    """One record as found."""

    number: int
    """Place in the input, from 0."""

    source: str
    """File it came from."""

    record: object
    """A dict as in records.py; "image" is a name, encoded bytes, or a list of either."""

    fault: BadSampleError | None = None
    """Why it could not be read; then `record` means nothing."""


class InputSlice(Protocol):
    """Some neighbouring records; pickles small, and reads them where it is unpickled."""

    def read(self) -> Iterator[InputRecord]:
        """The records. Raises DataError when the input itself is damaged, OSError."""
        ...


class RecordInput(Protocol):
    """An input whose records are counted."""

    num_records: int

    digest: str
    """Changes when the input does; sha256, hex."""

    def slice(self, begin: int, end: int) -> InputSlice:
        """Records begin .. end - 1."""
        ...


def bad_record(number: int, kind: str, reason: str) -> BadSampleError:
    """The fault of one record."""
    return BadSampleError(f"record {number}", kind, reason)  # pyright: ignore[reportArgumentType]
