"""One HTML file about one run, or about several side by side; it loads nothing from anywhere."""

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_croc.monitoring.live.charts import Series, bar_chart, line_chart, stacked_chart
from megatron_croc.monitoring.live.reading import SHARE, RunView
from megatron_croc.monitoring.live.style import CSS, REGION_COLOURS
from megatron_croc.monitoring.live.terminal import duration, number

_OF_ALL = (
    ("text_loss", "Text loss", "cross entropy per labelled token", False),
    ("reconstruction_loss", "Reconstruction loss", "SmoothL1 per element", False),
    ("tokens_per_second", "Throughput", "tokens per second, all ranks", True),
    ("mfu", "Model FLOPs utilisation", "share of the devices' peak", True),
    ("seconds_per_step", "Time of a step", "seconds, without validation and checkpoints", True),
    ("grad_norm", "Gradient norm", "before clipping", True),
)
"""Column, title, unit, whether the axis begins at zero: charts with a line per run."""

_OF_ONE: tuple[tuple[str, str, dict[str, str]], ...] = (
    (
        "Waiting",
        "share of the time",
        {
            "data_wait_share": "for data",
            "matching_share": "for matching",
            "hidden_matching_share": "matching hidden behind other work",
        },
    ),
    (
        "Prompt pool",
        "1: every row used; all alike",
        {"pool_usage": "rows used", "pool_entropy": "evenness (entropy)"},
    ),
)
"""Title, unit, column -> name: charts with a line per column, for each run."""


def write_page(path: Path, runs: Sequence[RunView]) -> None:
    """Write the page about these runs."""
    names = ", ".join(run.name for run in runs)
    sections = [_tiles(run, is_named=len(runs) > 1) for run in runs]
    sections += [_grid(_compare(runs) + [card for run in runs for card in _own(run, runs)])]
    sections += [_tables(run, is_named=len(runs) > 1) for run in runs]
    body = "\n".join(sections)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f"<title>{html.escape(names)}</title>\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{CSS}</style></head>\n<body><main>\n<h1>{html.escape(names)}</h1>\n"
        f"{_links(path, runs)}{body}\n</main></body></html>\n",
        encoding="ascii",
        errors="xmlcharrefreplace",
    )


def _links(path: Path, runs: Sequence[RunView]) -> str:
    """Links to the pictures of masks and matching that `croc report` has drawn."""
    places = dict.fromkeys(
        place.resolve()
        for run in runs
        for place in (run.folder / "report/report.html", run.folder / "../report/report.html")
        if place.is_file()
    )
    links = [
        f'<p class="lead"><a href="{html.escape(os.path.relpath(place, path.parent.resolve()))}">'
        "Masks, replaced tokens and what the pool learned</a></p>\n"
        for place in places
    ]
    return "".join(links)


def _tiles(run: RunView, *, is_named: bool) -> str:
    last = run.train[-1] if run.train else {}
    steps = f"{run.iteration}" + (f" / {run.train_iters}" if run.train_iters else "")
    if run.is_done:
        state = "done"
    else:
        left = run.seconds_left
        state = "no end known" if left is None else f"{duration(left)} left"
    saved = run.checkpoint
    tiles = [("step", steps, state)]
    valid = run.series("valid_text_loss")
    if "text_loss" in last:
        held = f"held-out {number(valid[-1][1])}" if valid else "no validation"
        tiles.append(("text loss", number(last["text_loss"]), held))
    if "reconstruction_loss" in last:
        held = [value for _, value in run.series("valid_reconstruction_loss")]
        tiles.append(
            (
                "reconstruction loss",
                number(last["reconstruction_loss"]),
                f"held-out {number(held[-1])}" if held else "no validation",
            )
        )
    if (speed := run.recent("tokens_per_second")) is not None:
        mfu = run.recent("mfu")
        ranks = f"{int(last.get('world_size', 1))} ranks"
        tiles.append(
            ("tokens/s", number(speed), ranks if mfu is None else f"{ranks}, MFU {mfu:.1%}")
        )
    tiles.append(
        (
            "checkpoint",
            "none" if saved is None else f"step {saved.iteration}",
            "" if saved is None else f"{duration(saved.age)} ago",
        )
    )
    tiles.append(
        ("skipped steps", str(run.skipped_steps), f"last line {duration(run.silence)} ago")
    )
    cells = "".join(
        f'<div class="tile"><span>{html.escape(name)}</span><b>{html.escape(value)}</b>'
        f"<i>{html.escape(more)}</i></div>"
        for name, value, more in tiles
    )
    heading = f"<h2>{html.escape(run.name)}</h2>" if is_named else ""
    return f'<section class="tiles">{heading}<div>{cells}</div></section>'


def _compare(runs: Sequence[RunView]) -> list[str]:
    """Charts with a line per run."""
    cards: list[str] = []
    for column, title, unit, from_zero in _OF_ALL:
        lines: list[Series] = []
        for colour, run in enumerate(runs):
            if points := run.series(column):
                name = run.name if len(runs) > 1 else "training"
                lines.append(Series(name=name, points=points, colour=colour))
            if points := run.series(f"valid_{column}"):
                name = f"{run.name}, held-out" if len(runs) > 1 else "held-out"
                lines.append(Series(name=name, points=points, colour=colour, dots=True))
        if lines:
            named = [(line.name, f"c{line.colour}", line.dots) for line in lines]
            picture = line_chart(lines, from_zero=from_zero)
            cards.append(_card(title, unit, picture, named if len(lines) > 1 else []))
    return cards


def _own(run: RunView, runs: Sequence[RunView]) -> list[str]:
    """Charts of one run alone."""
    behind = f": {run.name}" if len(runs) > 1 else ""
    rates = {name: name[3:] for row in run.train for name in row if name.startswith("lr/")}
    cards: list[str] = []
    for title, unit, columns in (*_OF_ONE, ("Learning rates", "of each trained part", rates)):
        if lines := _distinct(run, columns):
            named = [(line.name, f"c{line.colour}", False) for line in lines]
            cards.append(_card(title + behind, unit, line_chart(lines, from_zero=True), named))
    drawn = (_time_split(run, behind), _ranks(run, behind))
    return [card for card in drawn if card] + cards


def _distinct(run: RunView, columns: Mapping[str, str]) -> list[Series]:
    """A line per column; equal ones share one, for one would hide the other."""
    names: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for column, label in columns.items():
        if points := run.series(column):
            names.setdefault(tuple(points), []).append(label)
    return [
        Series(name=", ".join(labels), points=points, colour=colour)
        for colour, (points, labels) in enumerate(names.items())
    ]


def _time_split(run: RunView, behind: str) -> str | None:
    rows = [row for row in run.train if any(name.startswith(SHARE) for name in row)]
    regions = [name for name in REGION_COLOURS if any(SHARE + name in row for row in rows)]
    if not rows:
        return None
    layers = [(name, f"r-{name}", [row.get(SHARE + name, 0.0) for row in rows]) for name in regions]
    picture = stacked_chart([row["iteration"] for row in rows], layers, label="time split")
    named = [(name.replace("_", " "), f"r-{name}", True) for name in regions]
    return _card("Where the time goes" + behind, "share of each interval", picture, named)


def _ranks(run: RunView, behind: str) -> str | None:
    if not run.stragglers:
        return None
    last = run.stragglers[-1]
    slow = {entry["rank"] for entry in last["slow"]}
    seconds = last["compute_seconds"]
    picture = bar_chart(
        seconds,
        [f"rank {rank}" for rank in range(len(seconds))],
        [rank in slow for rank in range(len(seconds))],
    )
    unit = f"compute seconds of a step, without waiting, up to step {last['iteration']}"
    return _card("Ranks" + behind, unit, picture, [])


def _card(title: str, unit: str, picture: str, named: Sequence[tuple[str, str, bool]]) -> str:
    keys = "".join(
        f'<span><svg viewBox="0 0 14 10" class="key">{_key(colour, is_block)}</svg>'
        f"{html.escape(name)}</span>"
        for name, colour, is_block in named
    )
    legend = f'<p class="legend">{keys}</p>' if keys else ""
    return (
        f"<figure><figcaption><b>{html.escape(title)}</b> <i>{html.escape(unit)}</i>"
        f"</figcaption>{legend}{picture}</figure>"
    )


def _key(colour: str, is_block: bool) -> str:
    if colour.startswith("r-"):
        return f'<rect class="{colour}" width="14" height="10" rx="2"/>'
    if is_block:
        return f'<circle class="dot {colour}" cx="7" cy="5" r="4"/>'
    return f'<line class="line {colour}" x1="0" x2="14" y1="5" y2="5"/>'


def _grid(cards: Sequence[str]) -> str:
    return '<section class="grid-of-charts">' + "\n".join(cards) + "</section>"


def _tables(run: RunView, *, is_named: bool) -> str:
    shown = _validations(run) + _events(run)
    heading = f"<h2>{html.escape(run.name)}</h2>" if is_named else ""
    return f'<section class="card">{heading}{shown}</section>' if shown else ""


def _validations(run: RunView) -> str:
    columns = [
        name for name in dict.fromkeys(n for row in run.valid for n in row) if name != "iteration"
    ]
    rows = [
        [f"{row['iteration']:g}", *(number(row[c]) if c in row else "-" for c in columns)]
        for row in run.valid[-20:]
    ]
    head = ["step", *(c.removeprefix("valid_").replace("_", " ") for c in columns)]
    return _table("Validation", head, rows) if rows else ""


def _events(run: RunView) -> str:
    events = [(float(step), "checkpoint", "") for step in run.checkpoints]
    for row in run.train:
        if row.get("skipped_steps"):
            text = f"{row['skipped_steps']:g} of the steps up to here changed nothing"
            events.append((row["iteration"], "skipped", text))
    for line in run.stragglers:
        for entry in line["slow"]:
            kind = "computes" if entry["cause"] == "compute" else "waits for data"
            text = f"rank {entry['rank']} on {entry['host']} {kind} {entry['percent']:g} % longer"
            events.append((line["iteration"], "straggler", text))
    events += [
        (beat.iteration, "standing still", f"rank {beat.rank} on {beat.host}: {beat.phase}")
        for beat in run.stale_ranks
    ]
    rows = [[f"{step:g}", kind, text] for step, kind, text in sorted(events)[-40:]]
    return _table("Events", ["step", "what", ""], rows) if rows else ""


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)

    lines = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<h3>{html.escape(title)}</h3><table><tr>{cells(head, 'th')}</tr>{lines}</table>"
