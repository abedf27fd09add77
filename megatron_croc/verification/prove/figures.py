"""Figures for the cards, read from what the commands of a stage wrote.

A file that is not there (its command failed or was stopped) gives no figures.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_croc.file_reading import UnreadableError, read_json
from megatron_croc.verification.prove.stage import Figures


def of_attention(folder: Path) -> Figures:
    """E of each backend, forward with backward, under the mask `visual`."""
    return {
        f"E of {row['contender']} ({row['length']} tokens, {row['row']}, {row['heads']})": round(
            row["efficiency"], 3
        )
        for row in _rows(folder / "attention.json")
        if (row["mask"], row["direction"]) == ("visual", "forward+backward") and "efficiency" in row
    }


def of_matching(folder: Path) -> Figures:
    """Milliseconds an image, by distribution, batch and solver."""
    return {
        f"ms an image ({row['distribution']}, {row['shape']}, batch {row['batch']}, "
        f"{row['solver']}, {row['threads']} threads)": round(row["wall_ms_per_image"], 3)
        for row in _rows(folder / "assignment.json")
    }


def of_step(folder: Path) -> Figures:
    """Figures of each setting of the step that was tried."""
    found: Figures = {}
    for row in _rows(folder / "step.json"):
        if "reason" in row:
            found[f"does not run ({row['setting']})"] = row["reason"]
            continue
        where = f"({row['setting']}, {row['mask']})"
        found[f"s a step {where}"] = round(row["seconds"], 4)
        found[f"tokens/s {where}"] = round(row["tokens_per_second"])
        found[f"samples/s {where}"] = round(row["samples_per_second"], 2)
        if row["mfu"] is not None:
            found[f"MFU {where}"] = round(row["mfu"], 4)
        found[f"waiting for the matching, of a step {where}"] = round(row["matching_share"], 5)
        if row["peak_gib"] is not None:
            found[f"GiB at the peak {where}"] = round(row["peak_gib"], 1)
    return found


def of_beside_release(folder: Path) -> Figures:
    """Time of a step and peak memory, ours and the released code's."""
    found: Figures = {}
    comparisons = _content(folder / "step_beside_release.json").get("comparisons", {})
    for name, row in comparisons.items():
        found[f"time, ours / released ({name}, {row['clock']})"] = round(row["ratio"], 3)
        for who in ("ours", "released"):
            found[f"s a step ({name}, {who})"] = round(row[who][row["clock"]], 4)
            found[f"GiB at the peak ({name}, {who})"] = round(row[who]["peak_mib"] / 1024, 2)
    return found


def of_loader(folder: Path) -> Figures:
    """Images a second of wall time, and what a step waits."""
    ways = _content(folder / "data.json").get("ways", {})
    found = {}
    for name, way in ways.items():
        found[f"images/s ({name})"] = round(way["images_per_second"], 1)
        found[f"ms a step waits ({name})"] = round(way["wait_ms_mean"], 2)
    return found


def of_layouts(folder: Path) -> Figures:
    """Largest difference of each layout."""
    return {
        f"largest relative difference of a gradient ({row['layout']})": row["gradient"]
        for row in _content(folder / "layouts.json").get("layouts", [])
        if isinstance(row.get("gradient"), float)
    }


def of_costs(folder: Path) -> Figures:
    """Rates of matrix products, attention and memory, and the seconds of a launch."""
    table = _content(folder / "costs.json")
    rows = table.get("operations", {}).items()
    units = {"per_flop": ("TFLOP/s", 1e-12), "per_byte": ("TB/s", 1e-12)}
    found = {
        f"{units[key][0]} ({name})": round(units[key][1] / rate, 2)
        for name, row in rows
        for key, rate in row.items()
        if key in units and rate > 0
    }
    return found | ({"seconds of a launch": table["launch"]} if "launch" in table else {})


def of_golden(folder: Path) -> Figures:
    """Worst relative error over the cases."""
    worst = [
        float(number)
        for log in sorted(folder.glob("*.log"))
        for number in re.findall(r"worst relative error ([0-9.e+-]+) ", log.read_text())
    ]
    return {"worst relative error": max(worst)} if worst else {}


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    yield from _content(file).get("rows", [])


def _content(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except (OSError, UnreadableError):
        return {}
