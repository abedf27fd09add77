"""One micro-batch as one pack of tokens: the input of a training step.

sample A: text . . [image 0: N tokens] . . text | sample B: text only | ... | padding
input_ids   real ids; IMAGE_TOKEN_INDEX at visual positions; pad id in the padding
labels      the id each position must predict (already shifted by one); IGNORE_INDEX elsewhere
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from megatron_croc.ops.mixed_mask import MixedMask
from megatron_croc.ops.special_ids import IGNORE_INDEX as IGNORE_INDEX
from megatron_croc.ops.special_ids import IMAGE_TOKEN_INDEX as IMAGE_TOKEN_INDEX


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch. T positions in the pack, n images of N visual tokens each (n may be 0)."""

    input_ids: Tensor
    """int64 [T]."""

    labels: Tensor
    """int64 [T], shifted: labels[t] is the token after t in the same sample, or IGNORE_INDEX."""

    mixed_mask: MixedMask
    """Sample boundaries and bidirectional spans."""

    image_starts: Tensor
    """int64 [n], position of each image's first visual token; ascending."""

    replaced: Tensor
    """bool [n, N], True where a visual token is to be replaced by a pool token."""

    image_seeds: tuple[int, ...]
    """One per image (ops.patch_selection.image_seed); the reconstruction head's dropout uses it."""

    pixel_values: Tensor | None
    """uint8 [n, 3, height, width], or float already normalised; None on ranks without a tower."""

    sample_ids: tuple[str, ...]
    """Name of each sample, for error messages."""

    @property
    def num_images(self) -> int:
        """Number of images in the micro-batch."""
        return self.image_starts.numel()

    @property
    def num_label_tokens(self) -> int:
        """Number of positions that have a text loss (reads the tensor: call it on the CPU)."""
        return int((self.labels != IGNORE_INDEX).sum())

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """Copy the batch to `device`."""
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=non_blocking)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor | MixedMask)
        }
        return replace(self, **moved)
