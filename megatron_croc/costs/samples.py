"""Predicted operations of each sample, from what is known before it is read: tokens and images."""

from dataclasses import dataclass

import numpy as np

from megatron_croc.config.run import RunConfig
from megatron_croc.costs.flops import Work, count_flops


@dataclass(frozen=True, kw_only=True)
class SampleCost:
    """Operations of training as a linear function of what a sample holds."""

    per_token: float
    """Operations of a token of the language model."""

    per_pair: float
    """Operations of a visible query-key pair."""

    per_label: float
    """Operations of a labelled position: its logits."""

    per_image: float
    """Operations of an image: vision tower, projector, matching, reconstruction head."""

    num_visual_tokens: int
    """N, visual tokens of an image."""

    has_spans: bool
    """The mask is bidirectional inside images (visual), or up to the answer (prefix)."""

    @classmethod
    def build(cls, run: RunConfig) -> "SampleCost":
        """Read the operations off `count_flops`, which is linear in each of its counts.

        Four digits are kept: the numbers are part of the identity of an order of samples.
        """

        def operations(**counts: int) -> float:
            zeros = {"num_tokens": 0, "num_pairs": 0, "num_labels": 0, "num_images": 0}
            return float(f"{sum(count_flops(run, Work(**zeros | counts)).values()):.4g}")

        return cls(
            per_token=operations(num_tokens=1),
            per_pair=operations(num_pairs=1),
            per_label=operations(num_labels=1),
            per_image=operations(num_images=1),
            num_visual_tokens=run.model.vision_tower.num_visual_tokens,
            has_spans=run.model.attention_mask_type != "causal",
        )

    def __call__(self, tokens: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Predict the operations of samples, float64 [m].

        Args:
            tokens: [m], tokens of each sample, visual ones included.
            images: [m], its images.

        Every text token counts as labelled, and a prefix as no longer than its images: the answer's
        length is not known before a sample is read.
        """
        span = self.num_visual_tokens
        pairs = tokens * (tokens + 1.0) / 2
        if self.has_spans:
            pairs += images * (span * (span - 1.0) / 2)
        labels = np.maximum(tokens - images * span, 0)
        return (
            tokens * self.per_token
            + pairs * self.per_pair
            + labels * self.per_label
            + images * self.per_image
        )

    def __str__(self) -> str:
        """Text such as "4.04e+10 a token, 1.57e+06 a pair, 7.86e+08 a label, 3.8e+11 an image"."""
        mask = "bidirectional" if self.has_spans else "causal"
        return (
            f"{self.per_token:g} a token, {self.per_pair:g} a pair ({mask}), "
            f"{self.per_label:g} a label, {self.per_image:g} an image of {self.num_visual_tokens}"
        )
