"""Communication of hidden states and their gradients between neighbouring pipeline stages.

megatron-core's communicator exchanges the shape of every tensor if packs differ in length, with two
device syncs for each call. Here every rank has all batches of a step before it starts, so it knows
each shape; there is no exchange and no sync.

Under the interleaved schedule a send stays open for a while. megatron-core 0.16 frees the memory of
a sent activation (`out.data = torch.empty(1)`) while the send may still read it; 0.18 waits for the
send first. `_HeldSend` keeps the memory until the send has been waited for, so both are correct and
only tensors of open sends are kept.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from megatron.core import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from torch import Tensor

Shape = tuple[int, ...]

_NO_SHAPE = (0, 0, 0)


class PipelineCommunicator(P2PCommunicator):
    """Point-to-point communication for one run of a pipeline schedule, with known shapes."""

    def __init__(
        self, pp: dist.ProcessGroup, config: ModelParallelConfig, shapes: Sequence[Shape]
    ) -> None:
        """Prepare one run of the schedule.

        Args:
            pp: pipeline-parallel group.
            config: configuration of the language model; `variable_seq_lengths` must be set.
            shapes: shape of the hidden states of each micro-batch on one rank, [S, 1, D].
        """
        super().__init__(pp, config)
        assert config.variable_seq_lengths, "megatron calls _communicate_shapes only then"
        is_first, is_last = pp.rank() == 0, pp.rank() == pp.size() - 1
        self._sends: list[_HeldSend] = []
        self._from_previous = self._received_shapes(shapes, wraps_around=is_first)
        self._from_next = self._received_shapes(shapes, wraps_around=is_last)

    def _received_shapes(self, shapes: Sequence[Shape], *, wraps_around: bool) -> Iterator[Shape]:
        """Shapes in the order in which a neighbour sends them, forward or backward.

        All ranks follow the same table of (micro-batch, model chunk), in the backward pass with the
        chunks in reverse. Between the last rank and the first, nothing is sent for the last chunk
        of the table: its output is the loss, or the gradient of the input tokens.
        """
        num_chunks = self.virtual_pipeline_model_parallel_size or 1
        table = get_schedule_table(
            len(shapes), num_chunks, self.config.microbatch_group_size_per_vp_stage
        )
        for micro_batch, chunk in table:
            if not (wraps_around and chunk == num_chunks - 1):
                yield shapes[micro_batch]

    def _communicate_shapes(
        self,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[Shape, Shape]:
        """Shapes of the tensors to receive, (from the previous stage, from the next stage)."""
        before = next(self._from_previous) if recv_prev else _NO_SHAPE
        after = next(self._from_next) if recv_next else _NO_SHAPE
        return before, after

    def _communicate(self, **arguments: Any) -> Any:
        """Send and receive as megatron does; open sends keep their memory."""
        received: Any = super()._communicate(**arguments)
        requests = received[2]
        if isinstance(requests, dict) and "send_next" in requests:
            memory = arguments["tensor_send_next"].detach()
            requests["send_next"] = _HeldSend(requests["send_next"], memory)
            self._sends.append(requests["send_next"])
        return received

    def flush(self) -> None:
        """Wait for the sends that the schedule has left open; call it at its end."""
        for send in self._sends:
            send.wait()
        self._sends.clear()


class _HeldSend:
    """Open send that keeps its memory until it has been waited for."""

    def __init__(self, work: dist.Work, tensor: Tensor) -> None:
        self._work = work
        self._tensor: Tensor | None = tensor

    def wait(self) -> None:
        """Wait for the send, then release its memory; does nothing the second time."""
        if self._tensor is not None:
            self._work.wait()
            self._tensor = None
