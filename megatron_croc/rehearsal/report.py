"""The report of a rehearsal in the terminal, and as JSON."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from megatron_croc.planning.fit import GIB
from megatron_croc.rehearsal.findings import PHASES, Findings, first_of_each_stage, grouped
from megatron_croc.rehearsal.run import Rehearsal
from megatron_croc.rehearsal.versions import installed_versions

MOST_LINES = 12
"""Lines of a list of places; the JSON holds all."""


def lines(rehearsal: Rehearsal, findings: Findings) -> Iterator[str]:
    """The report, line by line; ends with the faults or with the word that there are none."""
    if findings.classes:
        yield from _memory(findings)
        yield from _parts(findings)
        yield from _flops(findings)
        yield from _traffic(findings)
        yield from _places(findings)
    if findings.timeline is not None:
        yield ""
        yield from findings.timeline.lines()
        if rehearsal.rows.kind == "data" and rehearsal.outcomes[0].result.get("loads") is None:
            yield "  replicas count as equal: the data has no stored lengths (croc data lengths)"
    yield ""
    cpu = sum(entry.cpu_seconds for entry in findings.classes)
    hosts = max((entry.host_bytes for entry in findings.classes), default=0)
    yield (
        f"{len(rehearsal.outcomes)} classes for {rehearsal.world_size} GPUs in "
        f"{rehearsal.seconds:.0f} s ({cpu:.0f} s of CPU), {hosts / GIB:.1f} GiB each at most"
    )
    if rehearsal.forward_only:
        yield (
            "forward passes only, no backward pass, update or saving: "
            f"{rehearsal.forward_only}; install one, or set CXX"
        )
    for fault in findings.faults:
        way_out = f"; {fault.way_out}" if fault.way_out else ""
        yield f"fault: {fault.ranks}: {fault.text}{way_out}"
    if not findings.faults:
        yield "no fault found"


def _table(title: str, rows: list[list[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    yield f"\n{title}"
    for row in rows:
        first, *rest = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        yield "  " + "  ".join(cells).rstrip()


def _unit(findings: Findings) -> tuple[str, float]:
    """GiB, or MiB for small models."""
    highest = max(entry.highest[1] for entry in findings.classes)
    return ("GiB", GIB) if highest > GIB / 2 else ("MiB", 2.0**20)


def _memory(findings: Findings) -> Iterator[str]:
    unit, size = _unit(findings)
    head = ["class", "ranks", *PHASES.values(), "croc check", "off by", "seconds"]
    rows = [head]
    for entry in findings.classes:
        peaks = [f"{entry.peaks[p] / size:.2f}" if p in entry.peaks else "-" for p in PHASES]
        rows.append(
            [
                *(entry.name, str(entry.num_ranks), *peaks, f"{entry.estimate.total / size:.2f}"),
                *(entry.error_text, f"{entry.seconds:.0f}"),
            ]
        )
    yield from _table(f"highest memory of one rank ({unit})", rows)


def _parts(findings: Findings) -> Iterator[str]:
    unit, size = _unit(findings)
    stages = first_of_each_stage(findings)
    by_class = [grouped(entry.parts) for entry in stages]
    names = Counter[str]()
    for parts in by_class:
        names.update(parts)
    shown = [name for name, total in names.most_common() if total > 0.002 * names.total()]
    rows = [["class", *shown, "rest"]]
    for entry, parts in zip(stages, by_class, strict=True):
        parts["rest"] = sum(held for name, held in parts.items() if name not in shown)
        held = (f"{parts.get(name, 0) / size:.2f}" for name in (*shown, "rest"))
        rows.append([entry.name, *held])
    title = f"at the peak of the step ({unit}), the first class of each pipeline stage"
    yield from _table(title, [list(row) for row in zip(*rows, strict=True)])


def _flops(findings: Findings) -> Iterator[str]:
    rows = [["operation", *(f"rank {entry.rank}" for entry in first_of_each_stage(findings))]]
    names = Counter[str]()
    for entry in first_of_each_stage(findings):
        names.update({name: count for name, count in entry.flops.items() if count})
    for name, _ in names.most_common(MOST_LINES):
        counts = [entry.flops.get(name, 0) for entry in first_of_each_stage(findings)]
        rows.append([name, *(f"{count / 1e12:,.3f}" for count in counts)])
    totals = [sum(entry.flops.values()) for entry in first_of_each_stage(findings)]
    rows.append(["total", *(f"{total / 1e12:,.3f}" for total in totals)])
    yield from _table("operations of one step (TFLOP)", rows)


def _traffic(findings: Findings) -> Iterator[str]:
    stages = first_of_each_stage(findings)
    sums: dict[tuple[str, str, int], list[str]] = {}
    for number, entry in enumerate(stages):
        for row in entry.traffic:
            if row["phase"] != "step":
                continue
            key = row["collective"], row["group"], row["size"]
            cells = sums.setdefault(key, ["-"] * len(stages))
            cells[number] = f"{row['count']:,} x {row['bytes'] / row['count'] / 2**20:,.2f}"
    rows = [["collective", "group", *(f"rank {entry.rank}" for entry in stages)]]
    rows += [[name, f"{group} of {size}", *cells] for (name, group, size), cells in sums.items()]
    if len(rows) > 1:
        yield from _table("communication of one step (calls x MiB on average)", rows)


def _places(findings: Findings) -> Iterator[str]:
    for title, attribute in (
        ("the host reads the device", "reads"),
        ("the host waits for the device", "waits"),
    ):
        most: dict[tuple[str, str], int] = {}
        for entry in findings.classes:
            for phase, operation, place, count in getattr(entry, attribute):
                if phase == "step":
                    key = operation, place
                    most[key] = max(most.get(key, 0), count)
        if most:
            ordered = sorted(most.items(), key=lambda item: -item[1])
            rows = [[f"{n}x", name, place] for (name, place), n in ordered[:MOST_LINES]]
            yield f"\n{title} in a step, on one rank at most"
            for count, name, place in rows:
                yield f"  {count:>5}  {name}  {place}"


def as_json(rehearsal: Rehearsal, findings: Findings) -> str:
    """All of it, bytes and operations."""
    tree: dict[str, Any] = {
        "world_size": rehearsal.world_size,
        "gpu": rehearsal.gpu,
        "rows": dataclasses.asdict(rehearsal.rows),
        "forward_only": rehearsal.forward_only,
        "versions": installed_versions(),
        "seconds": rehearsal.seconds,
        "classes": [
            {**dataclasses.asdict(entry), "estimated": entry.estimate.total}
            for entry in findings.classes
        ],
        "timeline": None if findings.timeline is None else findings.timeline.as_dict(),
        "faults": [dataclasses.asdict(fault) for fault in findings.faults],
    }
    return json.dumps(tree, indent=1)
