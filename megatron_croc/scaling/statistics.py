"""Means over seeds, and differences of two arms that share their seeds.

The unit is the seed: all questions of one run share its weights, so they are not independent. A
difference is taken seed by seed (both arms start from the same weights and read the same data), and
tested with Student's t for pairs; several tests share the level by Holm's method.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.05
"""Probability of at least one false finding among tests that belong together."""


MIN_SEEDS = 3
"""Seeds below which a difference is not tested: two that agree by accident look certain."""


@dataclass(frozen=True, kw_only=True)
class Mean:
    """Mean over seeds."""

    value: float
    error: float
    """Standard error of the mean; nan for one seed."""

    num_seeds: int


@dataclass(frozen=True, kw_only=True)
class Difference(Mean):
    """Mean of the differences between two arms, seed by seed."""

    low: float
    high: float
    """Bounds of the 95 % interval (of this difference alone); nan for one seed."""

    p: float
    """Two-sided p-value of Student's t for pairs, not adjusted; nan below MIN_SEEDS seeds."""


def mean_of(values: Sequence[float]) -> Mean:
    """Return mean and standard error of one value per seed.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values")
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Mean(value=float(np.mean(values)), error=error, num_seeds=len(values))


def difference_of(values: Sequence[float], reference: Sequence[float]) -> Difference:
    """Compare one value per seed with that of the reference at the same seed.

    Where all differences are equal and not 0, p is 0; where all are 0, it is 1.

    Raises:
        ValueError: no values, or unequally many.
    """
    differences = [a - b for a, b in zip(values, reference, strict=True)]
    mean = mean_of(differences)
    low = high = p = math.nan
    if mean.num_seeds > 1:
        freedom = mean.num_seeds - 1
        half = float(stats.t.ppf(1 - LEVEL / 2, freedom)) * mean.error
        low, high = mean.value - half, mean.value + half
    if mean.num_seeds >= MIN_SEEDS:
        if mean.error > 0:
            p = float(2 * stats.t.sf(abs(mean.value) / mean.error, mean.num_seeds - 1))
        else:
            p = float(mean.value == 0)
    return Difference(**vars(mean), low=low, high=high, p=p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values of tests that belong together (Holm 1979); nan stays and is not counted."""
    adjusted = [math.nan] * len(p_values)
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[index] = largest
    return adjusted
