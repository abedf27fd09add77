"""Pictures of a rehearsal as SVG: memory of each class, memory over the step, communication."""

import html
from collections.abc import Mapping, Sequence

from megatron_croc.monitoring.live.charts import nice_ticks, tick_label

COLOURS = {
    "weights": "#2f6db5",
    "gradients": "#56b4c9",
    "optimizer": "#7a5aa8",
    "activations": "#2f9e6e",
    "recomputed": "#8fc98a",
    "logits": "#dd6b20",
    "temporary": "#e0b13a",
    "other": "#b9bfca",
}
"""Purpose -> colour; parts of the activations differ in brightness."""

LINE_COLOURS = ("#2f6db5", "#dd6b20", "#2f9e6e", "#7a5aa8", "#c0392b", "#12899b", "#8a6d1c")

_WIDTH, _LEFT, _RIGHT = 1120, 190, 70
_ROW, _BAR = 30, 20


def shade(name: str, number: int) -> str:
    """Fill of one purpose: `number` tells parts of the same purpose apart."""
    colour = COLOURS.get(name.partition(":")[0], COLOURS["other"])
    return f'fill="{colour}" fill-opacity="{max(0.4, 1 - 0.18 * number):.2f}"'


def numbered(names: Sequence[str]) -> dict[str, int]:
    """Name -> its number among the parts of the same purpose."""
    seen: dict[str, int] = {}
    found: dict[str, int] = {}
    for name in names:
        purpose = name.partition(":")[0]
        found[name] = seen.get(purpose, 0)
        seen[purpose] = found[name] + 1
    return found


def stacked_bars(
    rows: Sequence[tuple[str, Mapping[str, float]]],
    names: Sequence[str],
    *,
    marks: Sequence[float],
    limit: float,
) -> str:
    """A bar for each row, its parts side by side.

    Args:
        rows: (label, part -> GiB).
        names: parts from the left.
        marks: one number a row, drawn as a stroke: the estimate.
        limit: drawn as a line through all rows: what fits.
    """
    most = max(limit, *marks, *(sum(parts.values()) for _, parts in rows))
    ticks = [tick for tick in nice_ticks(0.0, most, 9) if tick <= most * 1.001]
    height = _ROW * len(rows) + 40
    scale = (_WIDTH - _LEFT - _RIGHT) / most
    numbers = numbered(names)
    shapes: list[str] = []
    for tick in ticks:
        x = _LEFT + tick * scale
        shapes.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 30}"/>')
        shapes.append(f'<text class="x" x="{x:.1f}" y="{height - 12}">{tick_label(tick)}</text>')
    for number, ((label, parts), mark) in enumerate(zip(rows, marks, strict=True)):
        top, x = 6 + number * _ROW, float(_LEFT)
        shapes.append(
            f'<text class="y" x="{_LEFT - 10}" y="{top + 15}">{html.escape(label)}</text>'
        )
        for name in names:
            width = parts.get(name, 0.0) * scale
            title = html.escape(f"{name}: {parts.get(name, 0.0):.2f} GiB")
            shapes.append(
                f'<rect x="{x:.1f}" y="{top}" width="{width:.1f}" height="{_BAR}" '
                f"{shade(name, numbers[name])}><title>{title}</title></rect>"
            )
            x += width
        total = sum(parts.values())
        shapes.append(
            f'<text x="{max(x, _LEFT + mark * scale) + 6:.1f}" y="{top + 15}">{total:.1f}</text>'
        )
        at = _LEFT + mark * scale
        shapes.append(
            f'<line class="estimate" x1="{at:.1f}" x2="{at:.1f}" y1="{top - 3}" '
            f'y2="{top + _BAR + 3}"><title>croc check: {mark:.2f} GiB</title></line>'
        )
    x = _LEFT + limit * scale
    shapes.append(
        f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 30}">'
        f"<title>room for tensors: {limit:.1f} GiB</title></line>"
    )
    return _svg(_WIDTH, height, shapes, "memory of one rank of each class")


def curves(lines: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Memory from the begin to the end of the step, GiB, a line for each name."""
    height, bottom = 280, 250
    most = max(max(values) for _, values in lines)
    ticks = nice_ticks(0.0, most)
    scale = (bottom - 10) / ticks[-1]
    parts: list[str] = []
    for tick in ticks:
        y = bottom - tick * scale
        parts.append(f'<line class="grid" x1="60" x2="{_WIDTH - 20}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="y" x="52" y="{y + 4:.1f}">{tick_label(tick)}</text>')
    for number, (name, values) in enumerate(lines):
        across = (_WIDTH - 80) / max(len(values) - 1, 1)
        points = " ".join(
            f"{60 + k * across:.1f},{bottom - value * scale:.1f}" for k, value in enumerate(values)
        )
        colour = LINE_COLOURS[number % len(LINE_COLOURS)]
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{points}">'
            f"<title>{html.escape(name)}</title></polyline>"
        )
    parts.append(
        f'<text class="x" x="{_WIDTH / 2}" y="{height - 6}">begin to end of the step</text>'
    )
    return _svg(_WIDTH, height, parts, "memory over the step")


def bars(rows: Sequence[tuple[str, float, str]]) -> str:
    """A bar for each (label, value, text)."""
    most = max(value for _, value, _ in rows) or 1.0
    scale = (_WIDTH - 2 * _LEFT - 100) / most
    parts: list[str] = []
    for number, (label, value, text) in enumerate(rows):
        top = 6 + number * _ROW
        parts.append(
            f'<text class="y" x="{_LEFT + 60}" y="{top + 15}">{html.escape(label)}</text>'
            f'<rect class="bar" x="{_LEFT + 70}" y="{top}" width="{max(value * scale, 1):.1f}" '
            f'height="{_BAR}"/>'
            f'<text x="{_LEFT + 76 + value * scale:.1f}" y="{top + 15}">{html.escape(text)}</text>'
        )
    return _svg(_WIDTH, _ROW * len(rows) + 12, parts, "bytes of each collective")


def _svg(width: int, height: int, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )
