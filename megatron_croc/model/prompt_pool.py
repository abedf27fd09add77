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
from megatron_croc.parallel.stopwatch import region


class PendingReplacement(NamedTuple):
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

    @region("matching")
    def start_matching(
        self, visual_embeddings: Tensor, replaced: Tensor, *, ahead: bool = False
    ) -> PendingReplacement:
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
        return PendingReplacement(positions, self.matcher.start(tokens, self.weight, ahead=ahead))

    def forward(
        self, visual_embeddings: Tensor, replaced: Tensor, pending: PendingReplacement | None = None
    ) -> Replacement:
        """Replace the chosen tokens.

        Args:
            visual_embeddings: [n, N, h].
            replaced: bool [n, N].
            pending: what `start_matching` returned for the same two, if that was early.
        """
        if pending is None:
            pending = self.start_matching(visual_embeddings, replaced)
        matches = self.matcher.wait(pending.matching)
        prompt = self.weight[matches.index].to(visual_embeddings.dtype)
        target = pending.positions.unsqueeze(-1).expand_as(prompt)
        return Replacement(visual_embeddings.scatter(1, target, prompt), *matches)


def _take_rows(x: Tensor, positions: Tensor) -> Tensor:
    """x [n, N, h], positions [n, R] -> [n, R, h]."""
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
