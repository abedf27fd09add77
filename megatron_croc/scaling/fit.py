"""Scaling law loss(N, D) = E + A / N^a + B / D^b, fitted in log space with intervals.

N is the number of trained parameters, D of samples. As in Hoffmann et al. (arXiv 2203.15556,
appendix D.2) the Huber loss of log residuals is minimised from many starts. With a single model
size the A term is part of E: loss(D) = E + B / D^b.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from megatron_croc.errors import DataError

HUBER_DELTA = 1e-3
"""Log residual beyond which a point counts linearly (Hoffmann et al.)."""

MAX_EXPONENT = 3.0
"""Upper bound of both exponents; a fit that ends there is not determined by the data."""

SPARE_POINTS = 2
"""Least number of points in excess of the parameters."""

LEVEL = 0.9
"""Probability mass of the intervals."""

FAR = 3.0
"""Factor over the largest N or D of the data above which a prediction carries a warning."""


@dataclass(frozen=True, kw_only=True)
class Points:
    """Measured losses: three arrays of equal length."""

    parameters: np.ndarray
    samples: np.ndarray
    losses: np.ndarray

    def __len__(self) -> int:
        """Number of points."""
        return len(self.losses)

    def select(self, kept: np.ndarray) -> "Points":
        """The points where `kept` is True."""
        return Points(
            parameters=self.parameters[kept], samples=self.samples[kept], losses=self.losses[kept]
        )


@dataclass(frozen=True, kw_only=True)
class Law:
    """One fitted curve. Inside, A and B are logs at the data's geometric mean, for conditioning."""

    theta: np.ndarray
    """log E, log B', b, and with several sizes log A', a."""

    mean_parameters: float
    mean_samples: float

    def predict(self, parameters: np.ndarray | float, samples: np.ndarray | float) -> np.ndarray:
        """Losses at these N and D."""
        return np.exp(
            _log_loss(
                self.theta,
                np.asarray(parameters, float) / self.mean_parameters,
                np.asarray(samples, float) / self.mean_samples,
            )
        )

    def named(self) -> dict[str, float]:
        """E, B, b (and A, a) of the formula above."""
        e, log_b, b = self.theta[:3]
        values = {"E": np.exp(e), "B": np.exp(log_b + b * np.log(self.mean_samples)), "b": b}
        if len(self.theta) == 5:
            log_a, a = self.theta[3:]
            values |= {"A": np.exp(log_a + a * np.log(self.mean_parameters)), "a": a}
        return {name: float(value) for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted law, its bootstrap resamples, and warnings."""

    law: Law
    points: Points
    resampled: list[Law]
    held_out_error: float | None
    """Largest relative error on the largest D, predicted by a fit without it."""

    warnings: list[str]

    def interval(self, values: Sequence[float] | np.ndarray) -> tuple[float, float]:
        """Bounds of the central share LEVEL of `values`."""
        low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Interval of every named parameter."""
        draws = [law.named() for law in self.resampled]
        return {name: self.interval([d[name] for d in draws]) for name in self.law.named()}

    def predict_interval(self, parameters: float, samples: float) -> tuple[float, float]:
        """Interval of the loss at one N and D: of the curve, not of a single run."""
        return self.interval([float(law.predict(parameters, samples)) for law in self.resampled])


def _terms(theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Logs of the law's two or three terms, stacked."""
    terms = [theta[0] + 0 * n * d, theta[1] - theta[2] * np.log(d)]
    if len(theta) == 5:
        terms.append(theta[3] - theta[4] * np.log(n))
    return np.stack(np.broadcast_arrays(*terms))


def _log_loss(theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    return np.logaddexp.reduce(_terms(theta, n, d))


def _jacobian(theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Jacobian of `_log_loss`: [points, parameters]."""
    terms = _terms(theta, n, d)
    shares = np.exp(terms - np.logaddexp.reduce(terms))
    columns = [shares[0], shares[1], -shares[1] * np.log(d)]
    if len(theta) == 5:
        columns += [shares[2], -shares[2] * np.log(n)]
    return np.stack(columns, axis=1)


def fit_law(points: Points, *, resamples: int = 200, seed: int = 0) -> Fit:
    """Fit the law, bootstrap its residuals and collect warnings.

    Args:
        points: finite, positive losses.
        resamples: bootstrap fits behind the intervals.
        seed: of the resampling.

    Raises:
        DataError: too few points, sizes or sample counts to hold the parameters.
    """
    check_points(points)
    law = _fit(points)
    residuals = np.log(points.losses) - np.log(law.predict(points.parameters, points.samples))
    # Residuals of a fit are smaller than the noise; this undoes it for a linear one.
    scale = np.sqrt(len(points) / max(len(points) - len(law.theta), 1))
    rng = np.random.default_rng(seed)
    fitted = law.predict(points.parameters, points.samples)
    resampled = []
    for _ in range(resamples):
        noise = scale * rng.choice(residuals - residuals.mean(), len(points))
        drawn = Points(
            parameters=points.parameters,
            samples=points.samples,
            losses=fitted * np.exp(noise),
        )
        resampled.append(_fit(drawn, near=law))
    held_out = _held_out_error(points)
    fit = Fit(law=law, points=points, resampled=resampled, held_out_error=held_out, warnings=[])
    fit.warnings.extend(_doubts(fit, residuals))
    return fit


def check_points(points: Points) -> None:
    """Refuse points that cannot hold the parameters of a law.

    Raises:
        DataError: too few points, sizes or sample counts, or a loss that is not positive.
    """
    if not (np.isfinite(points.losses).all() and (points.losses > 0).all()):
        raise DataError("a loss is not a positive number: leave that run out of the fit")
    sizes, counts = len(set(points.parameters)), len(set(points.samples))
    num_parameters = 3 if sizes == 1 else 5
    needed = num_parameters + SPARE_POINTS
    if len(points) < needed:
        raise DataError(
            f"{len(points)} runs: {num_parameters} parameters need at least {needed}; "
            "add samples or sizes to the grid"
        )
    if counts < 3:
        raise DataError(f"{counts} different sample counts: an exponent needs at least 3")
    if sizes == 2:
        raise DataError("2 model sizes: an exponent needs at least 3; leave one out or add one")


def _fit(points: Points, *, near: Law | None = None) -> Law:
    """The best of many starts, or of a few around a known law."""
    mean_n = float(np.exp(np.log(points.parameters).mean()))
    mean_d = float(np.exp(np.log(points.samples).mean()))
    n, d, target = points.parameters / mean_n, points.samples / mean_d, np.log(points.losses)
    has_sizes = len(set(points.parameters)) > 1
    lowest = np.log(points.losses.min())
    top = np.log(points.losses.max()) + 3
    low = [lowest - 12, lowest - 12, 1e-3] + [lowest - 12, 1e-3] * has_sizes
    high = [lowest, top, MAX_EXPONENT] + [top, MAX_EXPONENT] * has_sizes
    best = None
    for start in _starts(lowest, has_sizes) if near is None else _near(near):
        result = least_squares(
            lambda theta: _log_loss(theta, n, d) - target,
            np.clip(start, np.add(low, 1e-6), np.subtract(high, 1e-6)),
            jac=lambda theta: _jacobian(theta, n, d),  # type: ignore[arg-type]
            bounds=(low, high),
            loss="huber",
            f_scale=HUBER_DELTA,
            max_nfev=100 if near is None else 50,
        )
        if best is None or result.cost < best.cost:
            best = result
    assert best is not None
    return Law(theta=best.x, mean_parameters=mean_n, mean_samples=mean_d)


def _starts(lowest: float, has_sizes: bool) -> Iterator[list[float]]:
    for e in (lowest - 0.1, lowest - 0.7, lowest - 3):
        for log_b in (lowest - 0.5, lowest - 2.5):
            for b in (0.2, 0.6, 1.2):
                if not has_sizes:
                    yield [e, log_b, b]
                    continue
                for a in (0.2, 0.8):
                    yield [e, log_b, b, lowest - 1.5, a]


def _near(law: Law) -> Iterator[np.ndarray]:
    yield law.theta
    yield law.theta + np.resize([-0.3, 0.2, 0.1], len(law.theta))


def _held_out_error(points: Points) -> float | None:
    """Fit without the largest D and predict it; None when too little would be left."""
    kept = points.samples < points.samples.max()
    rest, out = points.select(kept), points.select(~kept)
    try:
        check_points(rest)
    except DataError:
        return None
    law = _fit(rest)
    predicted = law.predict(out.parameters, out.samples)
    return float(np.abs(predicted / out.losses - 1).max())


def _doubts(fit: Fit, residuals: np.ndarray) -> Iterator[str]:
    points, named = fit.points, fit.law.named()
    spare = len(points) - len(fit.law.theta)
    if spare < 5:
        yield f"only {spare} more points than parameters: the fit has little to contradict it"
    for name in ("a", "b"):
        if name in named and not 0.01 < named[name] < MAX_EXPONENT - 0.01:
            yield f"{name} = {named[name]:.2f} is at its bound: the data do not determine it"
    if named["E"] < 0.01 * points.losses.min():
        yield "E is near 0: the losses have not begun to level off, so E is unknown"
    intervals = fit.intervals()
    for name, (low, high) in intervals.items():
        if name in ("E", "a", "b") and high - low > named[name]:
            yield (
                f"{name} = {named[name]:.3g} is loose: its {LEVEL:.0%} interval is {low:.3g} to "
                f"{high:.3g}"
            )
    for name, values in {"D": points.samples, "N": points.parameters}.items():
        spread = values.max() / values.min()
        if 1 < spread < 10:
            yield f"{name} spans a factor of {spread:.1f} only: an exponent wants 10 or more"
    worst = float(np.abs(residuals).max())
    if worst > 0.03:
        yield f"a point lies {worst:.1%} off the curve: noise, or not this law"
    if fit.held_out_error is None:
        yield "too few points to fit without the largest D, so extrapolation is untested"
    elif fit.held_out_error > 0.05:
        yield (
            f"a fit without the largest D misses it by {fit.held_out_error:.1%}: do not extrapolate"
        )


def extrapolation_doubt(fit: Fit, parameters: float, samples: float) -> str | None:
    """Warning for a prediction far beyond the data; None where there is none."""
    points = fit.points
    factors = {
        "D": samples / points.samples.max(),
        "N": max(parameters / points.parameters.max(), points.parameters.min() / parameters),
    }
    far = [
        f"{name} {factor:.1f}x beyond the data" for name, factor in factors.items() if factor > FAR
    ]
    return ", ".join(far) or None
