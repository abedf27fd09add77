"""Hidden states and their gradients between neighbouring pipeline stages.

megatron-core's communicator asks the neighbour for the shape of every tensor when rows differ in
length, and waits for the whole device twice for each call. Here nothing is asked and nothing waits:
every rank holds all batches of a step before it starts, so it knows each shape.

Sends under the interleaved schedule are not waited for at once. megatron-core 0.16 frees a sent
activation by taking its memory away (`out.data = torch.empty(1)`) while it is still being read;
0.18 waits before it frees. `_HeldSend` keeps the memory until the send has been waited for, so both
are right and neither keeps more than the tensors that are on their way.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from megatron.core import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from torch import Tensor

Shape = tuple[int, ...]

_NOTHING = (0, 0, 0)


class PipelineCommunicator(P2PCommunicator):
    """Point-to-point communication of one run of a pipeline schedule, with shapes known ahead."""

    def __init__(
        self, pp: dist.ProcessGroup, config: ModelParallelConfig, shapes: Sequence[Shape]
    ) -> None:
        """Prepare one run of the schedule.

        Args:
            pp: pipeline-parallel group.
            config: of the language model; `variable_seq_lengths` must be set.
            shapes: of the hidden states of each micro-batch on one rank, [s / (CP * SP), 1, h].
        """
        super().__init__(pp, config)
        assert config.variable_seq_lengths, "megatron asks for shapes only then"
        is_first, is_last = pp.rank() == 0, pp.rank() == pp.size() - 1
        self._from_previous = self._arrivals(shapes, wraps_around=is_first)
        self._from_next = self._arrivals(shapes, wraps_around=is_last)

    def _arrivals(self, shapes: Sequence[Shape], *, wraps_around: bool) -> Iterator[Shape]:
        """Shapes in the order in which a neighbour sends them, forward or backward.

        Every rank walks the same table of (micro-batch, model chunk), backward with the chunks in
        reverse. What goes around the ring, from the last rank to the first or back, leaves out the
        last chunk of that walk: its output is the loss, or the gradient of the input tokens.
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
        """Shapes of what arrives, (from the stage before, from the stage after)."""
        before = next(self._from_previous) if recv_prev else _NOTHING
        after = next(self._from_next) if recv_next else _NOTHING
        return before, after

    def _communicate(self, **arguments: Any) -> Any:
        """Send and receive as megatron does; sends that are left open keep their memory."""
        received: Any = super()._communicate(**arguments)
        requests = received[2]
        if isinstance(requests, dict) and "send_next" in requests:
            memory = arguments["tensor_send_next"].detach()
            requests["send_next"] = _HeldSend(requests["send_next"], memory)
        return received


class _HeldSend:
    """An open send whose memory stays until it has been waited for."""

    def __init__(self, work: dist.Work, tensor: Tensor) -> None:
        self._work = work
        self._tensor: Tensor | None = tensor

    def wait(self) -> None:
        """Wait for the send, then let go of its memory."""
        self._work.wait()
        self._tensor = None
