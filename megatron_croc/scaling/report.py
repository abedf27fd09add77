"""Fits of a grid as JSON, markdown, one HTML page and a picture."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_croc.errors import DataError
from megatron_croc.monitoring.run_report.page import Section, write_page
from megatron_croc.monitoring.run_report.stages import Table
from megatron_croc.scaling.collect import METRICS, Result, collect, groups, to_points
from megatron_croc.scaling.fit import LEVEL, Fit, extrapolation_doubt, fit_law
from megatron_croc.scaling.grid import Grid


@dataclass(frozen=True, kw_only=True)
class GroupFit:
    """Runs that differ only in size, samples and seed."""

    label: str
    """Their other settings; empty when the grid has no further axes."""

    results: list[Result]
    metric: str
    fit: Fit | None
    refusal: str | None
    """Reason for the missing fit."""

    left_out: dict[str, str]
    """Runs of the grid that are in no fit -> reason."""


def fit_groups(grid: Grid, metric: str, *, resamples: int = 200) -> list[GroupFit]:
    """Fit every group; `refusal` names the reason for a group with too few runs.

    Raises:
        ConfigError: no run is usable.
        DataError: no such metric, or no group can be fitted.
    """
    if metric not in METRICS:
        raise DataError(f"--metric {metric}: choose from {', '.join(METRICS)}")
    results = collect(grid)
    left_out = {
        result.entry.name: reason
        for result in results
        if (reason := result.why_left_out(metric)) is not None
    }
    fits = []
    for label, members in groups(results, metric).items():
        fit, refusal = None, None
        try:
            fit = fit_law(to_points(members, metric), resamples=resamples)
        except DataError as error:
            refusal = str(error)
        fits.append(
            GroupFit(
                label=label,
                results=members,
                metric=metric,
                fit=fit,
                refusal=refusal,
                left_out=left_out,
            )
        )
    if all(group.fit is None for group in fits):
        raise DataError("nothing can be fitted: " + "; ".join(str(g.refusal) for g in fits))
    return fits


def predictions(group: GroupFit, targets: Sequence[float]) -> list[dict]:
    """The largest model's loss at the target sample counts."""
    if group.fit is None:
        return []
    largest = float(group.fit.points.parameters.max())
    rows = []
    for samples in targets:
        low, high = group.fit.predict_interval(largest, samples)
        rows.append(
            {
                "parameters": largest,
                "samples": samples,
                "loss": float(group.fit.law.predict(largest, samples)),
                "interval": [low, high],
                "doubt": extrapolation_doubt(group.fit, largest, samples),
            }
        )
    return rows


def as_dict(group: GroupFit, targets: Sequence[float]) -> dict:
    """Content of fit.json for one group; it holds no path of the machine."""
    content: dict = {
        "group": group.label,
        "metric": group.metric,
        "points": [
            {
                "run": result.entry.name,
                "parameters": result.entry.num_parameters,
                "samples": result.entry.num_samples,
                **{name: result.loss(name) for name in METRICS},
            }
            for result in group.results
        ],
        "left_out": group.left_out,
        "refusal": group.refusal,
    }
    if group.fit is not None:
        content |= {
            "law": group.fit.law.named(),
            "level": LEVEL,
            "intervals": group.fit.intervals(),
            "held_out_error": group.fit.held_out_error,
            "warnings": group.fit.warnings,
            "predictions": predictions(group, targets),
        }
    return content


def write_json(path: Path, fits: Sequence[GroupFit], targets: Sequence[float]) -> None:
    """Write fit.json."""
    content = [as_dict(group, targets) for group in fits]
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_report(out: Path, fits: Sequence[GroupFit], targets: Sequence[float]) -> None:
    """Write report.md, report.html and one picture per group."""
    lines, sections = ["# Scaling: held-out loss over model size and samples", ""], []
    for number, group in enumerate(fits):
        picture = draw(group, targets, out / f"scaling_{number}.png")
        title = group.label or "all runs"
        parts = describe(group, targets)
        text = "\n\n".join(part if isinstance(part, str) else markdown(part) for part in parts)
        lines += [f"## {title}", "", text, "", f"![{title}]({picture.name})", ""]
        paragraphs: list[str | Table] = []
        for part in parts:  # each line of a list is a paragraph
            paragraphs.extend(part.splitlines() if isinstance(part, str) else [part])
        sections.append(Section(title=title, paragraphs=paragraphs, pictures=[picture]))
    (out / "report.md").write_text("\n".join(lines), encoding="utf-8")
    write_page(
        out / "report.html",
        title="Scaling",
        lead="Held-out loss over model size and samples.",
        sections=sections,
    )


def markdown(table: Table) -> str:
    """Write a table as Markdown; its first row is the head."""
    rows = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([rows[0], "|---" * len(table[0]) + "|", *rows[1:]])


def describe(group: GroupFit, targets: Sequence[float]) -> list[str | Table]:
    """Describe one group: paragraphs, Markdown lists and tables."""
    runs: Table = [["run", "parameters", "samples", *METRICS]]
    for result in group.results:
        values = [result.loss(name) for name in METRICS]
        cells = ["-" if v is None else f"{v:.4f}" for v in values]
        entry = result.entry
        runs.append([entry.name, f"{entry.num_parameters:,}", f"{entry.num_samples:,}", *cells])
    parts: list[str | Table] = [runs]
    if group.left_out:
        lines = [f"- left out: {name}: {why}" for name, why in group.left_out.items()]
        parts.append("\n".join(lines))
    if group.fit is None:
        return [*parts, f"No fit: {group.refusal}."]
    law, intervals = group.fit.law.named(), group.fit.intervals()
    formula = "E + A / N^a + B / D^b" if "a" in law else "E + B / D^b"
    parts.append(f"{group.metric} = {formula}, {LEVEL:.0%} intervals from resampled residuals:")
    parameters: Table = [["parameter", "value", "interval"]]
    for name, value in law.items():
        parameters.append([name, f"{value:.4g}", _range(intervals[name])])
    parts.append(parameters)
    if group.fit.held_out_error is not None:
        parts.append(
            "A fit without the largest D predicts it with an error of at most "
            f"{group.fit.held_out_error:.1%}."
        )
    predicted: Table = [["largest model at", "loss", "interval", "doubt"]]
    for row in predictions(group, targets):
        samples, loss = f"{row['samples']:,.0f} samples", f"{row['loss']:.4g}"
        predicted.append([samples, loss, _range(row["interval"]), row["doubt"] or "-"])
    parts.append(predicted)
    if group.fit.warnings:
        parts.append("Where this fit is weak:")
        parts.append("\n".join(f"- {warning}" for warning in group.fit.warnings))
    return parts


def _range(interval: Sequence[float]) -> str:
    low, high = interval
    return f"{low:.4g} to {high:.4g}"


def draw(group: GroupFit, targets: Sequence[float], path: Path) -> Path:
    """Draw loss over samples: a curve and its interval per model size, dashed beyond the data."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from megatron_croc.monitoring.run_report.style import GREY, LINE_COLOURS, RC

    points = to_points(group.results, group.metric)
    with plt.rc_context(RC):
        figure, axes = plt.subplots(figsize=(7.5, 4.6), constrained_layout=True)
        last = points.samples.max()
        # Targets two decades beyond the data would squeeze the data into a corner.
        end = min(max([last, *targets]), 30 * last)
        grid = np.geomspace(points.samples.min(), end, 120)
        for size, colour in zip(sorted(set(points.parameters)), LINE_COLOURS, strict=False):
            mine = points.parameters == size
            axes.plot(
                points.samples[mine],
                points.losses[mine],
                "o",
                color=colour,
                label=f"N = {size:,.0f}",
            )
            if group.fit is None:
                continue
            curve = group.fit.law.predict(size, grid)
            draws = np.stack([law.predict(size, grid) for law in group.fit.resampled])
            low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
            inside = grid <= last
            axes.plot(grid[inside], curve[inside], color=colour)
            axes.plot(grid[~inside], curve[~inside], "--", color=colour)
            axes.fill_between(grid, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.axvline(last, color=GREY, linestyle=":", linewidth=1)
        axes.set_xscale("log")
        if points.losses.max() / points.losses.min() > math.e:
            axes.set_yscale("log")
        axes.set_xlabel("samples D")
        axes.set_ylabel(group.metric)
        axes.set_title("Held-out loss; dashed: extrapolated; band: interval of the curve")
        axes.legend(frameon=False)
        figure.savefig(path, dpi=130)
        plt.close(figure)
    return path
