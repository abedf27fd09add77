"""The learnable pool, and the replacement of visual tokens by its rows.

visual_embeddings [n, N, h]     of the tp * cp ranks that hold the same images, rank r matches
    |  rows chosen by `replaced`    images r, r + tp * cp, r + 2 tp * cp, ...
    v
cost [n, R, P] (float32) --> assign --> index [n, R] --all-gather--> all these ranks agree
    |
    v
visual_embeddings with those rows taken from the pool (which gets their gradient)
"""

import time
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_croc.config.run import RunConfig
from megatron_croc.model.transformer_configs import params_dtype
from megatron_croc.ops.assignment import Backend, assign, nearest, pairwise_cost
from megatron_croc.ops.patch_selection import num_kept


class MatchingSample(NamedTuple):
    """One image's matching problem and its solution, kept so that it can be checked."""

    cost: Tensor
    """float32 [R, P]."""

    index: Tensor
    """int64 [R]."""


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

    sample: MatchingSample | None = None
    """The first image this rank matched, if any."""


class PromptPool(nn.Module):
    """`pool_size` learnable tokens; `weight` is [P, h]."""

    def __init__(self, run: RunConfig, pg_collection: ProcessGroupCollection) -> None:
        """Build the pool; the same on every tensor- and context-parallel rank."""
        super().__init__()
        pool, vision = run.model.prompt_pool, run.model.vision_tower
        self.assign_mode: Literal["hungarian", "nearest"] = pool.assign_mode
        self.assign_backend: Backend = pool.assign_backend
        self.num_replaced = vision.num_visual_tokens - num_kept(
            vision.num_visual_tokens, pool.replace_ratio
        )
        self.tp, self.cp = pg_collection.tp, pg_collection.cp
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
        started = time.perf_counter()
        index, distance, sample = self.match(_take_rows(visual_embeddings.detach(), positions))
        seconds = time.perf_counter() - started
        prompt = self.weight[index].to(visual_embeddings.dtype)
        target = positions.unsqueeze(-1).expand_as(prompt)
        embeddings = visual_embeddings.scatter(1, target, prompt)
        return Replacement(embeddings, index, distance, seconds, sample)

    @torch.no_grad()
    def match(self, tokens: Tensor) -> tuple[Tensor, Tensor, MatchingSample | None]:
        """Pool row [n, R] and distance [n, R] of each token [n, R, h], and an image to check."""
        size = self.tp.size() * self.cp.size()
        rank = self.cp.rank() * self.tp.size() + self.tp.rank()
        num_images = tokens.shape[0]
        mine = tokens[rank::size]
        cost = pairwise_cost(mine, self.weight)
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
