"""Curves over the steps of training."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from megatron_croc.monitoring.run_report.stages import Row, StageRun, series
from megatron_croc.monitoring.run_report.style import (
    BLUE,
    GREEN,
    LINE_COLOURS,
    ORANGE,
    PURPLE,
    figure_style,
    save,
)

PANEL = (5.2, 3.1)
"""Width and height of one panel, inches."""


def draw_losses(stages: Sequence[StageRun], path: Path) -> Path:
    """Text loss of every stage, reconstruction loss where there is one; validation as points."""
    panels = [(stage, "text_loss", "text loss (cross entropy)", BLUE) for stage in stages]
    panels += [
        (stage, "reconstruction_loss", "reconstruction loss (SmoothL1)", ORANGE)
        for stage in stages
        if series(stage.train, "reconstruction_loss")
    ]
    with figure_style():
        figure, axes = _panels(len(panels), columns=2)
        for place, (stage, name, label, colour) in zip(axes, panels, strict=True):
            _line(place, stage.train, name, colour, "training")
            _points(place, stage, name, colour)
            place.set(title=f"{stage.name}: {label.split(' (')[0]}", ylabel=label)
            if name == "reconstruction_loss":
                place.set_yscale("log")
            place.margins(y=0.2)  # room for the numbers beside the points
            place.legend(loc="upper right")
        return save(figure, path)


def draw_optimization(stages: Sequence[StageRun], path: Path) -> Path:
    """Learning rate of each part (above) and gradient norm (below), a column for each stage."""
    with figure_style():
        figure, axes = _panels(2 * len(stages), columns=len(stages), width=4.1)
        for stage, rates, norms in zip(stages, axes, axes[len(stages) :], strict=False):
            for colour, (points, parts) in zip(LINE_COLOURS, equal_curves(stage), strict=False):
                label = ",\n".join(part.replace("_", " ") for part in parts)
                rates.plot(*np.array(points).T, color=colour, marker=".", label=label)
            rates.set(title=f"{stage.name}: learning rate", ylabel="learning rate")
            rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
            rates.set_ylim(bottom=0.0)
            rates.legend(loc="lower left")
            _line(norms, stage.train, "grad_norm", PURPLE, None)
            norms.set(title=f"{stage.name}: gradient norm", ylabel="norm before clipping")
            norms.set_ylim(bottom=0.0)
        return save(figure, path)


def draw_pool_training(stages: Sequence[StageRun], path: Path) -> Path | None:
    """Share of pool rows used in a step, and how far the matches are; None without a pool."""
    pooled = [stage for stage in stages if series(stage.train, "pool_usage")]
    if not pooled:
        return None
    with figure_style():
        figure, axes = _panels(2 * len(pooled), columns=2)
        for stage, usage, distance in zip(pooled, axes[::2], axes[1::2], strict=True):
            _line(usage, stage.train, "pool_usage", GREEN, None)
            usage.set(title=f"{stage.name}: pool usage", ylabel="rows used in one step")
            usage.set_ylim(0.0, 1.0)
            usage.yaxis.set_major_formatter(PercentFormatter(1.0))
            _line(distance, stage.train, "matched_distance", PURPLE, None)
            distance.set(title=f"{stage.name}: matched distance", ylabel="mean Euclidean distance")
            # From zero, so that a drift of a thousandth looks like one.
            distance.set_ylim(0.0, 1.2 * max(v for _, v in series(stage.train, "matched_distance")))
        return save(figure, path)


def equal_curves(stage: StageRun) -> list[tuple[list[tuple[float, float]], list[str]]]:
    """Learning-rate curves with the parts that follow each: equal ones would hide each other."""
    curves: list[tuple[list[tuple[float, float]], list[str]]] = []
    for part, points in stage.learning_rates.items():
        for known, parts in curves:
            if known == points:
                parts.append(part)
                break
        else:
            curves.append((points, [part]))
    return curves


def _panels(count: int, *, columns: int, width: float = PANEL[0]) -> tuple[Figure, list[Axes]]:
    """`count` panels in reading order; what is left of the last row stays empty."""
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, PANEL[1] * rows))
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for place in axes[:count]:
        place.set_xlabel("step")
        place.xaxis.set_major_locator(MaxNLocator(integer=True))
    for place in axes[count:]:
        place.axis("off")
    return figure, axes[:count]


def _line(axes: Axes, rows: Sequence[Row], name: str, colour: str, label: str | None) -> None:
    points = series(rows, name)
    if points:
        axes.plot(*np.array(points).T, color=colour, linewidth=1.8, marker=".", label=label)


def _points(axes: Axes, stage: StageRun, name: str, colour: str) -> None:
    """Validation as numbered points; a number stands on the side away from the curve."""
    points = series(stage.valid, f"valid_{name}")
    if not points:
        return
    axes.scatter(
        *np.array(points).T,
        s=64,
        marker="D",
        facecolor="white",
        edgecolor=colour,
        linewidth=1.8,
        zorder=3,
        label="held-out data",
    )
    curve = np.array(series(stage.train, name))
    for step, value in points:
        is_below = value < np.interp(step, *curve.T)
        axes.annotate(
            f"{value:.3f}" if value >= 1.0 else f"{value:#.3g}",
            (step, value),
            xytext=(0, -9 if is_below else 9),
            textcoords="offset points",
            ha="center",
            va="top" if is_below else "bottom",
            fontsize=8.5,
        )
