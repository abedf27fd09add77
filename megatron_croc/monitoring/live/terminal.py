"""A frame of text: progress, losses, speed, where the time goes, and what is wrong."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron_croc.monitoring.live.reading import RunView

_RAMP = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_ASCII_RAMP = "_.-=+*%#"

REGION_LETTERS = {
    "data_wait": ("D", 196),
    "vision": ("V", 39),
    "matching": ("M", 208),
    "forward": ("F", 34),
    "reconstruction": ("R", 44),
    "backward": ("B", 28),
    "pipeline_wait": ("P", 199),
    "sync": ("S", 220),
    "optimizer": ("O", 99),
    "checkpoint": ("C", 130),
    "validation": ("E", 67),
    "other": (".", 245),
}
"""Region -> its letter in the bar without colours, its colour (of 256) in the bar with them."""


@dataclass(frozen=True, kw_only=True)
class Style:
    """Capabilities of the terminal."""

    width: int = 100
    """Columns."""

    colour: bool = True
    """ANSI colours."""

    unicode: bool = True
    """Block characters; else ASCII."""

    def paint(self, text: str, code: str) -> str:
        """`text` in an ANSI style, where there are any."""
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour else text

    def bold(self, text: str) -> str:
        """Format a heading."""
        return self.paint(text, "1")

    def dim(self, text: str) -> str:
        """Format text of little importance."""
        return self.paint(text, "2")

    def alarm(self, text: str) -> str:
        """Format a warning."""
        return self.paint(text, "1;31")


def draw_frame(runs: Sequence[RunView], style: Style) -> str:
    """Draw all runs, one below the other; several also in a table."""
    parts = [line for run in runs for line in [*_draw_run(run, style), ""]]
    if len(runs) > 1:
        parts += _draw_table(runs, style)
    return "\n".join(parts).rstrip() + "\n"


def sparkline(values: Sequence[float], length: int, ramp: str = _RAMP) -> str:
    """Values as a row of `length` blocks at most, each the mean of its share of them."""
    if not values:
        return ""
    count = min(length, len(values))
    edges = [round(k * len(values) / count) for k in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    span = high - low
    return "".join(
        ramp[min(len(ramp) - 1, int((mean - low) / span * len(ramp)))] if span > 0 else ramp[0]
        for mean in means
    )


def duration(seconds: float | None) -> str:
    """1 d 2 h, 3 h 05 min, 4 min 10 s, 7 s."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"


def number(value: float) -> str:
    """Four digits that count."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _draw_run(run: RunView, style: Style) -> list[str]:
    lines = [_title(run, style), _progress(run, style)]
    lines += _curves(run, style)
    lines.append(_speed(run))
    if shares := run.time_shares():
        lines += _time_bar(shares, style)
    if pool := _pool(run):
        lines.append(pool)
    lines += _state(run, style)
    return lines


def _title(run: RunView, style: Style) -> str:
    last = run.train[-1] if run.train else {}
    size = f", {int(last['world_size'])} ranks" if "world_size" in last else ""
    if run.is_done:
        state = style.dim("done")
    elif run.silence > max(60.0, 5 * (run.seconds_per_step or 0.0) * _interval(run)):
        silent = f"silent for {duration(run.silence)}"
        state = style.alarm(silent) if run.train_iters else style.dim(silent)
    else:
        state = style.paint("running", "32")
    return f"{style.bold(run.name)}{size}  {state}"


def _interval(run: RunView) -> float:
    """Steps between the last two lines."""
    steps = [row["iteration"] for row in run.train[-2:]]
    return steps[-1] - steps[0] if len(steps) == 2 else max(steps, default=1)


def _progress(run: RunView, style: Style) -> str:
    if run.train_iters is None:
        return f"step {run.iteration}"
    share = min(1.0, run.iteration / max(1, run.train_iters))
    length = max(10, style.width - 50)
    full = round(share * length)
    block, rest = ("\u2588", "\u2591") if style.unicode else ("#", "-")
    bar = style.paint(block * full, "32") + style.dim(rest * (length - full))
    left = "" if run.is_done else f"  {duration(run.seconds_left)} left"
    return f"step {run.iteration}/{run.train_iters} {bar} {share:.0%}{left}"


def _curves(run: RunView, style: Style) -> list[str]:
    ramp = _RAMP if style.unicode else _ASCII_RAMP
    length = max(10, style.width - 44)
    lines: list[str] = []
    for name, label in {
        "text_loss": "text loss",
        "reconstruction_loss": "reconstruction",
        "valid_text_loss": "held-out text",
        "grad_norm": "gradient norm",
    }.items():
        values = [value for _, value in run.series(name)]
        if values:
            curve = style.paint(sparkline(values, length, ramp), "36")
            lines.append(f"  {label:<15}{number(values[-1]):>9}  {curve}")
    return lines


def _speed(run: RunView) -> str:
    parts: list[str] = []
    for name, form in {
        "seconds_per_step": "{:.3g} s/step",
        "samples_per_second": "{:.4g} samples/s",
        "tokens_per_second": "{:,.0f} tokens/s",
        "tflops_per_device": "{:.3g} TFLOP/s per device",
        "mfu": "MFU {:.1%}",
    }.items():
        value = run.recent(name)
        if value is not None:
            parts.append(form.format(value))
    return "  " + (" | ".join(parts) or "no line yet")


def _time_bar(shares: dict[str, float], style: Style) -> list[str]:
    length = max(20, style.width - 4)
    cells: list[str] = []
    filled, total = 0, 0.0
    known = [name for name in REGION_LETTERS if name in shares]
    for name in known:
        total += shares[name]
        count = round(total * length) - filled
        filled += count
        letter, colour = REGION_LETTERS[name]
        cells.append(style.paint(" " * count, f"48;5;{colour}") if style.colour else letter * count)
    legend = [
        f"{_key(name, style)}{name} {shares[name]:.0%}" for name in known if shares[name] >= 0.005
    ]
    lines, line = ["  " + "".join(cells)], " "
    widths = [len(f"   {name} {shares[name]:.0%}") for name in known if shares[name] >= 0.005]
    used = 1
    for text, width in zip(legend, widths, strict=True):
        if used + width > style.width:
            lines.append(line)
            line, used = " ", 1
        line, used = f"{line} {text}", used + width
    return [*lines, line]


def _key(name: str, style: Style) -> str:
    letter, colour = REGION_LETTERS[name]
    return style.paint(" ", f"48;5;{colour}") + " " if style.colour else f"{letter} "


def _pool(run: RunView) -> str:
    parts = [
        form.format(value)
        for name, form in {
            "pool_usage": "pool used {:.0%}",
            "pool_entropy": "evenness {:.2f}",
            "matching_share": "matching waited for {:.1%}",
            "hidden_matching_share": "hidden {:.1%}",
            "data_wait_share": "data waited for {:.1%}",
            "packing_fill": "rows filled {:.1%}",
        }.items()
        if (value := run.recent(name)) is not None
    ]
    return "  " + " | ".join(parts) if parts else ""


def _state(run: RunView, style: Style) -> list[str]:
    lines: list[str] = []
    saved = run.checkpoint
    text = "no checkpoint" if saved is None else f"checkpoint of step {saved.iteration}"
    if saved is not None:
        text += f", {duration(saved.age)} ago"
    lines.append(f"  {text}; last line {duration(run.silence)} ago")
    if run.skipped_steps:
        lines.append("  " + style.alarm(f"{run.skipped_steps} steps skipped"))
    for entry in (run.stragglers[-1]["slow"] if run.stragglers else [])[:3]:
        kind = "computes" if entry["cause"] == "compute" else "waits for data"
        slow = f"rank {entry['rank']} on {entry['host']} {kind} {entry['percent']:.0f} % longer"
        lines.append("  " + style.alarm(slow))
    if run.beats:
        steps = [beat.iteration for beat in run.beats]
        lines.append(f"  {len(run.beats)} ranks at steps {min(steps)} to {max(steps)}")
    for beat in run.stale_ranks[:3]:
        text = f"rank {beat.rank} on {beat.host}: {duration(beat.age)} in {beat.phase}"
        lines.append("  " + style.alarm(text))
    return lines


def _draw_table(runs: Sequence[RunView], style: Style) -> list[str]:
    head = ["run", "step", "text loss", "reconstruction", "tokens/s", "s/step", "left"]
    table = [head]
    for run in runs:
        last = run.train[-1] if run.train else {}
        cells = [
            number(value) if value is not None else "-"
            for value in (
                last.get("text_loss"),
                last.get("reconstruction_loss"),
                run.recent("tokens_per_second"),
                run.recent("seconds_per_step"),
            )
        ]
        left = "done" if run.is_done else duration(run.seconds_left)
        table.append([run.name, str(run.iteration), *cells, left])
    widths = [max(len(row[k]) for row in table) for k in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
    return [style.bold(lines[0]), *lines[1:]]
