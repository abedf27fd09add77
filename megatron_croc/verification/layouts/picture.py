"""Pictures of a comparison: gradient errors of layouts x parameters, and loss curves."""

import math
from collections.abc import Sequence
from pathlib import Path

from megatron_croc.verification.layouts.compare import Difference


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
    axes.set_xticks(starts, [parts[i] for i in starts], rotation=90, fontsize=7)
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


def draw_curves(costs: Sequence[dict], path: Path) -> None:
    """Draw both losses of every layout over the steps, in one plot."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    losses = ["text_loss", "reconstruction_loss"]
    if not any(step["reconstruction_loss"] for step in costs[0]["steps"]):
        losses.pop()
    figure, all_axes = pyplot.subplots(
        1, len(losses), figsize=(5.2 * len(losses), 3.8), squeeze=False
    )
    for axes, loss in zip(all_axes[0], losses, strict=True):
        for number, cost in enumerate(costs):
            values = [step[loss] for step in cost["steps"]]
            # The first is thick and pale, the others thin on top: what covers it agrees with it.
            style = {"linewidth": 7.0, "alpha": 0.25} if number == 0 else {"linewidth": 1.0}
            axes.plot(range(1, len(values) + 1), values, label=cost["layout"], **style)
        axes.set_title(loss.replace("_", " "), fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.grid(alpha=0.3)
    all_axes[0][-1].legend(fontsize=7, ncol=2)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
