"""Inputs and outputs of `CrocModel`, and the values that its forward passes of one step share.

Letters in shapes: T positions of a pack, n images, N visual tokens of one image, R replaced tokens
of one image, P pool tokens, D hidden size of the language model, C vocabulary, L labelled positions
of one context-parallel rank.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_croc.model.prompt_pool import PendingReplacement, Replacement
from megatron_croc.ops.mixed_mask import MixedMask
from megatron_croc.ops.special_ids import IGNORE_INDEX
from megatron_croc.parallel.context import split_sequence


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Positions of one pack with a text loss, those of one context-parallel rank.

    Only these positions get logits. They are chosen on the CPU, before the forward pass, so that no
    rank reads the device for their number.
    """

    positions: Tensor
    """int64 [L], indices into this rank's part of the pack, ascending; L >= 1."""

    ids: Tensor
    """int64 [L], token that each position predicts. A rank without a label has one position with
    IGNORE_INDEX, whose loss is not counted: its graph is the same as that of other ranks."""

    num_in_pack: int
    """Number of labelled positions of the whole pack, on all context-parallel ranks."""

    @classmethod
    def of_pack(cls, labels: Tensor, cp: dist.ProcessGroup) -> "Labels":
        """Select this rank's labelled positions.

        Args:
            labels: int64 [T] on the CPU, shifted, IGNORE_INDEX without a text loss.
            cp: context-parallel group.
        """
        own = split_sequence(labels, cp)
        positions = (own != IGNORE_INDEX).nonzero().squeeze(1)
        if positions.numel() == 0:
            positions = positions.new_zeros(1)
        return cls(
            positions=positions,
            ids=own[positions],
            num_in_pack=int((labels != IGNORE_INDEX).sum()),
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Labels":
        """Copy the positions and ids to `device`."""
        return replace(
            self,
            positions=self.positions.to(device, non_blocking=non_blocking),
            ids=self.ids.to(device, non_blocking=non_blocking),
        )


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """One pack on the device; n may be 0."""

    input_ids: Tensor
    """int64 [T], negative at visual tokens."""

    labels: Labels | None
    """Labelled positions; None: the model returns the logits of every position."""

    mixed_mask: MixedMask
    """Attention mask of length T."""

    image_starts: Tensor
    """int64 [n], position of each image's first visual token."""

    replaced: Tensor
    """bool [n, N], True where a visual token is replaced by a pool token."""

    pixel_values: Tensor | None
    """[n, 3, height, width], uint8 or normalised; needed on the first pipeline stage only."""

    image_seeds: tuple[int, ...] = ()
    """Dropout seeds of the reconstruction head, one per image; empty: no dropout."""


@dataclass(frozen=True, kw_only=True)
class ModelOutput:
    """Output of the last pipeline stage. Losses are sums; the caller divides by counts."""

    text_loss_sum: Tensor | None
    """float32 scalar over this CP rank's labelled positions; None without labels."""

    reconstruction_loss_sum: Tensor
    """float32 scalar over every element of this CP rank's images; 0 outside pretrain_croc."""

    logits: Tensor | None = None
    """[T / CP, C / TP]; only without labels."""

    hidden_states: Tensor | None = None
    """[T / CP, 1, D], after the final norm."""

    reconstruction: Tensor | None = None
    """[n, N, D], output of the reconstruction head for this CP rank's images."""


class EmbeddedImages(NamedTuple):
    """Images of one micro-batch before their visual tokens are replaced."""

    visual: Tensor
    """Visual embeddings [n, N, D]."""

    zero_term: Tensor | float
    """Zero that ties a dummy image into the graph."""

    pending: PendingReplacement | None = None
    """Matching of the images, if it was started early."""


@dataclass(kw_only=True, eq=False)
class StepContext:
    """Values shared by the forward passes of one step on the first pipeline stage.

    The caller creates one per step and passes it to every forward pass of that step, because
    megatron's schedules carry only tensors from one call to the next.
    """

    on_replacement: Callable[[Replacement], None] | None = None
    """Called with the replacement of each micro-batch."""

    embedded_ahead: tuple[ModelInputs, EmbeddedImages] | None = None
    """The next micro-batch and its images, if they were embedded early."""

    def take_embedded(self, inputs: ModelInputs) -> EmbeddedImages | None:
        """Remove and return the early embedded images of `inputs`; None if there are none."""
        ahead, self.embedded_ahead = self.embedded_ahead, None
        return ahead[1] if ahead is not None and ahead[0] is inputs else None
