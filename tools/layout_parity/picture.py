"""Layouts x parameters, coloured by the error of the gradient."""

import math
from collections.abc import Sequence
from pathlib import Path

from layout_parity.compare import Difference


def draw(differences: Sequence[Difference], path: Path, *, bound: float) -> None:
    """Write the picture; green is far below the bound, red above it."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import TwoSlopeNorm

    names = list(differences[0].gradients)
    limit = math.log10(bound)
    errors = [
        [math.log10(min(max(d.gradients[name], 1e-9), 10.0)) for name in names] for d in differences
    ]
    height = 1.6 + 0.3 * len(differences)
    figure, axes = pyplot.subplots(figsize=(max(7.0, 0.11 * len(names) + 2.5), height))
    image = axes.imshow(
        errors,
        aspect="auto",
        cmap="RdYlGn_r",
        norm=TwoSlopeNorm(vcenter=limit, vmin=-9.0, vmax=1.0),
        interpolation="nearest",
    )
    axes.set_yticks(range(len(differences)), [d.layout for d in differences], fontsize=8)
    parts = [name.split(".")[0] for name in names]
    starts = [i for i, part in enumerate(parts) if i == 0 or part != parts[i - 1]]
    axes.set_xticks(starts, [parts[i] for i in starts], rotation=20, ha="left", fontsize=8)
    axes.xaxis.tick_top()
    for start in starts[1:]:
        axes.axvline(start - 0.5, color="white", linewidth=1.5)
    axes.set_xlabel(f"{len(names)} parameters (one column each)", fontsize=8)
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
    bar.set_label("log10 relative error of the gradient", fontsize=8)
    bar.ax.axhline(limit, color="black", linewidth=1.5)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
