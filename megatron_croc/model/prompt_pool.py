"""The learnable pool, and the replacement of visual tokens by its rows.

visual_embeddings [n, N, h]        images r, r + tp, r + 2 tp, ... are matched on TP rank r
    |  rows chosen by `replaced`          |
    v                                     v
cost [n, R, P] (float32) --> assign --> index [n, R] --all-gather--> every TP rank agrees
    |
    v
visual_embeddings with those rows taken from the pool (which gets their gradient)
"""

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_croc.config.run import RunConfig
from megatron_croc.model.transformer_configs import params_dtype
from megatron_croc.ops.assignment import assign, pairwise_cost
from megatron_croc.ops.patch_selection import num_kept


class Replacement(NamedTuple):
    """Result of `PromptPool.forward`."""

    embeddings: Tensor
    """[n, N, h], replaced rows taken from the pool."""

    index: Tensor
    """int64 [n, R], pool row of each replaced token, ascending by position."""

    distance: Tensor
    """float32 [n, R], distance of each replaced token to its pool row."""


class PromptPool(nn.Module):
    """`pool_size` learnable tokens; `weight` is [P, h]."""

    def __init__(self, run: RunConfig, pg_collection: ProcessGroupCollection) -> None:
        """Build the pool; the same on every tensor-parallel rank."""
        super().__init__()
        pool, vision = run.model.prompt_pool, run.model.vision_tower
        self.assign_mode: Literal["hungarian", "nearest"] = pool.assign_mode
        self.num_replaced = vision.num_visual_tokens - num_kept(
            vision.num_visual_tokens, pool.replace_ratio
        )
        self.tp = pg_collection.tp
        hidden_size = run.model.language_model.hidden_size
        self.weight = nn.Parameter(
            torch.empty(pool.pool_size, hidden_size, dtype=params_dtype(run))
        )

    def forward(self, visual_embeddings: Tensor, replaced: Tensor) -> Replacement:
        """Replace the chosen tokens.

        Args:
            visual_embeddings: [n, N, h].
            replaced: bool [n, N]; every image has the same number R of True.
        """
        # A stable sort finds the rows without the device sync of boolean indexing.
        positions = torch.argsort((~replaced).to(torch.uint8), dim=1, stable=True)
        positions = positions[:, : self.num_replaced]
        index, distance = self.match(_take_rows(visual_embeddings.detach(), positions))
        prompt = self.weight[index].to(visual_embeddings.dtype)
        target = positions.unsqueeze(-1).expand_as(prompt)
        return Replacement(visual_embeddings.scatter(1, target, prompt), index, distance)

    @torch.no_grad()
    def match(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Pool row and distance of each token [n, R, h]; images shared out over the TP ranks."""
        rank, size = self.tp.rank(), self.tp.size()
        num_images = tokens.shape[0]
        mine = tokens[rank::size]
        cost = pairwise_cost(mine, self.weight)
        index = assign(cost, self.assign_mode).index
        distance = cost.gather(2, index.unsqueeze(2)).squeeze(2)
        if size == 1:
            return index, distance
        per_rank = -(-num_images // size)  # ranks with one image less send an empty row
        packed = torch.zeros(per_rank, self.num_replaced, 2, dtype=torch.float64)
        packed = packed.to(tokens.device)
        packed[: len(mine), :, 0] = index.double()
        packed[: len(mine), :, 1] = distance.double()
        parts = [torch.empty_like(packed) for _ in range(size)]
        dist.all_gather(parts, packed, group=self.tp)
        everyone = torch.stack(parts, dim=1).flatten(0, 1)[:num_images]  # back to image order
        return everyone[..., 0].long(), everyone[..., 1].float()


def _take_rows(x: Tensor, positions: Tensor) -> Tensor:
    """x [n, N, h], positions [n, R] -> [n, R, h]."""
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
