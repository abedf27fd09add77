"""Images of a micro-batch dealt to the TP x CP ranks that hold it, and their results gathered.

    images of a micro-batch   0 1 2 3 4
    rank 0 of 2               0   2   4      rank r has the images r, r + TP * CP, ...
    rank 1 of 2                 1   3

The share follows from the number of images alone, which every rank knows on the host. Matching and
(with `split_vision` images) the vision tower use the same share.
"""

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_croc.parallel.collectives import all_gather, all_reduce


class ImageShare:
    """This rank's share of the images of any micro-batch."""

    def __init__(self, pg_collection: ProcessGroupCollection) -> None:
        """Take the groups; the images are dealt to the ranks of `tp_cp`."""
        self._groups = pg_collection
        self.tp, self.cp = pg_collection.tp, pg_collection.cp
        self.size = self.tp.size() * self.cp.size()
        self.rank = self.cp.rank() * self.tp.size() + self.tp.rank()

    @property
    def group(self) -> dist.ProcessGroup:
        """Ranks that share the images; `rank` is the place in it (TP varies fastest)."""
        return self._groups.tp_cp

    def own(self, per_image: Tensor) -> Tensor:
        """[n, ...] of all images -> [m, ...] of this rank's."""
        return per_image[self.rank :: self.size]

    def gather(self, own: Tensor, num_images: int) -> Tensor:
        """[m, ...] of this rank's images -> [n, ...] of all images in order, on every rank.

        Backward sums the gradients of the context-parallel ranks, each of which has those of its
        part of the pack, and takes this rank's images. Tensor-parallel ranks have equal gradients.
        The sum is exact in any dtype where each value is zero on all ranks but one.

        Args:
            own: of this rank's images, m = 0 included.
            num_images: n.
        """
        if self.size == 1 or num_images == 0:
            return own
        gathered = _Gather.apply(own, self, num_images)
        assert isinstance(gathered, Tensor)
        return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own: Tensor, share: ImageShare, num_images: int) -> Tensor:  # type: ignore[override]
        ctx.share, ctx.num_own = share, len(own)
        padded = _pad(own, -(-num_images // share.size))  # a rank with one image less sends zeros
        gathered = all_gather(padded, share.group)
        return gathered.transpose(0, 1).flatten(0, 1)[:num_images]

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        share: ImageShare = ctx.share
        tp, cp = share.tp, share.cp
        rows = -(-len(grad) // share.size)
        by_rank = _pad(grad, rows * share.size).unflatten(0, (rows, cp.size(), tp.size()))
        # An all-reduce, because gloo has no reduce-scatter.
        total = by_rank[:, :, tp.rank()].contiguous()
        all_reduce(total, group=cp)
        return total[: ctx.num_own, cp.rank()], None, None


def _pad(x: Tensor, length: int) -> Tensor:
    """Append zeros to [m, ...] up to [length, ...]."""
    missing = length - len(x)
    x = x.contiguous()
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x
