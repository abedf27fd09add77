"""Parquet files that contain their images (needs the extra `parquet`).

Columns: conversations, messages, caption or text (records.py; conversations may be JSON text), and
image, images, jpg, png or webp: bytes, the hub's struct {bytes, path}, a name, or a list of these.
"""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_croc.data.prepare.inputs.base import InputRecord
from megatron_croc.data.store.records import CAPTION_KEYS
from megatron_croc.errors import DataError, first_line

IMAGE_COLUMNS = ("image", "images", "jpg", "png", "webp")
TEXT_COLUMNS = ("conversations", "messages", *CAPTION_KEYS, "txt", "json")
ROWS_PER_READ = 64
"""Rows decoded at once: 64 MB with images of one megabyte."""


@dataclass(frozen=True, kw_only=True)
class ParquetSlice:
    """Consecutive rows of several files."""

    files: tuple[tuple[Path, int, int, int], ...]
    """(file, number of its first row in the input, begin and end of its rows to read)."""

    columns: tuple[str, ...]

    def read(self) -> Iterator[InputRecord]:
        """Yield the records."""
        pyarrow = _import_pyarrow()
        for path, before, begin, end in self.files:
            file = _open(path)
            row = 0
            for group in range(file.num_row_groups):
                num_rows = file.metadata.row_group(group).num_rows
                if row + num_rows <= begin or row >= end:
                    row += num_rows
                    continue
                try:
                    batches = file.iter_batches(
                        ROWS_PER_READ, row_groups=[group], columns=list(self.columns)
                    )
                    for content in itertools.chain.from_iterable(b.to_pylist() for b in batches):
                        if begin <= row < end:
                            record = _as_record(content)
                            yield InputRecord(number=before + row, source=path.name, record=record)
                        row += 1
                except pyarrow.ArrowException as error:
                    raise DataError(
                        f"input {path}, row group {group}: {first_line(error)}; get the file again"
                    ) from error


class ParquetInput:
    """One or several parquet files, in the given order."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Read the footers. Raises DataError: not parquet, no text column, or no pyarrow."""
        digest, counts = hashlib.sha256(), []
        names: list[str] = []
        for path in paths:
            file = _open(path)
            counts.append(file.metadata.num_rows)
            names = list(file.schema_arrow.names)
            digest.update(_footer(path))
        self._paths = list(paths)
        self._starts = list(itertools.accumulate(counts, initial=0))
        self._columns = tuple(
            name for name in names if name in (*IMAGE_COLUMNS, *TEXT_COLUMNS, "id")
        )
        if not any(name in TEXT_COLUMNS for name in self._columns):
            raise DataError(
                f"input {paths[0]} has the columns {', '.join(names)}: one of "
                f"{', '.join(TEXT_COLUMNS)} is needed; rename the one that holds the text"
            )
        self.num_records = self._starts[-1]
        self.digest = digest.hexdigest()

    def slice(self, begin: int, end: int) -> ParquetSlice:
        """Return the records begin .. end - 1."""
        files = tuple(
            (path, start, max(begin - start, 0), min(end, stop) - start)
            for path, start, stop in zip(self._paths, self._starts, self._starts[1:], strict=False)
            if start < end and begin < stop
        )
        return ParquetSlice(files=files, columns=self._columns)


def _as_record(row: dict[str, Any]) -> dict[str, Any]:
    record = {key: value for key, value in row.items() if value is not None}
    for key in ("conversations", "messages"):
        if isinstance(text := record.get(key), str):
            # Invalid JSON stays text; the record is refused later, with its number.
            with contextlib.suppress(ValueError, RecursionError):
                record[key] = json.loads(text)
    if "txt" in record:
        record.setdefault("caption", record.pop("txt"))
    images: list[Any] = []
    for key in IMAGE_COLUMNS:
        value = record.pop(key, None)
        images += value if isinstance(value, list) else [] if value is None else [value]
    record["image"] = [_image(image) for image in images]
    return record


def _image(value: object) -> object:
    """Return the bytes of an image, else its name."""
    if isinstance(value, dict):
        return value.get("bytes") or value.get("path")
    return value


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
