"""JSON and JSONL files, with names of images in a folder."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_croc.data.prepare.inputs.base import InputRecord, bad_record
from megatron_croc.data.store.records import parse_text
from megatron_croc.errors import DataError, first_line

STRIDE = 1024
"""Lines between two stored offsets: 8 MB of memory for a billion lines."""


@dataclass(frozen=True, kw_only=True)
class JsonSlice:
    """Consecutive records of a JSON list; holds the records."""

    source: str
    first: int
    records: list

    def read(self) -> Iterator[InputRecord]:
        """Yield the records."""
        for number, record in enumerate(self.records, start=self.first):
            yield InputRecord(number=number, source=self.source, record=record)


class JsonInput:
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
            raise DataError(f"input {path} must be a JSON list, got {type(records).__name__}")
        self._path, self._records = path, records
        self.num_records = len(records)
        self.digest = hashlib.sha256(content).hexdigest()

    def slice(self, begin: int, end: int) -> JsonSlice:
        """Return the records begin .. end - 1."""
        return JsonSlice(source=self._path.name, first=begin, records=self._records[begin:end])


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
            return InputRecord(number=number, source=source, record=parse_text(line, "json"))
        except ValueError as error:
            fault = bad_record(number, "record", str(error))
            return InputRecord(number=number, source=source, record=None, fault=fault)


class JsonlInput:
    """A file with one record per line, read once for digest and offsets. Ignores blank lines."""

    def __init__(self, path: Path) -> None:
        """Read the file once. Raises DataError: it cannot be read."""
        self._path = path
        self._offsets: list[int] = []
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
