"""Comparison with a recording: activations, mask, losses, every gradient."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_croc.data.batch import IMAGE_TOKEN_INDEX, Batch
from megatron_croc.verification.golden.case import SPLIT_IMAGE, Case

ROUNDING = 1e-6
"""A gradient this small beside the largest one is an exact zero plus rounding (a key bias inside a
softmax is); the two roundings have nothing to do with each other, so only its size is checked."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the comparison."""

    what: str
    error: float
    note: str = ""
    counts: bool = True
    """True when an error above the bound is a failure."""


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Largest difference divided by the reference's largest entry; infinity on other shapes."""
    if ours.shape != reference.shape:
        return math.inf
    if reference.numel() == 0:
        return 0.0
    difference = (ours.double() - reference.double()).abs().max().item()
    error = difference / max(reference.double().abs().max().item(), 1e-12)
    return error if math.isfinite(error) else math.inf


def compare_forward(
    case: Case, batch: Batch, seen: dict[str, Tensor], losses: dict[str, float]
) -> Iterator[Finding]:
    """Compare activations, mask and losses."""
    reference = case.tensors
    has_image = (reference["in_input_ids"] == IMAGE_TOKEN_INDEX).any(dim=1)
    real = reference["merged_attention_mask"]
    if has_image.any():
        for name, label in {
            "vision_features": "vision features",
            "image_features_l2": "visual embeddings",
        }.items():
            if name in reference:
                yield Finding(
                    what=label, error=relative_error(seen[name], reference[name][has_image])
                )
    if reference.get("pool_index") is not None and reference["pool_index"].numel():
        wrong = (seen["pool_index"] != reference["pool_index"]).sum().item()
        yield Finding(
            what="pool indices",
            error=wrong / reference["pool_index"].numel(),
            note=f"{wrong} of {reference['pool_index'].numel()} differ",
        )
    yield Finding(what="mask", error=float(_mask_differences(batch, reference, real)))
    num_real = int(real.sum())
    vocabulary = reference["logits"].shape[-1]
    yield Finding(
        what="logits (real tokens)",
        error=relative_error(seen["logits"][:num_real, :vocabulary], reference["logits"][real]),
    )
    yield Finding(what="text loss", error=abs(losses["text"] / reference["text_loss"].item() - 1.0))
    if not case.has_reconstruction:
        return
    note = SPLIT_IMAGE if case.splits_images else ""
    counts = not case.splits_images
    recorded = reference["smooth_l1_mean"].item()
    yield Finding(
        what="reconstruction loss",
        error=abs(losses["reconstruction"] - recorded) / max(abs(recorded), 1e-12)
        if recorded or losses["reconstruction"]
        else 0.0,
        note=note,
        counts=counts,
    )
    yield Finding(
        what="total loss",
        error=abs(losses["loss"] / reference["loss"].item() - 1.0),
        note=note,
        counts=counts,
    )


def _mask_differences(batch: Batch, reference: dict[str, Tensor], real: Tensor) -> int:
    """Number of query-key pairs of real tokens on which the masks differ, across samples too."""
    visible = batch.mixed_mask.visible()
    bounds = batch.mixed_mask.cu_seqlens.tolist()
    theirs = torch.zeros_like(visible)
    for sample, (begin, end) in enumerate(itertools.pairwise(bounds)):
        rows = real[sample]
        seen = reference["layer_attention_visible"][sample, 0][rows][:, rows]
        theirs[begin:end, begin:end] = seen
    num_real = bounds[-1]
    return int((visible ^ theirs)[:num_real, :num_real].sum())


def compare_gradients(case: Case, ours: dict[str, Tensor]) -> Iterator[Finding]:
    """Compare every recorded gradient, and the norm of those that were recorded as a norm."""
    note = SPLIT_IMAGE if case.splits_images else ""
    counts = not case.splits_images
    norms = case.info.get("grad_norm", {})
    largest = max(norms.values(), default=0.0)
    for name, norm in norms.items():
        label = f"grad {name}"
        reference = _recorded_gradient(case, name)
        if name not in ours:
            yield Finding(what=label, error=math.inf, note="no gradient here")
        elif norm < ROUNDING * largest:
            error = ours[name].double().norm().item() / largest
            yield Finding(what=label, error=error, note="zero up to rounding")
        elif reference is not None:
            grad = ours[name][: reference.shape[0]]
            padding = reference.shape[0] - grad.shape[0]  # positions that images never reach
            grad = nn.functional.pad(grad, (0, 0, 0, padding)) if padding else grad
            error = relative_error(grad, reference)
            yield Finding(what=label, error=error, note=note, counts=counts)
        else:
            error = abs(ours[name].double().norm().item() - norm) / norm
            yield Finding(what=label, error=error, note=note or "norm only", counts=counts)


def _recorded_gradient(case: Case, name: str) -> Tensor | None:
    if f"grad.{name}" in case.tensors:
        return case.tensors[f"grad.{name}"]
    if f"grad_rows.{name}" not in case.tensors:
        return None
    rows = case.tensors[f"grad_rows.{name}"]
    full = torch.zeros(case.state[name].shape[0], *rows.shape[1:])
    full[case.tensors[f"grad_rows_index.{name}"]] = rows
    return full
