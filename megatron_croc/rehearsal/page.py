"""The report of a rehearsal as one HTML page without scripts and without other files."""

import html
from collections import Counter
from collections.abc import Sequence

from megatron_croc.monitoring.live.style import CSS
from megatron_croc.planning.fit import FRAGMENTATION, GIB
from megatron_croc.rehearsal import pictures
from megatron_croc.rehearsal.findings import PHASES, Findings, first_of_each_stage, grouped
from megatron_croc.rehearsal.replay.picture import draw_timeline
from megatron_croc.rehearsal.run import Rehearsal
from megatron_croc.rehearsal.versions import installed_versions

_OWN_CSS = """
figure { margin-top: 16px; }
.grid-of-charts { grid-template-columns: 1fr; }
.fault { border-left: 4px solid #c0392b; }
.fine { border-left: 4px solid #2f9e6e; }
svg .estimate { stroke: var(--ink); stroke-width: 2.5; }
svg .limit { stroke: #c0392b; stroke-width: 2; stroke-dasharray: 5 4; }
.key { display: inline-block; }
.wide { overflow-x: auto; }
td:first-child { white-space: nowrap; }
"""


def as_page(rehearsal: Rehearsal, findings: Findings) -> str:
    """The page."""
    about = _describe(rehearsal)
    body = [
        f"<h1>Rehearsal of {html.escape(about)}</h1>",
        _tiles(rehearsal, findings),
        _faults(findings),
    ]
    if findings.classes:
        body += [_memory(findings), _over_time(findings), _timeline(findings)]
        body += [_traffic(findings), _classes(findings), _flops(findings)]
        body.append(_places("The host reads the device, in a step", findings, "reads"))
        body.append(_places("The host waits for the device, in a step", findings, "waits"))
    versions = ", ".join(f"{name} {found}" for name, found in installed_versions().items())
    body.append(f"<p><i>{html.escape(versions)}. Nothing here ran on a GPU.</i></p>")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Rehearsal: {html.escape(about)}</title><style>{CSS}{_OWN_CSS}</style>"
        f"<main>{''.join(body)}</main></html>\n"
    )


def _describe(rehearsal: Rehearsal) -> str:
    parallel = rehearsal.run.parallel
    vpp = parallel.virtual_pipeline_model_parallel_size
    return (
        f"{rehearsal.run.stage} on {rehearsal.world_size} {rehearsal.gpu}: "
        f"TP {parallel.tensor_model_parallel_size} x PP {parallel.pipeline_model_parallel_size}"
        f"{f' x VPP {vpp}' if vpp else ''} x CP {parallel.context_parallel_size} x "
        f"DP {parallel.data_parallel_size(rehearsal.world_size)}"
    )


def _tiles(rehearsal: Rehearsal, findings: Findings) -> str:
    tiles = [
        ("GPUs", f"{rehearsal.world_size:,}", f"{len(rehearsal.outcomes)} classes of ranks"),
        ("faults", str(len(findings.faults)), "found" if findings.faults else "none found"),
    ]
    if findings.classes:
        fullest = max(findings.classes, key=lambda entry: entry.highest[1])
        phase, peak = fullest.highest
        where = f"{PHASES[phase]} on {fullest.name}, of {findings.device.memory / GIB:.1f}"
        tiles.append(("GiB at most", f"{peak / GIB:.1f}", where))
        largest = max(findings.classes, key=lambda entry: abs(entry.error or 0.0))
        tiles.append(("croc check", largest.error_text, f"at most off, {largest.name}"))
    tiles.append(("took", f"{rehearsal.seconds:.0f} s", "on this machine, without a GPU"))
    cells = "".join(
        f'<div class="tile"><span>{a}</span><b>{b}</b><i>{html.escape(c)}</i></div>'
        for a, b, c in tiles
    )
    return f'<div class="tiles"><div>{cells}</div></div>'


def _faults(findings: Findings) -> str:
    if not findings.faults:
        return '<div class="card fine">No fault found.</div>'
    return "".join(
        f'<div class="card fault"><b>{html.escape(fault.ranks)}</b>: {html.escape(fault.text)}'
        f"<br><i>{html.escape(fault.way_out)}</i></div>"
        for fault in findings.faults
    )


def _memory(findings: Findings) -> str:
    rows = [
        (entry.name, {name: size / GIB for name, size in grouped(entry.parts).items()})
        for entry in findings.classes
    ]
    totals = Counter[str]()
    for _, parts in rows:
        totals.update(parts)
    order = list(pictures.COLOURS)
    names = sorted(totals, key=lambda n: (order.index(n.partition(":")[0]), -totals[n]))
    names = [name for name in names if totals[name] > 1e-4]
    limit = (findings.device.memory - findings.device.reserved) / FRAGMENTATION / GIB
    picture = pictures.stacked_bars(
        rows,
        names,
        marks=[entry.estimate.total / GIB for entry in findings.classes],
        limit=limit,
    )
    numbers = pictures.numbered(names)
    keys = "".join(
        f'<span><svg class="key" viewBox="0 0 14 10"><rect width="14" height="10" '
        f"{pictures.shade(name, numbers[name])}/></svg>{html.escape(name)}</span>"
        for name in names
    )
    return _figure(
        "Memory at the peak of the step",
        "GiB; black stroke: the estimate of croc check; dashed: room for tensors on the GPU",
        picture,
        keys,
    )


def _over_time(findings: Findings) -> str:
    stages = [entry for entry in first_of_each_stage(findings) if len(entry.curve) > 1]
    if not stages:
        return ""
    picture = pictures.curves(
        [(entry.name, [size / GIB for size in entry.curve]) for entry in stages]
    )
    keys = "".join(
        f'<span><svg class="key" viewBox="0 0 14 10"><rect width="14" height="10" '
        f'fill="{pictures.LINE_COLOURS[n % len(pictures.LINE_COLOURS)]}"/></svg>'
        f"{html.escape(entry.name)}</span>"
        for n, entry in enumerate(stages)
    )
    return _figure(
        "Memory over the step", "GiB, in the order of the work, not to time", picture, keys
    )


def _timeline(findings: Findings) -> str:
    if findings.timeline is None:
        return ""
    told = "<br>".join(html.escape(line) for line in findings.timeline.lines())
    picture = draw_timeline(findings.timeline)
    return (
        f"<figure><figcaption><b>The step in time</b></figcaption>{picture}<p>{told}</p></figure>"
    )


def _traffic(findings: Findings) -> str:
    rows: list[tuple[str, float, str]] = []
    for entry in first_of_each_stage(findings):
        for row in entry.traffic:
            if row["phase"] == "step":
                text = f"{row['bytes'] / GIB:.3f} GiB in {row['count']:,} calls"
                label = f"pp {entry.stage}: {row['collective']}, {row['group']} of {row['size']}"
                rows.append((label, row["bytes"] / GIB, text))
    rows.sort(key=lambda row: -row[1])
    if not rows:
        return ""
    return _figure(
        "Communication of one step", "bytes of the larger side, one rank", pictures.bars(rows[:16])
    )


def _classes(findings: Findings) -> str:
    head = ["class", "ranks", *(f"{name}, GiB" for name in PHASES.values())]
    head += ["croc check, GiB", "off by", "micro-batches", "longest, tokens", "images"]
    rows = []
    for entry in findings.classes:
        peaks = [f"{entry.peaks[p] / GIB:.2f}" if p in entry.peaks else "" for p in PHASES]
        rows.append(
            [
                *(entry.name, f"{entry.num_ranks:,}", *peaks, f"{entry.estimate.total / GIB:.2f}"),
                *(entry.error_text, str(entry.rows["micro_batches"])),
                *(f"{entry.rows['most_tokens']:,}", str(entry.rows["images"])),
            ]
        )
    return _table("Classes of ranks: highest memory of each phase", head, rows)


def _flops(findings: Findings) -> str:
    stages = first_of_each_stage(findings)
    names = Counter[str]()
    for entry in stages:
        names.update({name: count for name, count in entry.flops.items() if count})
    head = ["operation", *(f"pp {entry.stage}, TFLOP" for entry in stages)]
    rows = [
        [name, *(f"{entry.flops.get(name, 0) / 1e12:,.3f}" for entry in stages)]
        for name, _ in names.most_common(12)
    ]
    return _table("Operations of one step on one rank", head, rows)


def _places(title: str, findings: Findings, attribute: str) -> str:
    most: dict[tuple[str, str], int] = {}
    for entry in findings.classes:
        for phase, operation, place, count in getattr(entry, attribute):
            if phase == "step":
                most[operation, place] = max(most.get((operation, place), 0), count)
    rows = [[f"{n}", *key] for key, n in sorted(most.items(), key=lambda item: -item[1])]
    return _table(title, ["times", "operation", "place"], rows) if rows else ""


def _figure(title: str, unit: str, picture: str, keys: str = "") -> str:
    legend = f'<p class="legend">{keys}</p>' if keys else ""
    return (
        f"<figure><figcaption><b>{title}</b> <i>{unit}</i></figcaption>{picture}{legend}</figure>"
    )


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="card wide"><h2>{html.escape(title)}</h2><table><tr>{cells(head, "th")}</tr>'
        f"{body}</table></div>"
    )
