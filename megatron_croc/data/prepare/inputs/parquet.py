"""Parquet files (needs the extra `parquet`); each file is read by its own columns."""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_croc.data.prepare.inputs.base import InputNote, InputRecord
from megatron_croc.data.prepare.inputs.text_files import folder_of
from megatron_croc.errors import DataError, first_line

ROWS_PER_READ = 64
"""Rows decoded at once: 64 MB with images of one megabyte."""


@dataclass(frozen=True, kw_only=True)
class ParquetSlice:
    """Consecutive rows of a file."""

    path: Path
    begin: int
    end: int

    def read(self) -> Iterator[InputRecord]:
        """Yield the records."""
        pyarrow = _import_pyarrow()
        file = _open(self.path)
        row = 0
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            if row + num_rows <= self.begin or row >= self.end:
                row += num_rows
                continue
            try:
                batches = file.iter_batches(ROWS_PER_READ, row_groups=[group])
                for record in itertools.chain.from_iterable(b.to_pylist() for b in batches):
                    if self.begin <= row < self.end:
                        yield InputRecord(
                            number=row,
                            source=self.path.name,
                            record=record,
                            folder=folder_of(self.path),
                        )
                    row += 1
            except (pyarrow.ArrowException, OSError) as error:
                raise DataError(
                    f"input {self.path}, row group {group}: {first_line(error)}; get the file again"
                ) from error


class ParquetInput:
    """One parquet file."""

    def __init__(self, path: Path) -> None:
        """Read the footer. Raises DataError: not parquet, or no pyarrow."""
        self._path = path
        self.notes: list[InputNote] = []
        self.num_records = _open(path).metadata.num_rows
        self.digest = hashlib.sha256(_footer(path)).hexdigest()

    def slice(self, begin: int, end: int) -> ParquetSlice:
        """Return the records begin .. end - 1."""
        return ParquetSlice(path=self._path, begin=begin, end=end)


def _open(path: Path) -> Any:
    pyarrow = _import_pyarrow()
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"input {path} is no readable parquet file: {first_line(error)}") from error


def _footer(path: Path) -> bytes:
    """Read size and footer of a file; the footer lists every page, so it identifies the content."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(size - 8)
        length = int.from_bytes(file.read(4), "little")
        file.seek(size - 8 - length)
        return size.to_bytes(8, "little") + file.read(length)


def _import_pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"parquet input needs pyarrow, which does not import ({error}): "
            "pip install -e '.[parquet]'"
        ) from error
    return pyarrow
