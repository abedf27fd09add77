"""Numbers as SVG: lines, stacked shares, bars. Colours are CSS classes c0, c1, ... of the page."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 30
NUM_COLOURS = 8
MOST_POINTS = 400
"""Points drawn of one line; of more, the lowest and highest of each stretch."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line."""

    name: str
    points: Points
    colour: int = 0
    """Number of its colour."""

    dots: bool = False
    """Points instead of a line, for what is measured rarely."""


@dataclass(frozen=True, kw_only=True)
class Axes:
    """Data ranges onto the picture."""

    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Place of a point in the picture."""
        (x0, x1), (y0, y1) = self.x, self.y
        across = (x - x0) / (x1 - x0) if x1 > x0 else 0.5
        up = (y - y0) / (y1 - y0) if y1 > y0 else 0.5
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
        )


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that cover low to high."""
    if not high > low:
        high = low + (abs(low) or 1.0) * 0.1
    rough = (high - low) / max(1, count - 1)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def thin(points: Points, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most about `most` points that keep every peak."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def tick_label(value: float) -> str:
    """1.2M, 350k, 0.05, 2e-05."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:.4g}"


def line_chart(series: Sequence[Series], *, from_zero: bool = False) -> str:
    """Lines over training steps.

    Args:
        series: at least one, each with at least one point.
        from_zero: the vertical axis begins at zero.
    """
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points]
    ticks = nice_ticks(0.0 if from_zero else min(ys), max(ys))
    axes = Axes(x=(min(xs), max(xs)), y=(ticks[0], ticks[-1]))
    parts = _frame(axes, ticks)
    for line in series:
        places = [(*axes.at(x, y), x, y) for x, y in thin(line.points)]
        colour = f"c{line.colour % NUM_COLOURS}"
        if not line.dots and len(places) > 1:
            path = " ".join(f"{left:.1f},{top:.1f}" for left, top, _, _ in places)
            parts.append(f'<polyline class="line {colour}" points="{path}"/>')
        radius = 4 if line.dots else 2 if len(places) == 1 else 0
        for left, top, x, y in places:
            label = html.escape(f"{line.name}, step {x:g}: {y:.6g}")
            shown = f'<circle class="dot {colour}" cx="{left:.1f}" cy="{top:.1f}" r="{radius}"/>'
            near = f'<circle class="near" cx="{left:.1f}" cy="{top:.1f}" r="6"/>'
            parts.append(f"<g>{shown if radius else ''}{near}<title>{label}</title></g>")
    return _svg(parts)


def stacked_chart(
    xs: Sequence[float], layers: Sequence[tuple[str, str, Sequence[float]]], *, label: str
) -> str:
    """Shares of a whole, one above the other; each column spans the steps it was measured over.

    Args:
        xs: step at the end of each interval, ascending.
        layers: name, CSS class and the share (0 to 1) in each interval, from the bottom up.
        label: what the picture shows, for who cannot see it.
    """
    first = xs[0] - (xs[1] - xs[0] if len(xs) > 1 else 1)
    edges = [max(0.0, first), *xs]
    axes = Axes(x=(edges[0], edges[-1]), y=(0.0, 1.0))
    parts = _frame(axes, [0.0, 0.25, 0.5, 0.75, 1.0], percent=True)
    base = [0.0] * len(xs)
    for name, colour, values in layers:
        top = [low + value for low, value in zip(base, values, strict=True)]
        there: list[tuple[float, float]] = []
        back: list[tuple[float, float]] = []
        for k in range(len(xs)):
            there += [axes.at(edges[k], top[k]), axes.at(edges[k + 1], top[k])]
            back += [axes.at(edges[k], base[k]), axes.at(edges[k + 1], base[k])]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*there, *reversed(back)])
        mean = sum(values) / len(values)
        title = html.escape(f"{name}: {mean:.1%} on average, {values[-1]:.1%} in the last interval")
        parts.append(f'<polygon class="{colour}" points="{path}"><title>{title}</title></polygon>')
        base = top
    return _svg(parts, label=label)


def bar_chart(values: Sequence[float], names: Sequence[str], marked: Sequence[bool]) -> str:
    """A bar per rank; marked ones stand out.

    Args:
        values: not negative; at least one.
        names: what each bar is.
        marked: whether each stands out.
    """
    ticks = nice_ticks(0.0, max(values))
    axes = Axes(x=(-0.5, len(values) - 0.5), y=(0.0, ticks[-1]))
    parts = _frame(axes, ticks, whole=True)
    width = (WIDTH - LEFT - RIGHT) / len(values)
    for rank, (value, name, stands_out) in enumerate(zip(values, names, marked, strict=True)):
        left, top = axes.at(rank, value)
        kind = "bar slow" if stands_out else "bar"
        thick = max(0.6, min(40.0, 0.75 * width))
        parts.append(
            f'<rect class="{kind}" x="{left - thick / 2:.1f}" y="{top:.1f}" width="{thick:.1f}" '
            f'height="{HEIGHT - BOTTOM - top:.1f}"><title>{html.escape(name)}: {value:.4g} s'
            "</title></rect>"
        )
    return _svg(parts)


def _frame(
    axes: Axes, ticks: Sequence[float], *, percent: bool = False, whole: bool = False
) -> list[str]:
    """Grid and labels of both axes."""
    parts: list[str] = []
    for tick in ticks:
        _, y = axes.at(axes.x[0], tick)
        text = f"{tick:.0%}" if percent else tick_label(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text class="y" x="{LEFT - 8}" y="{y + 4:.1f}">{text}</text>')
    low, high = axes.x
    for tick in nice_ticks(low, high, 6):
        if low <= tick <= high and (not whole or tick == int(tick)):
            x, _ = axes.at(tick, axes.y[0])
            parts.append(
                f'<text class="x" x="{x:.1f}" y="{HEIGHT - BOTTOM + 19}">{tick_label(tick)}</text>'
            )
    return parts


def _svg(parts: Sequence[str], label: str = "") -> str:
    name = f' aria-label="{html.escape(label)}"' if label else ""
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"{name}>' + "".join(parts) + "</svg>"
