"""Comparison of a layout with one process: errors, table, failures."""

import math
from dataclasses import dataclass

from torch import Tensor

from megatron_croc.verification.layouts.observe import Observation

BOUNDS = {
    "fp32": {"loss": 1e-5, "grad_norm": 1e-4, "gradient": 1e-4, "weight": 1e-4},
    # bfloat16 keeps 8 bits: a reordered sum differs by up to 2^-8 of its terms.
    "bf16": {"loss": 2e-2, "grad_norm": 5e-2, "gradient": 1e-1, "weight": 2e-2},
}
"""Largest relative differences, per dtype of the weights."""


ROUNDING = 1e-6
"""A gradient this small beside the largest one is an exact zero plus rounding."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Differences between one layout and the reference."""

    layout: str
    loss: float
    grad_norm: float
    gradient: float
    weight: float
    worst_gradient: str
    worst_weight: str
    gradients: dict[str, float]
    """Error of every parameter's gradient."""

    def failures(self, bounds: dict[str, float]) -> list[str]:
        """Quantities above their bound."""
        return [name for name, bound in bounds.items() if not getattr(self, name) <= bound]


def norm_error(ours: Tensor, reference: Tensor) -> float:
    """|ours - reference| / |reference|, infinity when a number is not finite."""
    difference = (ours.double() - reference.double()).norm().item()
    error = difference / max(reference.double().norm().item(), 1e-30)
    return error if math.isfinite(error) else math.inf


def _cut_padding(ours: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Split a tensor into the rows of the reference, and rows that pad a vocabulary for TP."""
    if ours.shape[1:] != reference.shape[1:]:
        return ours, ours[:0]  # another shape: comparing it raises
    return ours[: len(reference)], ours[len(reference) :]


def _weight_error(
    ours: Tensor, reference: Tensor, gradient: Tensor | None, largest: float
) -> float:
    """Error of the entries whose gradient is not rounding, without the worst in a thousand.

    Adam makes a full step out of any gradient, however small. Where it is an exact zero plus
    rounding (a key bias inside a softmax) the step's direction is random, at every layout another;
    and in a large tensor some entry always passes close by zero in some step.
    """
    if gradient is not None and gradient.any():
        if gradient.double().norm().item() < ROUNDING * largest:
            return 0.0
        size = gradient.abs()
        real = (size > 1e-4 * size.max()) | (size == 0.0)
        ours, reference = ours[real], reference[real]
        outliers = max(1, reference.numel() // 1000)
        kept = (ours - reference).abs().argsort()[: reference.numel() - outliers]
        ours, reference = ours[kept], reference[kept]
    return norm_error(ours, reference)


def compare(name: str, ours: Observation, reference: Observation) -> Difference:
    """Errors of one layout; gradients far below the largest are measured against it."""
    largest = max(g.double().norm().item() for g in reference.gradients.values())
    floor = ROUNDING * largest

    def gradient_error(key: str) -> float:
        if key not in ours.gradients:
            return math.inf
        norm = reference.gradients[key].double().norm().item()
        gradient, padding = _cut_padding(ours.gradients[key], reference.gradients[key])
        if padding.any():  # no token and no logit is there
            return math.inf
        error = norm_error(gradient, reference.gradients[key])
        return error * min(1.0, norm / floor) if floor else error

    gradients = {key: gradient_error(key) for key in reference.gradients}

    def weight_error(key: str) -> float:
        if key not in ours.weights:
            return math.inf
        weight, _ = _cut_padding(ours.weights[key], reference.weights[key])
        return _weight_error(weight, reference.weights[key], reference.gradients.get(key), largest)

    weights = {key: weight_error(key) for key in reference.weights}
    worst_gradient = max(gradients, key=gradients.__getitem__)
    worst_weight = max(weights, key=weights.__getitem__)

    def step_error(*names: str) -> float:
        pairs = zip(ours.steps, reference.steps, strict=True)
        return max(
            abs(a[n] - b[n]) / max(abs(b[n]), 1e-30) if a[n] != b[n] else 0.0
            for a, b in pairs
            for n in names
        )

    return Difference(
        layout=name,
        loss=step_error("text_loss", "reconstruction_loss"),
        grad_norm=step_error("grad_norm"),
        gradient=gradients[worst_gradient],
        weight=weights[worst_weight],
        worst_gradient=worst_gradient,
        worst_weight=worst_weight,
        gradients=gradients,
    )


HEAD = f"{'layout':18s} {'loss':>9s} {'grad norm':>9s} {'gradient':>9s} {'weight':>9s}  worst"
"""Column titles of `row`."""


def row(difference: Difference, bounds: dict[str, float]) -> str:
    """Format one line: largest errors, a mark at those above their bound, worst parameter."""
    failed = difference.failures(bounds)
    cells = [
        f"{getattr(difference, name):8.1e}{'!' if name in failed else ' '}"
        for name in ("loss", "grad_norm", "gradient", "weight")
    ]
    by_weight = failed == ["weight"]
    worst = difference.worst_weight if by_weight else difference.worst_gradient
    return f"{difference.layout:18s} {' '.join(cells)}  {'FAILED ' if failed else ''}{worst}"
