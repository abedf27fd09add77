"""Files that training writes about itself: metrics, checkpoints, heartbeats, stragglers.

RUN_DIR/metrics.jsonl                          needed; a line still being written is left out
RUN_DIR/stragglers.jsonl                       with timing_log_level 1 and several ranks
RUN_DIR/heartbeats/rank_00000.json             the phase of each rank, where heartbeats are on
RUN_DIR/iter_0000100/, latest_checkpointed_iteration.txt
"""

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_croc.errors import DataError
from megatron_croc.file_reading import read_json_lines, whole_number
from megatron_croc.training.safety.heartbeat import read_beat

METRICS_FILE = "metrics.jsonl"
SHARE = "time_share/"
RECENT = 5
"""Number of last rows that count as recent."""

Row = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Beat:
    """Heartbeat of one rank."""

    rank: int
    host: str
    iteration: int
    phase: str
    age: float
    """Seconds since that phase began."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint."""

    iteration: int
    age: float
    """Seconds since it was written."""


@dataclass(frozen=True, kw_only=True)
class RunView:
    """State of one run, read from its folder."""

    name: str
    folder: Path
    train: list[Row] = field(repr=False)
    """Rows with a training loss, by iteration."""

    valid: list[Row] = field(repr=False)
    """Rows of validations, by iteration."""

    train_iters: int | None
    """Steps of the whole run, where the rows say so."""

    silence: float
    """Seconds since the last line."""

    checkpoint: Checkpoint | None
    """The latest."""

    checkpoints: list[int] = field(default_factory=list)
    """Iterations of all that are there."""

    beats: list[Beat] = field(default_factory=list)
    """By rank; empty where no rank writes them."""

    stragglers: list[dict[str, Any]] = field(default_factory=list, repr=False)
    """Lines of stragglers.jsonl."""

    @property
    def iteration(self) -> int:
        """Last step with a line; 0 before the first."""
        return int(max((row["iteration"] for row in [*self.train, *self.valid]), default=0))

    @property
    def is_done(self) -> bool:
        """True when the last step is done."""
        return self.train_iters is not None and self.iteration >= self.train_iters

    @property
    def skipped_steps(self) -> int:
        """Number of skipped steps."""
        return int(sum(row.get("skipped_steps", 0) for row in self.train))

    @property
    def seconds_per_step(self) -> float | None:
        """Mean over the recent rows; with `interval_seconds` it includes checkpoints."""
        spans: list[float] = []
        for before, row in zip([None, *self.train], self.train, strict=False):
            steps = row["iteration"] - (before["iteration"] if before else 0)
            if "interval_seconds" in row and steps > 0:
                spans.append(row["interval_seconds"] / steps)
            elif "seconds_per_step" in row:
                spans.append(row["seconds_per_step"])
        return statistics.fmean(spans[-RECENT:]) if spans else None

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the last step, at the recent pace."""
        pace = self.seconds_per_step
        if self.train_iters is None or pace is None:
            return None
        return pace * max(0, self.train_iters - self.iteration)

    @property
    def stale_ranks(self) -> list[Beat]:
        """Ranks that have been in one phase for longer than five steps and one minute."""
        if self.is_done:
            return []
        patience = max(60.0, 5 * (self.seconds_per_step or 0.0))
        return [beat for beat in self.beats if beat.age > patience]

    def series(self, name: str) -> list[tuple[float, float]]:
        """(iteration, value) of a column, from training and validation rows alike."""
        return [(row["iteration"], row[name]) for row in [*self.train, *self.valid] if name in row]

    def recent(self, name: str) -> float | None:
        """Median of a column over the last rows that have it."""
        values = [row[name] for row in self.train if name in row][-RECENT:]
        return statistics.median(values) if values else None

    def time_shares(self) -> dict[str, float]:
        """Region -> share of the last interval's time, mean over ranks; empty if not measured."""
        last = next((row for row in reversed(self.train) if SHARE + "forward" in row), {})
        return {n.removeprefix(SHARE): v for n, v in last.items() if n.startswith(SHARE)}


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """Folders with metrics: those given, or the folders of stages inside them.

    Raises:
        DataError: there are none in a folder.
    """
    found: list[Path] = []
    for folder in folders:
        inside = sorted(
            path.parent for path in folder.glob(f"*/{METRICS_FILE}") if path.parent.is_dir()
        )
        if (folder / METRICS_FILE).is_file():
            found.append(folder)
        elif inside:
            found += sorted(inside, key=lambda path: (path / METRICS_FILE).stat().st_mtime)
        else:
            raise DataError(
                f"{folder}: no {METRICS_FILE} here or one folder below; give the --log-dir (or "
                "--save) folder of a run that has written a line"
            )
    return found


def read_run(folder: Path, *, now: float | None = None) -> RunView:
    """Read the state of a run from its folder.

    Args:
        folder: has metrics.jsonl.
        now: seconds since 1970; None: the clock's.

    Raises:
        DataError: metrics.jsonl is not what training writes; names file and line.
    """
    now = time.time() if now is None else now
    path = folder / METRICS_FILE
    rows = read_lines(path)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get("iteration"), int):
            raise DataError(f"{path}, line {number}: has no iteration; training did not write it")
    train = _latest([row for row in rows if "loss" in row])
    valid = _latest([row for row in rows if "valid_loss" in row])
    steps = next((row["train_iters"] for row in reversed(train) if "train_iters" in row), None)
    checkpoints = sorted(
        int(found.name.removeprefix("iter_"))
        for found in folder.glob("iter_*")
        if whole_number(found.name.removeprefix("iter_")) is not None
    )
    return RunView(
        name=folder.resolve().name,
        folder=folder,
        train=train,
        valid=valid,
        train_iters=None if steps is None else int(steps),
        silence=max(0.0, now - path.stat().st_mtime),
        checkpoint=_latest_checkpoint(folder, now),
        checkpoints=checkpoints,
        beats=_read_beats(folder / "heartbeats", now),
        stragglers=read_lines(folder / "stragglers.jsonl"),
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A JSON object a line; none without the file. The last line may be cut off: it is left out.

    Raises:
        DataError: another line is not a JSON object.
    """
    if not path.is_file():
        return []
    lines = list(read_json_lines(path))
    for number, row in lines[:-1]:
        if row is None:
            raise DataError(f"{path}, line {number}: not a JSON object; remove the line")
    return [row for _, row in lines if row is not None]


def _latest(rows: Sequence[Row]) -> list[Row]:
    """Rows by iteration; of a step that was repeated after a crash, the later row."""
    return [row for _, row in sorted({row["iteration"]: row for row in rows}.items())]


def _latest_checkpoint(folder: Path, now: float) -> Checkpoint | None:
    tracker = folder / "latest_checkpointed_iteration.txt"
    try:
        iteration = int(tracker.read_text())
        return Checkpoint(iteration=iteration, age=max(0.0, now - tracker.stat().st_mtime))
    except (OSError, ValueError):
        return None


def _phase(beat: dict[str, Any]) -> str:
    """Text such as "summing gradients (reduce-scatter)"."""
    collective = beat.get("collective")
    return str(beat["phase"]) + (f" ({collective})" if collective else "")


def _read_beats(folder: Path, now: float) -> list[Beat]:
    """Heartbeats by rank; a torn file counts as none."""
    beats: list[Beat] = []
    for path in sorted(folder.glob("rank_*.json")):
        if (beat := read_beat(path)) is not None:
            collective = f" ({beat.collective})" if beat.collective else ""
            beats.append(
                Beat(
                    rank=beat.rank,
                    host=beat.host,
                    iteration=beat.iteration,
                    phase=beat.phase + collective,
                    age=max(0.0, now - beat.since),
                )
            )
    return beats
