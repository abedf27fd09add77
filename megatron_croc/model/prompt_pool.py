"""The learnable pool, and the replacement of visual tokens by its rows.

visual_embeddings [n, N, h]
    |  begin: rows chosen by `replaced` --> matching (beside other work, if it comes early)
    v
  forward: those rows taken from the pool (which gets their gradient), by index [n, R]
"""

from typing import NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_croc.config.run import RunConfig
from megatron_croc.model.matching import Matcher, MatchingSample, Pending
from megatron_croc.model.transformer_configs import params_dtype
from megatron_croc.ops.patch_selection import num_kept


class Begun(NamedTuple):
    """A micro-batch's replacement under way."""

    positions: Tensor
    """int64 [n, R], the tokens to replace, ascending."""

    matching: Pending
    """Their matching."""


class Replacement(NamedTuple):
    """Result of `PromptPool.forward`."""

    embeddings: Tensor
    """[n, N, h], replaced rows taken from the pool."""

    index: Tensor
    """int64 [n, R], pool row of each replaced token, ascending by position."""

    distance: Tensor
    """float32 [n, R], distance of each replaced token to its pool row."""

    seconds: float = 0.0
    """What the matching kept this process waiting, exchange included."""

    hidden_seconds: float = 0.0
    """What a thread searched meanwhile without keeping it waiting."""

    sample: MatchingSample | None = None
    """The first image this rank matched, if any."""

    num_unsolved: Tensor | int = 0
    """Images of this rank whose cost was not finite, where a GPU matched them."""


class PromptPool(nn.Module):
    """`pool_size` learnable tokens; `weight` is [P, h]."""

    def __init__(self, run: RunConfig, pg_collection: ProcessGroupCollection) -> None:
        """Build the pool; the same on every tensor- and context-parallel rank."""
        super().__init__()
        pool, vision = run.model.prompt_pool, run.model.vision_tower
        self.matcher = Matcher(pool, pg_collection)
        self.num_replaced = vision.num_visual_tokens - num_kept(
            vision.num_visual_tokens, pool.replace_ratio
        )
        hidden_size = run.model.language_model.hidden_size
        self.weight = nn.Parameter(
            torch.empty(pool.pool_size, hidden_size, dtype=params_dtype(run))
        )

    def begin(self, visual_embeddings: Tensor, replaced: Tensor, *, ahead: bool = False) -> Begun:
        """Choose the tokens and begin to match them; the pool must not change until `forward`.

        Args:
            visual_embeddings: [n, N, h].
            replaced: bool [n, N]; every image has the same number R of True.
            ahead: other work comes before `forward`.
        """
        # A stable sort finds the rows without the device sync of boolean indexing.
        positions = torch.argsort((~replaced).to(torch.uint8), dim=1, stable=True)
        positions = positions[:, : self.num_replaced]
        tokens = _take_rows(visual_embeddings.detach(), positions)
        return Begun(positions, self.matcher.begin(tokens, self.weight, ahead=ahead))

    @torch.no_grad()
    def match(self, tokens: Tensor) -> tuple[Tensor, Tensor, MatchingSample | None]:
        """Pool row [n, R] and distance [n, R] of each token [n, R, h], and an image to check."""
        size = self.tp.size() * self.cp.size()
        rank = self.cp.rank() * self.tp.size() + self.tp.rank()
        num_images = tokens.shape[0]
        mine = tokens[rank::size]
        # What is not finite must reach the loss, which is then refused on all ranks together; the
        # matching would raise on this rank alone. Any match will do for it.
        cost = pairwise_cost(mine, self.weight).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        if self.assign_mode == "nearest":
            index = nearest(cost).index
        else:
            index = assign(cost, backend=self.assign_backend, certify=False).index
        distance = cost.gather(2, index.unsqueeze(2)).squeeze(2)
        sample = MatchingSample(cost[0], index[0]) if len(mine) else None
        if size == 1:
            return index, distance, sample
        per_rank = -(-num_images // size)  # ranks with one image less send an empty row
        packed = torch.zeros(per_rank, self.num_replaced, 2, dtype=torch.float64)
        packed = packed.to(tokens.device)
        packed[: len(mine), :, 0] = index.double()
        packed[: len(mine), :, 1] = distance.double()
        for group in (self.tp, self.cp):
            parts = [torch.empty_like(packed) for _ in range(group.size())]
            dist.all_gather(parts, packed, group=group)
            packed = torch.stack(parts)
        everyone = packed.view(size, per_rank, self.num_replaced, 2).transpose(0, 1)
        everyone = everyone.flatten(0, 1)[:num_images]  # back to image order
        return everyone[..., 0].long(), everyone[..., 1].float(), sample


def _take_rows(x: Tensor, positions: Tensor) -> Tensor:
    """x [n, N, h], positions [n, R] -> [n, R, h]."""
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
