"""Figures of held-out images: replaced tokens, their pool tokens, and the reconstruction."""

import colorsys
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from megatron_croc.monitoring.run_report.style import (
    GREY,
    INK,
    PALE,
    as_picture,
    figure_style,
    save,
)

if TYPE_CHECKING:  # the pictures need its fields, not the model behind it
    from megatron_croc.monitoring.run_report.observations import Observations

COLUMNS = ("image", "what stays", "pool row", "distance to the row", "similarity of the rebuilt")
CELL = 2.3
"""Width and height of one picture, inches."""

GAP = (0.14, 0.36)
"""Beside and below a picture, inches."""

TOP, BOTTOM = 0.4, 0.72
"""Room for the titles and for the colour bars, inches."""

OUTLIERS = 0.02
"""Share of the lowest values that the colour scales cut off."""

LARGEST_NUMBERED_GRID = 10
"""Row numbers are printed into the cells up to this many cells along a side."""


def draw_images(seen: "Observations", count: int, path: Path) -> Path:
    """A line of five pictures for each of the first `count` images."""
    count = min(count, len(seen.pixels))
    with figure_style(grid=False):
        width, height = (CELL + GAP[0]) * len(COLUMNS), (CELL + GAP[1]) * count + TOP + BOTTOM
        figure = Figure(figsize=(width, height))
        axes = figure.subplots(count, len(COLUMNS), squeeze=False)
        figure.subplots_adjust(
            left=GAP[0] / 2 / width,
            right=1.0 - GAP[0] / 2 / width,
            top=1.0 - TOP / height,
            bottom=(BOTTOM + GAP[1]) / height,
            wspace=GAP[0] / CELL,
            hspace=GAP[1] / CELL,
        )
        distances, similarities = None, None
        for number, line in enumerate(axes):
            pixels = seen.pixels[number].permute(1, 2, 0).numpy()
            line[0].imshow(pixels)
            line[1].imshow(grey_out(pixels, as_grid(seen.replaced[number], seen)))
            _draw_rows(line[2], as_grid(seen.rows[number], seen))
            distances = _heat(line[3], seen, seen.distance[:count], number, "magma_r")
            similarities = _heat(line[4], seen, seen.similarity[:count], number, "viridis")
            kept = np.argwhere(~as_grid(seen.replaced[number], seen))
            line[4].scatter(kept[:, 1], kept[:, 0], s=7, color=INK, linewidths=0)
            _caption(line, seen, number)
        for place, name in zip(axes[0], COLUMNS, strict=True):
            place.set_title(name, fontsize=11)
        _colour_bar(figure, axes[-1, 3], distances, "Euclidean distance")
        _colour_bar(figure, axes[-1, 4], similarities, "cosine similarity (dot: kept)")
        return save(figure, path)


def _colour_bar(figure: Figure, above: Axes, picture: AxesImage | None, label: str) -> None:
    """A bar below the last picture of a column, as wide as the picture."""
    assert picture is not None
    box, height = above.get_position(), figure.get_figheight()
    place = figure.add_axes((box.x0, 0.52 / height, box.width, 0.13 / height))
    bar = figure.colorbar(
        picture, cax=place, orientation="horizontal", extend="min", extendfrac=0.04
    )
    bar.set_label(label, fontsize=9)
    bar.outline.set_visible(False)  # type: ignore[operator]
    place.tick_params(labelsize=8)


def as_grid(values, seen: "Observations") -> np.ndarray:
    """[N] -> [grid, grid], as the tokens lie in the image."""
    return values.numpy().reshape(seen.grid, seen.grid)


def grey_out(pixels: np.ndarray, replaced: np.ndarray) -> np.ndarray:
    """The image [H, W, 3] with every replaced patch in plain grey, and lines between patches."""
    patch = pixels.shape[0] // len(replaced)
    covered = np.kron(replaced, np.ones((patch, patch), dtype=bool))
    out = pixels.copy()
    covered = np.pad(
        covered, [(0, n - m) for n, m in zip(pixels.shape[:2], covered.shape, strict=True)]
    )
    out[covered] = (206, 210, 216)
    out[::patch] = out[:, ::patch] = 255
    return out


def row_colour(row: int) -> tuple[float, float, float]:
    """Colour of a pool row, the same in every image; neighbours differ (golden-ratio steps)."""
    hue = row * 0.618034 % 1.0
    return colorsys.hls_to_rgb(hue, (0.45, 0.6, 0.74)[row % 3], (0.65, 0.8)[row // 3 % 2])


def _draw_rows(axes: Axes, rows: np.ndarray) -> None:
    colours = [[to_rgb(PALE) if r < 0 else row_colour(r) for r in line] for line in rows.tolist()]
    axes.imshow(np.array(colours), interpolation="nearest")
    if len(rows) > LARGEST_NUMBERED_GRID:
        return
    for (y, x), row in np.ndenumerate(rows):
        if row >= 0:
            axes.text(x, y, f"{row}", ha="center", va="center", fontsize=6.5, color=INK)


def _heat(axes: Axes, seen: "Observations", values, number: int, colours: str) -> AxesImage:
    """One image's values; the scale is that of all images shown, less a few outliers."""
    shown = values.numpy()
    cmap = matplotlib.colormaps[colours].with_extremes(bad=PALE)
    return axes.imshow(
        as_grid(values[number], seen),
        cmap=cmap,
        vmin=np.nanquantile(shown, OUTLIERS),
        vmax=np.nanmax(shown),
        interpolation="nearest",
    )


def _caption(line: np.ndarray, seen: "Observations", number: int) -> None:
    """A few words below each picture."""
    rows, replaced = seen.rows[number], seen.replaced[number]
    similarity = seen.similarity[number]
    texts = (
        f"held-out image {number + 1}",
        f"{int((~replaced).sum())} of {len(replaced)} tokens stay",
        f"{rows[rows >= 0].unique().numel()} distinct rows",
        f"mean {float(seen.distance[number].nanmean()):.2f}",
        f"replaced {float(similarity[replaced].mean()):.3f}, "
        f"kept {float(similarity[~replaced].mean()):.3f}",
    )
    for place, text in zip(line, texts, strict=True):
        as_picture(place)
        place.set_xlabel(text, fontsize=9, color=INK if place is not line[0] else GREY)
