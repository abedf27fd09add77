import itertools

import numpy as np
import pytest

from megatron_croc.errors import DataError
from megatron_croc.scaling import fit as fitting
from megatron_croc.scaling.fit import Fit, Points, extrapolation_doubt, fit_law

TRUE = {"E": 1.7, "A": 400.0, "a": 0.34, "B": 60.0, "b": 0.28}


def synthetic(sizes, samples, *, noise: float, seed: int = 0) -> Points:
    pairs = np.array(list(itertools.product(sizes, samples)), float)
    n, d = pairs.T
    loss = TRUE["E"] + TRUE["A"] / n ** TRUE["a"] + TRUE["B"] / d ** TRUE["b"]
    rng = np.random.default_rng(seed)
    return Points(parameters=n, samples=d, losses=loss * np.exp(rng.normal(0, noise, len(loss))))


def test_known_parameters_come_back():
    points = synthetic(np.geomspace(1e7, 1e10, 5), np.geomspace(1e4, 1e7, 6), noise=0.001)
    fit = fit_law(points, resamples=10)
    named = fit.law.named()
    for name in ("E", "a", "b"):
        assert named[name] == pytest.approx(TRUE[name], rel=0.1), name
        low, high = fit.intervals()[name]
        assert 0.99 * low < TRUE[name] < 1.01 * high, name
    truth = TRUE["E"] + TRUE["A"] / 7e9 ** TRUE["a"] + TRUE["B"] / 3e7 ** TRUE["b"]
    assert fit.law.predict(7e9, 3e7) == pytest.approx(truth, rel=0.01)
    assert fit.held_out_error is not None and fit.held_out_error < 0.01
    assert fit.warnings == []


def test_an_outlier_hardly_moves_the_fit():
    points = synthetic(np.geomspace(1e7, 1e10, 4), np.geomspace(1e4, 1e7, 5), noise=0.0)
    points.losses[7] *= 1.5
    named = fit_law(points, resamples=2).law.named()
    assert named["b"] == pytest.approx(TRUE["b"], rel=0.05)


def test_one_size_has_no_size_term():
    points = synthetic([1e9], np.geomspace(1e4, 1e7, 8), noise=0.0)
    named = fit_law(points, resamples=2).law.named()
    assert set(named) == {"E", "B", "b"}
    assert named["b"] == pytest.approx(TRUE["b"], rel=0.02)


@pytest.mark.parametrize(
    ("sizes", "samples", "message"),
    [
        ([1e8, 1e9, 1e10], [1e4, 1e5], "6 runs: 5 parameters need at least 7"),
        ([1e8, 1e9, 1e10, 1e11], [1e4, 1e5], "2 different sample counts"),
        ([1e8, 1e9], [1e3, 1e4, 1e5, 1e6], "2 model sizes"),
    ],
)
def test_too_little_is_refused(sizes, samples, message):
    with pytest.raises(DataError, match=message):
        fit_law(synthetic(sizes, samples, noise=0.0), resamples=2)


def test_nan_is_refused():
    points = synthetic([1e9], np.geomspace(1e4, 1e7, 8), noise=0.0)
    points.losses[0] = np.nan
    with pytest.raises(DataError, match="leave that run out"):
        fit_law(points, resamples=2)


def test_weak_fits_say_so():
    points = synthetic([1e9], np.geomspace(1e4, 2e4, 5), noise=0.02)
    fit = fit_law(points, resamples=20)
    text = " ".join(fit.warnings)
    assert "more points than parameters" in text and "D spans a factor of 2.0" in text
    assert extrapolation_doubt(fit, 1e9, 1e6) == "D 50.0x beyond the data"
    assert extrapolation_doubt(fit, 1e9, 2e4) is None


def test_resampled_residuals_are_widened_by_the_parameters(monkeypatch):
    points = synthetic([1e9], np.geomspace(1e4, 1e7, 8), noise=0.02)
    fitted: list[Points] = []
    fit_one = fitting._fit

    def record(points: Points, **arguments):
        fitted.append(points)
        return fit_one(points, **arguments)

    monkeypatch.setattr(fitting, "_fit", record)
    law = fit_law(points, resamples=60).law
    curve = law.predict(points.parameters, points.samples)
    residuals = np.log(points.losses / curve)
    # 8 points, 3 parameters: the residuals have 5 degrees of freedom, so sqrt(8 / 5) each.
    allowed = np.sqrt(8 / 5) * (residuals - residuals.mean())
    noise = np.array([np.log(p.losses / curve) for p in fitted[1:61]])
    assert np.abs(noise[..., None] - allowed).min(axis=-1).max() < 1e-9
    assert noise.max() == pytest.approx(allowed.max())


def test_an_interval_is_the_central_nine_tenths():
    fit = Fit(law=None, points=None, resampled=[], held_out_error=None, warnings=[])  # type: ignore[arg-type]
    assert fit.interval(np.arange(101.0)) == pytest.approx((5.0, 95.0))
