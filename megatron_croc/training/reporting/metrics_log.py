"""Cleaning of metrics.jsonl on a resume: one line per step, also after a crash."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_croc.atomic_files import sync_directory, write_atomically

METRICS_FILE = "metrics.jsonl"
SUPERSEDED_FILE = "metrics.superseded.jsonl"

_TIMED = ("per_second", "seconds", "per_device", "mfu", "_share", "timers")
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
        return float(json.loads(line)["iteration"])
    except (KeyError, TypeError, ValueError):
        return float("inf")


def without_times(row: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a line of metrics.jsonl that are equal in every run of the same steps."""
    return {name: value for name, value in row.items() if not any(t in name for t in _TIMED)}
