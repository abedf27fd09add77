"""One clean loss curve in metrics.jsonl, however often a run was killed and resumed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_croc.atomic_files import write_atomically

METRICS_FILE = "metrics.jsonl"
SUPERSEDED_FILE = "metrics.superseded.jsonl"

_TIMED = ("per_second", "seconds", "per_device", "mfu", "_share", "timers")
"""Parts of the names of metrics that depend on the clock."""


def drop_undone_steps(folder: Path, iteration: int) -> int:
    """Move the lines of steps that were lost with a killed run out of the curve.

    A run that goes on from step `iteration` does the later ones again, and writes them again. What
    the killed run wrote about them (and a line it did not finish) goes to metrics.superseded.jsonl.

    Returns:
        lines moved.
    """
    path = folder / METRICS_FILE
    if not path.exists():
        return 0
    kept, moved = [], []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        (kept if _iteration_of(line) <= iteration else moved).append(line + "\n")
    if moved:
        with (folder / SUPERSEDED_FILE).open("a", encoding="utf-8") as file:
            file.writelines(moved)
        write_atomically(path, "".join(kept).encode())
    return len(moved)


def _iteration_of(line: str) -> float:
    """The step a line is about; beyond all steps, where it cannot be read."""
    try:
        return float(json.loads(line)["iteration"])
    except (KeyError, TypeError, ValueError):
        return float("inf")


def without_times(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a line of metrics.jsonl says that another run of the same steps must say too."""
    return {name: value for name, value in row.items() if not any(t in name for t in _TIMED)}
