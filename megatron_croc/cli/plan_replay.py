"""`croc plan --replay`: its options, the replay of the best layouts, and their table."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_croc.errors import ConfigError
from megatron_croc.planning.fit import GIB
from megatron_croc.planning.gpus import Gpu
from megatron_croc.planning.search import Candidate
from megatron_croc.planning.workload import Workload

if TYPE_CHECKING:
    from megatron_croc.rehearsal.settle import Settled

_PARTS = ("compute", "bubble", "traffic", "waits", "host")
"""Columns of the table: parts of a replayed step."""


def add_replay_options(parser: argparse.ArgumentParser) -> None:
    """Add --jobs, --time-limit and --costs; `croc rehearse` has the same."""
    add = parser.add_argument
    add("--jobs", type=int, help="with --replay: processes at once (default: one a core)")
    add("--time-limit", type=float, default=30.0, help="with --replay: minutes (default 30)")
    add("--costs", type=Path, metavar="TABLE.json", help="with --replay: measured costs")


def replayed(
    options: argparse.Namespace, candidates: Sequence[Candidate], gpu: Gpu, workload: Workload
) -> "list[Settled]":
    """Rehearse and replay the layouts, with lines of progress on stderr; the fastest first.

    Raises:
        ConfigError: an option out of range, or a setting that cannot be rehearsed.
        DataError: --costs is no table of costs.
    """
    # Slow to import: only where layouts are replayed.
    from megatron_croc.rehearsal.replay.costs import read_costs
    from megatron_croc.rehearsal.run import children_at_once
    from megatron_croc.rehearsal.settle import settle

    if options.jobs is not None and options.jobs < 1:
        raise ConfigError(f"--jobs {options.jobs}: must be 1 or more")
    if options.time_limit <= 0:
        raise ConfigError(f"--time-limit {options.time_limit:g}: must be above 0")
    if options.costs is not None:
        read_costs(options.costs)
    return settle(
        candidates,
        options.gpus,
        gpu,
        workload,
        costs=options.costs,
        at_once=children_at_once(options.jobs),
        time_limit=60.0 * options.time_limit,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )


def replay_lines(settled: "Sequence[Settled]") -> Iterator[str]:
    """The table, the fastest first, and a line for each layout without a time."""
    timed = [entry for entry in settled if entry.seconds is not None]
    yield f"| layout | replay s/step | formula s/step | {' | '.join(_PARTS)} | GiB on a GPU |"
    yield "|---" * (4 + len(_PARTS)) + "|"
    for entry in timed:
        parts = " | ".join(f"{entry.parts[name]:.3f}" for name in _PARTS)
        fit = entry.candidate.fit
        yield (
            f"| {entry.candidate.name} | {entry.seconds:.3f} | {entry.candidate.time.total:.3f} | "
            f"{parts} | {fit.tensors / GIB:.1f} |"
        )
    yield f"\nreplay: {timed[0].source}"
    for entry in settled:
        if entry.seconds is None:
            word = "dropped" if entry.is_faulty else "not replayed"
            yield f"{word}: {entry.candidate.name}: {entry.reason}"


def replay_as_dict(entry: "Settled") -> dict[str, Any]:
    """One replay for JSON; seconds."""
    return {
        "seconds": entry.seconds,
        "parts": entry.parts,
        "costs": entry.source,
        "reason": entry.reason,
        "is_faulty": entry.is_faulty,
    }
