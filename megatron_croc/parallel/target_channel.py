"""The reconstruction target's way from the first pipeline stage to the last.

    first stage: visual_embeddings.detach() --isend--> last stage: reconstruction loss
                 (middle stages never see it)

Both ends walk the micro-batches in the same order, so a plain queue is enough. The two ends meet
once, when the channel is opened: NCCL makes the communicator of a pair at its first use, and the
host of either end waits there for the other one. Inside the schedule it would wait for ever.

Sends are asynchronous, and the schedule never waits for one: when the first stage begins
micro-batch i under 1F1B, it has the gradient of micro-batch i - p, so the last of the p stages took
that target long ago (interleaved: i - 2 p). Older sends are retired there, so memory is bounded.
"""

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_croc.parallel.device import current_device


class TargetChannel:
    """A first-in, first-out channel between the two ends of a pipeline."""

    def __init__(
        self,
        *,
        pp: dist.ProcessGroup,
        ends: dist.ProcessGroup | None,
        is_interleaved: bool = False,
    ) -> None:
        """Open the channel; its two ends wait for each other.

        Args:
            pp: the pipeline's group.
            ends: group of its first and last rank (megatron's `embd`); unused when pp has one.
            is_interleaved: the schedule runs several model chunks per rank.
        """
        self._depth = pp.size() * (2 if is_interleaved else 1)
        self._ends = ends
        ranks = dist.get_process_group_ranks(pp)
        self._first, self._last = ranks[0], ranks[-1]
        self._queue: deque[Tensor] = deque()
        self._in_flight: deque[tuple[dist.Work, Tensor]] = deque()
        self._connect()

    def _connect(self) -> None:
        if self._first == self._last:
            return
        greeting = torch.zeros(1, device=current_device())
        if dist.get_rank() == self._first:
            dist.send(greeting, dst=self._last, group=self._ends)
        elif dist.get_rank() == self._last:
            dist.recv(greeting, src=self._first, group=self._ends)

    def put(self, target: Tensor) -> None:
        """First stage: hand over one micro-batch's target [n, N, h]; does not wait."""
        if target.numel() == 0:
            return  # the last stage knows the count from its batch, and does not listen
        if self._first == self._last:
            self._queue.append(target)
            return
        while len(self._in_flight) >= self._depth:
            self._in_flight.popleft()[0].wait()
        target = target.contiguous()
        work = dist.isend(target, dst=self._last, group=self._ends)
        assert work is not None
        self._in_flight.append((work, target))

    def get(self, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Last stage: take the next micro-batch's target."""
        if 0 in shape:
            return torch.empty(shape, dtype=dtype, device=device)
        if self._first == self._last:
            return self._queue.popleft()
        target = torch.empty(shape, dtype=dtype, device=device)
        dist.recv(target, src=self._first, group=self._ends)
        return target

    def flush(self) -> None:
        """Wait until every target has been taken; call it when the schedule has ended."""
        while self._in_flight:
            self._in_flight.popleft()[0].wait()
