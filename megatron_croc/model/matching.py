"""Which pool row each replaced token gets: shared out, begun early, collected late.

tokens [n, R, h]   of the tp * cp ranks that hold the same images, rank r matches images
    |                  r, r + tp * cp, r + 2 tp * cp, ...
  begin            cost, then the search: in a thread, or on a stream of its own
    :                  meanwhile this process computes something else
  finish           waits for what is left, all-gather: all these ranks agree
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
from megatron_croc.parallel.collectives import all_gather
from megatron_croc.parallel.device import SideWork, beside, to_device


class MatchingSample(NamedTuple):
    """One image's matching problem and its solution, kept so that it can be checked."""

    cost: Tensor
    """float32 [R, P]."""

    index: Tensor
    """int64 [R]."""


class Matches(NamedTuple):
    """Result of `Matcher.wait`."""

    index: Tensor
    """int64 [n, R], pool row of each token."""

    distance: Tensor
    """float32 [n, R], distance of each token to its pool row."""

    seconds: float
    """What matching kept this process waiting, exchange included, as the host sees it."""

    hidden_seconds: float
    """What a thread searched beyond the wait for it; 0 where a GPU searches, which no host sees."""

    sample: MatchingSample | None
    """The first image this rank matched, if any."""


class Pending(NamedTuple):
    """A matching under way."""

    num_images: int
    """Of the micro-batch."""

    tokens: Tensor
    """Held until the side stream has read them."""

    cost: Tensor
    """float32 [m, R, P], of this rank's m images."""

    side: SideWork
    """What the main stream must wait for before it reads `cost` or the result."""

    result: Callable[[], tuple[Assignment, float]]
    """Assignment of this rank's images, and the seconds a thread searched for it; may wait."""

    seconds: float
    """What it took to begin."""


class Matcher:
    """Matches the images of a micro-batch over the ranks that hold it."""

    def __init__(self, config: PromptPoolConfig, pg_collection: ProcessGroupCollection) -> None:
        """Bind the solver and the groups that share the work."""
        self.assign_mode: Literal["hungarian", "nearest"] = config.assign_mode
        self.assign_backend: Backend = config.assign_backend
        self.tp, self.cp = pg_collection.tp, pg_collection.cp

    @torch.no_grad()
    def start(self, tokens: Tensor, pool: Tensor, *, ahead: bool = False) -> Pending:
        """Start to match.

        Args:
            tokens: [n, R, h], of one micro-batch.
            pool: [P, h]; must not change before `wait`.
            ahead: other work comes before `wait`, so search beside it.
        """
        started = time.perf_counter()
        size = self.tp.size() * self.cp.size()
        rank = self.cp.rank() * self.tp.size() + self.tp.rank()
        mine = tokens[rank::size]
        with beside(enabled=ahead) as side:
            # What is not finite must reach the loss, which is refused on all ranks together; the
            # search would raise on this rank alone. Any match will do for it.
            cost = pairwise_cost(mine, pool).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            result = self._search(cost, side, ahead=ahead)
        seconds = time.perf_counter() - started
        return Pending(len(tokens), mine, cost, side, result, seconds)

    def _search(
        self, cost: Tensor, side: SideWork, *, ahead: bool
    ) -> Callable[[], tuple[Assignment, float]]:
        if self.assign_mode == "nearest":
            found = nearest(cost, check=False)  # it is finite, see `start`
            return lambda: (found, 0.0)
        backend = choose_backend(self.assign_backend, cost.device)
        if backend == "triton" or not ahead:
            # The cost is finite: a GPU need not wait to be told so.
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
        """Wait for the search, then let all ranks know all images."""
        started = time.perf_counter()
        found, searched = pending.result()
        waited = time.perf_counter() - started
        pending.side.wait_on_device()
        cost = pending.cost
        index = found.index if found.index.device == cost.device else to_device(found.index)
        distance = cost.gather(2, index.unsqueeze(2)).squeeze(2)
        sample = MatchingSample(cost[0], index[0]) if len(cost) else None
        if self.tp.size() * self.cp.size() > 1 and pending.num_images:
            index, distance = self._exchange(index, distance, pending.num_images)
        seconds = pending.seconds + time.perf_counter() - started
        hidden = max(0.0, searched - waited)
        return Matches(index, distance, seconds, hidden, sample)

    def _exchange(self, index: Tensor, distance: Tensor, num_images: int) -> tuple[Tensor, Tensor]:
        """This rank's [m, R] -> everyone's [n, R], in the order of the images."""
        size = self.tp.size() * self.cp.size()
        per_rank = -(-num_images // size)  # ranks with one image less send an empty row
        packed = index.new_zeros((per_rank, index.shape[1], 2), dtype=torch.float64)
        packed[: len(index), :, 0] = index.double()
        packed[: len(index), :, 1] = distance.double()
        for group in (self.tp, self.cp):
            packed = all_gather(packed, group)
        everyone = packed.view(size, per_rank, -1, 2).transpose(0, 1)
        everyone = everyone.flatten(0, 1)[:num_images]
        return everyone[..., 0].long(), everyone[..., 1].float()


@cache
def _searcher() -> ThreadPoolExecutor:
    """One thread: micro-batches come in order, and `assign` has threads for their images.

    State of the whole process, listed in docs/design.md.
    """
    return ThreadPoolExecutor(1, thread_name_prefix="matching")
