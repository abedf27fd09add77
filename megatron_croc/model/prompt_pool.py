"""Prompt pool: learned pool tokens, and the replacement of visual tokens by them.

visual_embeddings [n, N, D]
    |  start_matching: tokens chosen by `replaced` --> matching, concurrent with other work if early
    v
  forward: chosen tokens replaced by pool tokens at index [n, R]; the pool gets their gradient
"""

from typing import NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_croc.config.model import PromptPoolConfig
from megatron_croc.model.matching import Matcher, MatchingSample, Pending
from megatron_croc.ops.patch_selection import num_kept
from megatron_croc.parallel.stopwatch import region


class PendingReplacement(NamedTuple):
    """Replacement of one micro-batch whose matching has been started."""

    positions: Tensor
    """int64 [n, R], the visual tokens to replace, ascending."""

    matching: Pending
    """Matching of these tokens."""


class Replacement(NamedTuple):
    """Result of `PromptPool.forward`."""

    embeddings: Tensor
    """[n, N, D], replaced tokens taken from the pool."""

    index: Tensor
    """int64 [n, R], pool token of each replaced token, ascending by position."""

    distance: Tensor
    """float32 [n, R], distance of each replaced token to its pool token."""

    seconds: float = 0.0
    """Seconds that this process waited for the matching, exchange included."""

    hidden_seconds: float = 0.0
    """Seconds of search in a thread that this process did not wait for."""

    sample: MatchingSample | None = None
    """First image matched on this rank, if any."""


class PromptPool(nn.Module):
    """`pool_size` learned tokens; `weight` is [P, D]."""

    def __init__(
        self,
        config: PromptPoolConfig,
        pg_collection: ProcessGroupCollection,
        *,
        num_visual_tokens: int,
        hidden_size: int,
        dtype: torch.dtype,
    ) -> None:
        """Build the pool; it is equal on all tensor- and context-parallel ranks."""
        super().__init__()
        self.matcher = Matcher(config, pg_collection)
        self.num_replaced = num_visual_tokens - num_kept(num_visual_tokens, config.replace_ratio)
        self.weight = nn.Parameter(torch.empty(config.pool_size, hidden_size, dtype=dtype))

    @region("matching")
    def start_matching(
        self, visual_embeddings: Tensor, replaced: Tensor, *, ahead: bool = False
    ) -> PendingReplacement:
        """Choose the tokens and start to match them; the pool must not change until `forward`.

        Args:
            visual_embeddings: [n, N, D].
            replaced: bool [n, N], with the same number R of True in every image.
            ahead: other work runs before `forward`; the matching is concurrent with it.
        """
        # A stable sort finds the tokens without the device sync of boolean indexing.
        positions = torch.argsort((~replaced).to(torch.uint8), dim=1, stable=True)
        positions = positions[:, : self.num_replaced]
        tokens = _take_tokens(visual_embeddings.detach(), positions)
        return PendingReplacement(positions, self.matcher.start(tokens, self.weight, ahead=ahead))

    def forward(
        self, visual_embeddings: Tensor, replaced: Tensor, pending: PendingReplacement | None = None
    ) -> Replacement:
        """Replace the chosen tokens.

        Args:
            visual_embeddings: [n, N, D].
            replaced: bool [n, N].
            pending: result of `start_matching` for the same arguments, if it was called early.
        """
        if pending is None:
            pending = self.start_matching(visual_embeddings, replaced)
        matches = self.matcher.wait(pending.matching)
        prompt = self.weight[matches.index].to(visual_embeddings.dtype)
        target = pending.positions.unsqueeze(-1).expand_as(prompt)
        return Replacement(visual_embeddings.scatter(1, target, prompt), *matches)


def _take_tokens(x: Tensor, positions: Tensor) -> Tensor:
    """x [n, N, D], positions [n, R] -> [n, R, D]."""
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
