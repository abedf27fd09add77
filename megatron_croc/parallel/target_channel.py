"""Channel for the reconstruction target, from the first pipeline stage to the last.

    first stage: visual_embeddings.detach() --isend--> last stage: reconstruction loss
                 (middle stages never see it)

Both ends process the micro-batches in the same order, so the channel is a queue. NCCL creates the
communicator of two ranks at its first use, where each waits for the other. Inside the schedule that
would be a deadlock, so the channel is used once when it is opened.

Sends are asynchronous, and the schedule never waits for one. Under 1F1B with p stages, the first
stage has the gradient of micro-batch i - p when it begins micro-batch i, so the last stage has
received that target (interleaved: i - 2 p). Older sends are complete; memory is bounded.
"""

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_croc.parallel.device import current_device


class TargetChannel:
    """First-in, first-out channel between the first and the last pipeline stage."""

    def __init__(
        self,
        *,
        pp: dist.ProcessGroup,
        ends: dist.ProcessGroup | None,
        is_interleaved: bool = False,
    ) -> None:
        """Open the channel; the two ends wait for each other.

        Args:
            pp: pipeline-parallel group.
            ends: group of its first and last rank (megatron's `embd`); unused if pp has one rank.
            is_interleaved: the schedule has several model chunks per rank.
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
        """Send the target [n, N, D] of one micro-batch, on the first stage; does not wait."""
        if target.numel() == 0:
            return  # the last stage knows n from its batch and does not receive
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
        """Receive the target of the next micro-batch, on the last stage."""
        if 0 in shape:
            return torch.empty(shape, dtype=dtype, device=device)
        if self._first == self._last:
            return self._queue.popleft()
        target = torch.empty(shape, dtype=dtype, device=device)
        dist.recv(target, src=self._first, group=self._ends)
        return target

    def flush(self) -> None:
        """Wait until all targets are received; call it at the end of the schedule."""
        while self._in_flight:
            self._in_flight.popleft()[0].wait()
