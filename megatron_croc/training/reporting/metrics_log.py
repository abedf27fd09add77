"""Cleaning of metrics.jsonl on a resume: one line per step, also after a crash."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_croc.atomic_files import sync_directory, write_atomically
from megatron_croc.file_reading import UnreadableError, parse_json, read_json_lines

METRICS_FILE = "metrics.jsonl"
SUPERSEDED_FILE = "metrics.superseded.jsonl"

_TIMED = ("per_second", "seconds", "per_device", "mfu", "_share", "timers", "imbalance_seen")
"""Fragments of the names of metrics that depend on the clock."""


def drop_undone_steps(folder: Path, iteration: int) -> int:
    """Move the lines of steps that will be repeated out of metrics.jsonl.

    A run that resumes from step `iteration` repeats later steps and writes their lines again. Old
    lines of those steps, and an incomplete line, go to metrics.superseded.jsonl.

    Returns:
        number of lines moved.
    """
    path = folder / METRICS_FILE
    if not path.exists():
        return 0
    kept, moved = [], []
    text = path.read_text(encoding="utf-8", errors="replace")
    for line in text.splitlines():
        (kept if _iteration_of(line) <= iteration else moved).append(line + "\n")
    if moved:
        with (folder / SUPERSEDED_FILE).open("a", encoding="utf-8") as file:
            file.writelines(moved)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(folder)
    if moved or not text.endswith("\n"):  # a whole line without its end would swallow the next one
        write_atomically(path, "".join(kept).encode())
    return len(moved)


def _iteration_of(line: str) -> float:
    """Step of a line; infinity if the line cannot be read."""
    try:
        row = parse_json(line)
    except UnreadableError:
        return float("inf")
    return row["iteration"] if is_metric_row(row) else float("inf")


def is_metric_row(row: object) -> bool:
    """Return True for a line of metrics: an object of numbers with a whole iteration.

    Numbers may be nan, which other programs write.
    """
    return (
        isinstance(row, dict)
        and type(row.get("iteration")) is int
        and all(type(v) is float or (type(v) is int and 0 <= v < 2**63) for v in row.values())
    )


def read_metric_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield (number, row) of every line of a metrics file; None for a line that is no row.

    Raises:
        OSError: the file cannot be read.
    """
    for number, row in read_json_lines(path):
        yield number, row if is_metric_row(row) else None


def without_times(row: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a line of metrics.jsonl that are equal in every run of the same steps."""
    return {name: value for name, value in row.items() if not any(t in name for t in _TIMED)}
