"""The pool as a whole: which rows are matched at all, and what they are matched with."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from megatron_croc.monitoring.run_report.style import (
    GREEN,
    GREY,
    ORANGE,
    as_picture,
    figure_style,
    save,
)

if TYPE_CHECKING:  # the pictures need its fields, not the model behind it
    from megatron_croc.monitoring.run_report.observations import Observations

NUM_ROWS = 8
"""Most used pool rows whose patches are shown."""

NUM_PATCHES = 14
"""Patches shown of each."""

GAP = 2
"""White pixels between patches."""

CELL, LABEL = 0.64, 1.1
"""Height of a line and room for its name, inches."""


def draw_usage(seen: "Observations", path: Path) -> Path:
    """Draw the number of matches of each pool token, and its relation to the token's length."""
    counts = seen.counts.numpy()
    order = np.argsort(-counts, kind="stable")
    used = int((counts > 0).sum())
    with figure_style():
        figure = Figure(figsize=(11.0, 3.7))
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
        bars, scatter = figure.subplots(1, 2, width_ratios=(1.35, 1.0))
        bars.stairs(counts[order], np.arange(len(counts) + 1) - 0.5, fill=True, color=GREEN)
        bars.axvline(used - 0.5, color=ORANGE, linewidth=1.5, linestyle="--")
        bars.annotate(
            f"{used} of {len(counts)} rows used ({used / len(counts):.0%})",
            (used, counts.max() * 0.93),
            xytext=(8, 0),
            textcoords="offset points",
            ha="left" if used < 0.6 * len(counts) else "right",
            color=ORANGE,
            fontweight="bold",
        )
        bars.set(
            title=f"matches of each pool row over {len(seen.pixels)} held-out images",
            xlabel="pool rows, most used first",
            ylabel="times matched",
            xlim=(-0.5, len(counts) - 0.5),
        )
        norms = seen.row_norms.numpy()
        for chosen, colour, label in (
            (counts > 0, GREEN, "matched"),
            (counts == 0, GREY, "never matched"),
        ):
            scatter.scatter(
                norms[chosen],
                counts[chosen],
                s=18,
                color=colour,
                alpha=0.75,
                label=label,
                linewidths=0,
            )
        scatter.set(
            title="does a row's length decide?",
            xlabel="length (norm) of the pool row; visual tokens have 1",
            ylabel="times matched",
        )
        scatter.legend(loc="upper right")
        return save(figure, path)


def draw_strips(seen: "Observations", path: Path) -> Path:
    """For the most used rows: where in the image, their mean patch, and a sample of patches."""
    counts = seen.counts
    order = torch.argsort(counts, descending=True, stable=True)
    chosen = [int(row) for row in order[:NUM_ROWS] if counts[row] > 0]
    patches = cut_patches(seen)
    widths = (CELL, CELL, strip_width(patches.shape[2]))
    lefts = (LABEL, LABEL + CELL + 0.12, LABEL + 2 * (CELL + 0.12))
    size = (lefts[-1] + widths[-1] + 0.2, (CELL + 0.12) * len(chosen) + 0.45)
    with figure_style(grid=False):
        figure = Figure(figsize=size)
        for line, row in enumerate(chosen):
            bottom = size[1] - 0.45 - (CELL + 0.12) * line - CELL
            boxes = [
                (left / size[0], bottom / size[1], width / size[0], CELL / size[1])
                for left, width in zip(lefts, widths, strict=True)
            ]
            places = [figure.add_axes(box) for box in boxes]
            _draw_row(places, seen, patches, row)
            if line == 0:
                titles = ("where", "mean", f"{NUM_PATCHES} of the patches matched")
                for place, title in zip(places, titles, strict=True):
                    place.set_title(title, fontsize=10, pad=6, loc="left")
        return save(figure, path)


def _draw_row(places: Sequence[Axes], seen: "Observations", patches: Tensor, row: int) -> None:
    """One pool row's pictures, from left to right."""
    image, token = torch.nonzero(seen.rows == row, as_tuple=True)
    matched = patches[image, token]
    where = torch.bincount(token, minlength=seen.grid**2).reshape(seen.grid, seen.grid)
    spread = np.linspace(0, len(matched) - 1, min(NUM_PATCHES, len(matched))).astype(int)
    places[0].imshow(where.numpy(), cmap="Greens", vmin=0, interpolation="nearest")
    places[1].imshow(matched.float().mean(dim=0).byte().numpy(), interpolation="nearest")
    places[2].imshow(strip(matched[spread].numpy()), interpolation="nearest")
    for place in places:
        as_picture(place)
    places[2].axis("off")
    places[0].set_ylabel(
        f"row {row}\n{len(matched)} times", rotation=0, ha="right", va="center", labelpad=8
    )


def strip_width(patch: int) -> float:
    """Inches of a strip that is CELL high."""
    return CELL * (NUM_PATCHES * (patch + GAP) - GAP) / patch


def cut_patches(seen: "Observations") -> Tensor:
    """uint8 [n, N, patch, patch, 3], in the order of the visual tokens."""
    n, channels, height, _ = seen.pixels.shape
    patch, grid = height // seen.grid, seen.grid
    pixels = seen.pixels[:, :, : patch * grid, : patch * grid]
    pixels = pixels.reshape(n, channels, grid, patch, grid, patch)
    return pixels.permute(0, 2, 4, 3, 5, 1).reshape(n, grid * grid, patch, patch, channels)


def strip(patches: np.ndarray) -> np.ndarray:
    """[k, patch, patch, 3] side by side with white gaps; always as wide as NUM_PATCHES."""
    k, patch, _, _ = patches.shape
    step = patch + GAP
    canvas = np.full((patch, NUM_PATCHES * step - GAP, 3), 255, dtype=np.uint8)
    for number in range(k):
        canvas[:, number * step : number * step + patch] = patches[number]
    return canvas
