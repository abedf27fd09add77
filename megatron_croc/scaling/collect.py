"""Points of a fit, from finished runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_croc.errors import ConfigError, DataError
from megatron_croc.scaling.fit import Points, check_points
from megatron_croc.scaling.grid import Grid, GridRun
from megatron_croc.scaling.launch import final_validation, folder_of, read_metrics

METRICS = ("valid_loss", "valid_text_loss", "valid_reconstruction_loss")
"""Metrics that can be fitted, all on held-out samples."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run of the grid and its final validation."""

    entry: GridRun
    validation: dict | None
    """The last step's validation row; None when the run is not finished."""

    def loss(self, metric: str) -> float | None:
        """The metric where it is a positive number."""
        value = (self.validation or {}).get(metric)
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            return None
        return float(value)

    def why_left_out(self, metric: str) -> str | None:
        """Reason for leaving this run out of the fit; None if it is used."""
        if self.loss(metric) is not None:
            return None
        if self.validation is None:
            rows = read_metrics(folder_of(self.entry))
            step = max((row.get("iteration", 0) for row in rows), default=0)
            return f"not finished (step {step} of {self.entry.run.training.train_iters})"
        return f"{metric} is {self.validation.get(metric)}"


def collect(grid: Grid) -> list[Result]:
    """Every run of the grid with its last validation."""
    return [Result(entry=entry, validation=final_validation(entry)) for entry in grid.runs]


def label_of(entry: GridRun) -> str:
    """Name of the group a run is fitted with: its values of the further axes."""
    return ", ".join(f"{name} {value}" for name, value in entry.axes.items())


def shortages(grid: Grid) -> dict[str, str]:
    """Groups that no law can be fitted to even when every run finishes -> the reason."""
    planned: dict[str, list[GridRun]] = {}
    for entry in grid.runs:
        planned.setdefault(label_of(entry), []).append(entry)
    found: dict[str, str] = {}
    for label, entries in planned.items():
        points = Points(
            parameters=np.array([entry.num_parameters for entry in entries], float),
            samples=np.array([entry.num_samples for entry in entries], float),
            losses=np.ones(len(entries)),
        )
        try:
            check_points(points)
        except DataError as error:
            found[label] = str(error)
    return found


def groups(results: Sequence[Result], metric: str) -> dict[str, list[Result]]:
    """Usable results by the values of the further axes: each is fitted on its own.

    Raises:
        ConfigError: no run is usable.
    """
    found: dict[str, list[Result]] = {}
    for result in results:
        if result.loss(metric) is not None:
            found.setdefault(label_of(result.entry), []).append(result)
    if not found:
        reasons = sorted({str(r.why_left_out(metric)) for r in results})
        raise ConfigError(
            f"no run has a usable {metric} ({'; '.join(reasons[:3])}): run `launch` first"
        )
    return found


def to_points(results: Sequence[Result], metric: str) -> Points:
    """The points of one group."""
    losses = [result.loss(metric) for result in results]
    return Points(
        parameters=np.array([r.entry.num_parameters for r in results], float),
        samples=np.array([r.entry.num_samples for r in results], float),
        losses=np.array(losses, float),
    )
