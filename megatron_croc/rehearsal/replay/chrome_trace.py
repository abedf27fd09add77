"""The timeline as a file for chrome://tracing and ui.perfetto.dev (Trace Event Format).

One process for each simulated rank, one thread for kernels and one for each group; memory as a
counter. Times are microseconds from the begin of the step.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_croc.rehearsal.replay.simulation import COMPUTE
from megatron_croc.rehearsal.replay.timeline import Slice, Timeline


def write_chrome_trace(path: str | Path, timeline: Timeline) -> None:
    """Write the file; it opens in a browser without any upload."""
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        lines = (json.dumps(event) for event in trace_events(timeline))
        for number, line in enumerate(lines):
            file.write((",\n" if number else "") + line)
        file.write("\n]}\n")


def trace_events(timeline: Timeline) -> Iterator[dict[str, Any]]:
    """Events of the Trace Event Format."""
    threads: dict[tuple[int, str], int] = {}
    for rank in timeline.ranks:
        place = ", ".join(f"{axis} {value}" for axis, value in rank.coordinates.items())
        alike = f", stands for {rank.stands_for}" if rank.stands_for > 1 else ""
        name = f"rank {rank.rank} ({place}{alike})"
        yield _metadata("process_name", rank.rank, 0, name=name)
        yield _metadata("process_sort_index", rank.rank, 0, sort_index=rank.rank)
        for lane in (COMPUTE, *_lanes(timeline, rank.rank)):
            thread = threads[rank.rank, lane] = sum(key[0] == rank.rank for key in threads)
            yield _metadata("thread_name", rank.rank, thread, name=lane)
    for piece in timeline.slices:
        thread = threads[piece.rank, piece.label.lane]
        if piece.begin > piece.ready and not piece.is_compute:
            yield _complete(f"waits: {piece.label.name}", piece, thread, piece.ready, piece.begin)
        yield _complete(_name(piece), piece, thread, piece.begin, piece.end)
    for sample in timeline.memory:
        yield {
            "ph": "C",
            "name": "memory (GiB)",
            "pid": sample.rank,
            "ts": sample.time * 1e6,
            "args": {"allocated": round(sample.allocated / 2**30, 4)},
        }


def _lanes(timeline: Timeline, rank: int) -> list[str]:
    lanes = {piece.label.lane for piece in timeline.slices if piece.rank == rank}
    return sorted(lanes - {COMPUTE})


def _name(piece: Slice) -> str:
    label = piece.label
    if not piece.is_compute or label.micro_batch is None:
        return label.name or label.phase or "compute"
    return f"{label.direction} {label.micro_batch}: {label.name}"


def _complete(name: str, piece: Slice, thread: int, begin: float, end: float) -> dict[str, Any]:
    label = piece.label
    about = {
        "place": label.place,
        "phase": label.phase,
        "micro-batch": label.micro_batch,
        "direction": label.direction,
        "chunk": label.chunk,
    }
    return {
        "ph": "X",
        "name": name,
        "cat": label.lane,
        "pid": piece.rank,
        "tid": thread,
        "ts": begin * 1e6,
        "dur": (end - begin) * 1e6,
        "args": {key: value for key, value in about.items() if value not in ("", None)},
    }


def _metadata(kind: str, rank: int, thread: int, **values: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": rank, "tid": thread, "args": values}
