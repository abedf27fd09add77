"""Style of the report's figures: font, palette and saving."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws into files; no display needed

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#22262e"
GREY = "#8a909c"
PALE = "#e9ebef"
BLUE = "#2f6db5"
ORANGE = "#dd6b20"
GREEN = "#2f9e6e"
PURPLE = "#7a5aa8"
RED = "#c0392b"

LINE_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)
"""Of several lines in one panel, in order."""

RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlepad": 8,
    "axes.labelsize": 10,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
"""Settings of every figure."""

DPI = 120


def figure_style(*, grid: bool = True) -> AbstractContextManager[None]:
    """Make and save a figure inside it; `grid` is off for pictures."""
    return matplotlib.rc_context({**RC, "axes.grid": grid})


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=DPI)
    return path


def as_picture(axes: Axes) -> None:
    """No ticks, no grid, a thin frame: the axes hold a picture."""
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set(visible=True, color=GREY, linewidth=0.6)
