"""Measured times of the attention backends of this machine's GPU, from which `auto` chooses.

`benchmarks/attention.py --keep-for-auto`, which `croc prove` runs on a GPU, writes them to
`attention-GPU.json` in the cache folder of the package. Without that file, or for a head dim that
it lacks, backends are unmeasured and `auto` keeps its order.
"""

import functools
import json
import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_croc.errors import first_line
from megatron_croc.file_reading import UnreadableError, is_number, read_json
from megatron_croc.log import get_logger, log_once
from megatron_croc.native_code import cache_folder

_logger = get_logger(__name__)

MOST_ERROR = 3.0
"""Largest error against float64, as a multiple of causal flash's, of a backend that `auto` takes.

A kernel that computes another mask is off by orders of magnitude."""


class Choice(NamedTuple):
    """Backend that `auto` takes, and the reason for the log."""

    name: str
    reason: str


def table_file(device: str) -> Path:
    """File of the times on a GPU of this name."""
    return cache_folder() / f"attention-{re.sub(r'[^A-Za-z0-9]+', '-', device)}.json"


def write_table(device: str, head_dim: int, rows: Sequence[dict[str, Any]]) -> Path:
    """Keep the times of a benchmark, for one head dim; those of others stay.

    Args:
        device: name of the GPU.
        head_dim: of the measured tensors.
        rows: of benchmarks/attention.py; those with `milliseconds` of forward with backward count,
            of contenders whose error was measured and is small.
    """
    errors: dict[str, float] = {}
    for row in rows:
        if "relative_error" in row:
            known = errors.get(row["contender"], 0.0)
            errors[row["contender"]] = max(known, row["relative_error"])
    file = table_file(device)
    kept = {key: value for key, value in _read(file).items() if key != str(head_dim)}
    kept[str(head_dim)] = [
        {key: row[key] for key in ("contender", "mask", "row", "heads", "length", "milliseconds")}
        for row in rows
        if row["direction"] == "forward+backward"
        and "milliseconds" in row
        and errors.get(row["contender"], math.inf) <= MOST_ERROR
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(kept, indent=1) + "\n")
    partial.replace(file)
    _table.cache_clear()
    choose.cache_clear()
    return file


@functools.lru_cache(maxsize=256)
def choose(names: tuple[str, ...], device: str, head_dim: int, length: int) -> Choice:
    """Fastest of `names` at the measured length nearest to `length`; the first if unmeasured.

    Args:
        names: backends that can run, in the order of `auto`.
        device: name of the GPU.
        head_dim: of the tensors.
        length: positions of the pack.
    """
    times = _table(device).get(head_dim, {})
    if not times:
        return Choice(names[0], "the first that can run; unmeasured on this GPU")
    nearest = min(times, key=lambda other: abs(math.log(other / max(length, 1))))
    measured = {name: ms for name, ms in times[nearest].items() if name in names}
    if not measured:
        return Choice(names[0], f"the first that can run; unmeasured at {nearest} positions")
    best = min(measured, key=lambda name: measured[name])
    others = ", ".join(f"{name} {ms:.2f}" for name, ms in measured.items() if name != best)
    unmeasured = ", ".join(name for name in names if name not in measured)
    reason = f"{measured[best]:.2f} ms at {nearest} positions, measured"
    reason += f" beside {others}" if others else ""
    return Choice(best, reason + (f"; unmeasured: {unmeasured}" if unmeasured else ""))


@functools.cache
def _table(device: str) -> dict[int, dict[int, dict[str, float]]]:
    """Mean milliseconds by head dim, length and backend, over the cases that all have."""
    found: dict[int, dict[int, dict[str, float]]] = {}
    for head_dim, rows in _read(table_file(device)).items():
        cases: dict[int, dict[str, dict[Any, float]]] = {}
        for row in rows:
            of_length = cases.setdefault(row["length"], {})
            case = row["mask"], row["row"], row["heads"]
            of_length.setdefault(row["contender"], {})[case] = row["milliseconds"]
        found[int(head_dim)] = {length: _means(times) for length, times in cases.items()}
    return found


def _means(times: dict[str, dict[Any, float]]) -> dict[str, float]:
    most = max(len(cases) for cases in times.values())
    complete = {name: cases for name, cases in times.items() if len(cases) == most}
    return {name: sum(cases.values()) / most for name, cases in complete.items()}


def _read(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows by head dim; none, with a warning, if the file is not one that `write_table` wrote."""
    if not file.exists():
        return {}
    try:
        found = read_json(file)
        is_table = all(
            key.isdecimal() and isinstance(rows, list) and all(map(_is_row, rows))
            for key, rows in found.items()
        )
    except (UnreadableError, OSError) as error:
        text = "attention times are not used: %s: %s"
        log_once(_logger, logging.WARNING, text, file, first_line(error))
        return {}
    if not is_table:
        log_once(_logger, logging.WARNING, "attention times are not used: %s is not a table", file)
        return {}
    return found


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and all(isinstance(row.get(key), str) for key in ("contender", "mask", "row", "heads"))
        and all(is_number(row.get(key)) and row[key] > 0 for key in ("length", "milliseconds"))
    )
