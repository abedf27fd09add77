"""JSON, JSONL and CSV files, with names of images in a folder."""

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_croc.data.prepare.inputs.base import InputNote, InputRecord, bad_record
from megatron_croc.data.records.reading import parse_text
from megatron_croc.errors import DataError, first_line

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Files that describe the images beside them and below (an image folder of `datasets`)."""

STRIDE = 1024
"""Lines between two stored offsets: 8 MB of memory for a billion lines."""


@dataclass(frozen=True, kw_only=True)
class JsonSlice:
    """Consecutive records of a JSON list or a CSV table; holds the records."""

    source: str
    first: int
    records: Sequence[object]
    folder: Path | None = None

    def read(self) -> Iterator[InputRecord]:
        """Yield the records."""
        for number, record in enumerate(self.records, start=self.first):
            yield InputRecord(number=number, source=self.source, record=record, folder=self.folder)


class _LoadedInput:
    """Records of a file that is loaded completely."""

    def __init__(self, path: Path, content: bytes, records: Sequence[object]) -> None:
        """Args: path: the file; content: its bytes; records: in order."""
        self._path, self._records = path, records
        self.notes: list[InputNote] = []
        self.num_records = len(records)
        self.digest = hashlib.sha256(content).hexdigest()

    def slice(self, begin: int, end: int) -> JsonSlice:
        """Return the records begin .. end - 1."""
        return JsonSlice(
            source=self._path.name,
            first=begin,
            records=self._records[begin:end],
            folder=folder_of(self._path),
        )


class JsonInput(_LoadedInput):
    """A JSON list, loaded completely."""

    def __init__(self, path: Path) -> None:
        """Load the file. Raises DataError: not a valid JSON list."""
        try:
            content = path.read_bytes()
            records = json.loads(content)
        except OSError as error:
            raise DataError(f"input {path} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"input {path} is not valid JSON: {first_line(error)} (one record per line is "
                "JSONL: name it .jsonl, or give the format)"
            ) from error
        if not isinstance(records, list):
            raise DataError(
                f"input {path} must be a JSON list, got {type(records).__name__}"
                f"{_lists_of(records)}"
            )
        super().__init__(path, content, records)


def _lists_of(content: object) -> str:
    """Name the lists inside an object, one of which may be the records."""
    if not isinstance(content, dict):
        return ""
    lists = [key for key, value in content.items() if isinstance(value, list)]
    return f": it holds {', '.join(lists)}; write the list of records alone" if lists else ""


class CsvInput(_LoadedInput):
    """A CSV table with a line of names at its top, loaded completely."""

    def __init__(self, path: Path) -> None:
        """Load the file. Raises DataError: it cannot be read, or is no table in UTF-8."""
        try:
            content = path.read_bytes()
            csv.field_size_limit(1 << 30)
            reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
            records = [dict(row) for row in reader]
        except OSError as error:
            raise DataError(f"input {path} cannot be read: {error.strerror}") from error
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"input {path} is no CSV in UTF-8: {first_line(error)}") from error
        for number, row in enumerate(records):
            if None in row:
                raise DataError(
                    f"input {path}, record {number} has more values than there are names: put "
                    "texts with commas in quotes"
                )
        super().__init__(path, content, records)


def folder_of(path: Path) -> Path | None:
    """Return the folder of the images that a metadata file describes; None for other files."""
    is_metadata = path.name in METADATA_NAMES or path.name == "metadata.json"
    return path.parent if is_metadata else None


@dataclass(frozen=True, kw_only=True)
class JsonlSlice:
    """Consecutive lines of a JSONL file."""

    path: Path
    offset: int
    """Byte offset of line `offset_line`."""

    offset_line: int
    begin: int
    end: int

    def read(self) -> Iterator[InputRecord]:
        """Yield the records."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            number = self.offset_line
            for line in file:
                if not line.strip():
                    continue
                if number >= self.end:
                    return
                if number >= self.begin:
                    yield self._parse(number, line)
                number += 1

    def _parse(self, number: int, line: bytes) -> InputRecord:
        source = self.path.name
        try:
            record = parse_text(line, "json")
            folder = folder_of(self.path)
            return InputRecord(number=number, source=source, record=record, folder=folder)
        except ValueError as error:
            fault = bad_record(number, "record", str(error))
            return InputRecord(number=number, source=source, record=None, fault=fault)


class JsonlInput:
    """A file with one record per line, read once for digest and offsets. Ignores blank lines."""

    def __init__(self, path: Path) -> None:
        """Read the file once. Raises DataError: it cannot be read."""
        self._path = path
        self._offsets: list[int] = []
        self.notes: list[InputNote] = []
        digest, offset, self.num_records = hashlib.sha256(), 0, 0
        try:
            with open(path, "rb") as file:
                for line in file:
                    digest.update(line)
                    if line.strip():
                        if self.num_records % STRIDE == 0:
                            self._offsets.append(offset)
                        self.num_records += 1
                    offset += len(line)
                    if line.startswith((b"\xff\xfe", b"\xfe\xff")) and offset == len(line):
                        raise DataError(f"input {path} is UTF-16: save it as UTF-8")
        except OSError as error:
            raise DataError(f"input {path} cannot be read: {error.strerror}") from error
        self.digest = digest.hexdigest()

    def slice(self, begin: int, end: int) -> JsonlSlice:
        """Return the records begin .. end - 1."""
        stride = begin // STRIDE
        return JsonlSlice(
            path=self._path,
            offset=self._offsets[stride],
            offset_line=stride * STRIDE,
            begin=begin,
            end=end,
        )
