"""The attention masks of one pack."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_croc.monitoring.run_report.heldout import ANSWER, IMAGE, PADDING, TEXT, MaskedPack
from megatron_croc.monitoring.run_report.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PALE,
    PURPLE,
    figure_style,
    save,
)

HIDDEN, PAST, AHEAD = range(3)
"""Kinds of mask cells: key not visible; visible and not after the query; visible after it."""

CELLS = {HIDDEN: "white", PAST: BLUE, AHEAD: ORANGE}
KINDS = {TEXT: GREY, IMAGE: GREEN, ANSWER: PURPLE, PADDING: PALE}
STRIP = 0.035
"""Width of the strips that show what stands where, as a share of the pack."""

NARROW = 0.14
"""Samples below this share of the pack are named by their number alone."""


def draw_masks(pack: MaskedPack, path: Path) -> Path:
    """One panel for each mask; strips above and to the left say what the tokens are."""
    with figure_style(grid=False):
        count = len(pack.visible)
        figure = Figure(figsize=(5.0 * count, 5.9))
        axes = figure.subplots(1, count, squeeze=False)[0]
        figure.subplots_adjust(left=0.055, right=0.99, top=0.85, bottom=0.15, wspace=0.08)
        for number, (place, (name, visible)) in enumerate(
            zip(axes, pack.visible.items(), strict=True)
        ):
            _draw_mask(place, pack, visible)
            place.set_title(name, fontsize=14, pad=36)
            place.set_xlabel("key: token looked at")
            if number == 0:
                place.set_ylabel("query: token that looks", labelpad=8)
            else:
                place.set_yticklabels([])
        _legend(figure)
        return save(figure, path)


def cells(visible: np.ndarray) -> np.ndarray:
    """int [T, T]: HIDDEN, PAST or AHEAD."""
    ahead = np.triu(np.ones_like(visible), k=1)
    return np.where(visible, np.where(ahead, AHEAD, PAST), HIDDEN)


def _draw_mask(axes: Axes, pack: MaskedPack, visible: np.ndarray) -> None:
    length = len(pack.kinds)
    strip = STRIP * length
    extent = (0, length, length, 0)
    axes.imshow(
        cells(visible),
        cmap=ListedColormap(list(CELLS.values())),
        vmin=0,
        vmax=len(CELLS) - 1,
        extent=extent,
        interpolation="nearest",
        aspect="equal",
    )
    colours = ListedColormap(list(KINDS.values()))
    strips = {"vmin": 0, "vmax": len(KINDS) - 1, "cmap": colours, "interpolation": "nearest"}
    axes.imshow(pack.kinds[None], extent=(0, length, -0.3 * strip, -1.3 * strip), **strips)
    axes.imshow(pack.kinds[:, None], extent=(-1.3 * strip, -0.3 * strip, length, 0), **strips)
    axes.set(xlim=(-1.4 * strip, length), ylim=(length, -1.4 * strip), aspect="equal")
    for bound in pack.bounds[1:]:
        axes.axhline(bound, color=INK, linewidth=0.7, linestyle=(0, (4, 3)))
        axes.axvline(bound, color=INK, linewidth=0.7, linestyle=(0, (4, 3)))
    _label_samples(axes, pack, strip)
    axes.set_xticks(pack.bounds)
    axes.set_yticks(pack.bounds)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)


def _label_samples(axes: Axes, pack: MaskedPack, strip: float) -> None:
    """Names above the columns: sample 1: 1 image | sample 2: text only | padding."""
    length = len(pack.kinds)
    pieces = list(zip(pack.bounds, pack.bounds[1:], strict=False))
    names = []
    for number, (begin, end) in enumerate(pieces, start=1):
        images = sum(begin <= start < end for start, _ in pack.image_spans)
        content = f"{images} image{'s' * (images > 1)}" if images else "text only"
        is_narrow = end - begin < NARROW * length
        names.append(f"{number}" if is_narrow else f"sample {number}\n{content}")
    if pack.bounds[-1] < length:
        pieces.append((pack.bounds[-1], length))
        names.append("pad-\nding")
    for (begin, end), name in zip(pieces, names, strict=True):
        axes.text(
            (begin + end) / 2, -1.6 * strip, name, ha="center", va="bottom", fontsize=8, color=INK
        )


def _legend(figure: Figure) -> None:
    entries = {
        "visible: itself and earlier": CELLS[PAST],
        "visible: ahead, in one span": CELLS[AHEAD],
        "not visible": CELLS[HIDDEN],
        "text": KINDS[TEXT],
        "image": KINDS[IMAGE],
        "text with a loss": KINDS[ANSWER],
        "padding": KINDS[PADDING],
    }
    patches = [Patch(facecolor=c, edgecolor=GREY, label=name) for name, c in entries.items()]
    figure.legend(handles=patches, loc="lower center", ncols=len(patches), fontsize=10)
