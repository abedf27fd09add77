"""Interface of an input."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from megatron_croc.data.bad_samples import BadSampleError

InputFormat = Literal["json", "jsonl", "csv", "parquet", "webdataset"]


class InputNote(NamedTuple):
    """Line of the report about an input as a whole."""

    text: str
    example: str


@dataclass(frozen=True, kw_only=True)
class InputRecord:
    """One record of an input."""

    number: int
    """Number of the record in the input, from 0."""

    source: str
    """File of the record."""

    record: object
    """A dict in a form of data/records."""

    fault: BadSampleError | None = None
    """Fault of an unreadable record, whose `record` is then undefined; None: no fault."""

    members: list[tuple[str, bytes]] = field(default_factory=list)
    """(name, bytes) of the images beside the record in a tar, in its order."""

    other_members: list[str] = field(default_factory=list)
    """Names of the members beside them that are not read."""

    folder: Path | None = None
    """Folder of the images of an image folder's metadata; None: only --image-folder says it."""


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

    notes: list[InputNote]
    """Files that were left out or joined."""

    def slice(self, begin: int, end: int) -> InputSlice:
        """Return the records begin .. end - 1."""
        ...


def bad_record(number: int, kind: str, reason: str) -> BadSampleError:
    """Build the error of one record."""
    return BadSampleError(f"record {number}", kind, reason)  # pyright: ignore[reportArgumentType]
