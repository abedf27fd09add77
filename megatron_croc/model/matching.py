"""Matching of replaced tokens and pool tokens, split over ranks and concurrent with other work.

tokens [n, R, D]   of the TP x CP ranks with the same images, each matches its share
    |                  (parallel/image_share.py)
  start            cost, then the search: in a thread, or on a side stream
    :                  (this process computes something else)
  wait             waits for the search, then an all-gather: all these ranks get the same result
    v
index [n, R]
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Literal, NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_croc.config.model import PromptPoolConfig
from megatron_croc.ops.assignment import (
    Assignment,
    Backend,
    assign,
    choose_backend,
    nearest,
    pairwise_cost,
)
from megatron_croc.parallel.device import SideWork, beside, to_device
from megatron_croc.parallel.image_share import ImageShare


class MatchingSample(NamedTuple):
    """Matching problem and solution of one image, for the check in `training`."""

    cost: Tensor
    """float32 [R, P]."""

    index: Tensor
    """int64 [R]."""


class Matches(NamedTuple):
    """Result of `Matcher.wait`."""

    index: Tensor
    """int64 [n, R], pool token of each replaced token."""

    distance: Tensor
    """float32 [n, R], distance of each replaced token to its pool token."""

    seconds: float
    """Seconds of host time that this process spent on matching, exchange included."""

    hidden_seconds: float
    """Seconds of search in a thread that this process did not wait for; 0 if a GPU searches."""

    sample: MatchingSample | None
    """First image matched on this rank, if any."""


class Pending(NamedTuple):
    """Matching that was started."""

    num_images: int
    """Images of the micro-batch, over all ranks."""

    tokens: Tensor
    """Tokens of this rank's images; they must live until the side stream has read them."""

    cost: Tensor
    """float32 [m, R, P], cost for this rank's m images."""

    side: SideWork
    """Work that the main stream must wait for before it reads `cost` or the result."""

    result: Callable[[], tuple[Assignment, float]]
    """Waits for the assignment of this rank's images and the seconds of its search in a thread."""

    seconds: float
    """Seconds of host time of `Matcher.start`."""


class Matcher:
    """Matching of a micro-batch, split over the ranks that hold its images."""

    def __init__(self, config: PromptPoolConfig, pg_collection: ProcessGroupCollection) -> None:
        """Set the solver, and the groups that split the work."""
        self.assign_mode: Literal["hungarian", "nearest"] = config.assign_mode
        self.assign_backend: Backend = config.assign_backend
        self.share = ImageShare(pg_collection)

    @torch.no_grad()
    def start(self, tokens: Tensor, pool: Tensor, *, ahead: bool = False) -> Pending:
        """Start the matching of one micro-batch.

        Args:
            tokens: [n, R, D], the tokens to replace.
            pool: [P, D]; it must not change before `wait`.
            ahead: other work comes before `wait`; the search is concurrent with it.
        """
        started = time.perf_counter()
        mine = self.share.own(tokens)
        with beside(enabled=ahead) as side:
            # The search would raise on this rank alone for values that are not finite. Any match is
            # good enough for them: they reach the loss, which all ranks refuse together.
            cost = pairwise_cost(mine, pool).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            result = self._search(cost, side, ahead=ahead)
        seconds = time.perf_counter() - started
        return Pending(len(tokens), mine, cost, side, result, seconds)

    def _search(
        self, cost: Tensor, side: SideWork, *, ahead: bool
    ) -> Callable[[], tuple[Assignment, float]]:
        if self.assign_mode == "nearest":
            found = nearest(cost, check=False)  # finite, see `start`
            return lambda: (found, 0.0)
        backend = choose_backend(self.assign_backend, cost.device)
        if backend == "triton" or not ahead:
            # The cost is finite, see `start`; a check would be a device sync.
            found = assign(cost, backend=backend, check=backend != "triton")
            return lambda: (found, 0.0)
        on_host = side.to_host(cost)

        def search() -> tuple[Assignment, float]:
            side.wait_on_host()
            started = time.perf_counter()
            return assign(on_host, backend=backend), time.perf_counter() - started

        return _searcher().submit(search).result

    @torch.no_grad()
    def wait(self, pending: Pending) -> Matches:
        """Wait for the search, and exchange the results between the ranks."""
        started = time.perf_counter()
        found, searched = pending.result()
        waited = time.perf_counter() - started
        pending.side.wait_on_device()
        cost = pending.cost
        index = found.index if found.index.device == cost.device else to_device(found.index)
        distance = cost.gather(2, index.unsqueeze(2)).squeeze(2)
        sample = MatchingSample(cost[0], index[0]) if len(cost) else None
        if self.share.size > 1:
            index, distance = self._exchange(index, distance, pending.num_images)
        seconds = pending.seconds + time.perf_counter() - started
        hidden = max(0.0, searched - waited)
        return Matches(index, distance, seconds, hidden, sample)

    def _exchange(self, index: Tensor, distance: Tensor, num_images: int) -> tuple[Tensor, Tensor]:
        """[m, R] of this rank -> [n, R] of all ranks, in the order of the images."""
        packed = torch.stack([index.double(), distance.double()], dim=-1)
        everyone = self.share.gather(packed, num_images)
        return everyone[..., 0].long(), everyone[..., 1].float()


@cache
def _searcher() -> ThreadPoolExecutor:
    """Thread of the search. One is enough, because `assign` has threads for the images.

    State of the whole process, listed in docs/design.md.
    """
    return ThreadPoolExecutor(1, thread_name_prefix="matching")
