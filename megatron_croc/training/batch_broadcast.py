"""Broadcast of one step's micro-batches to the ranks of each replica, before the schedule starts.

    loader (first rank of each replica)
        | next() x num_microbatches
        v
    tokens, masks, counts --broadcast--> all ranks of the replica
    pixels (uint8)        --broadcast--> context- and tensor-parallel ranks of the first stage only

Every rank holds all micro-batches before the first forward pass, so the global denominators of the
losses are known by then, and no collective for data runs inside the pipeline schedule.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_croc.config.run import RunConfig
from megatron_croc.data.batch import Batch
from megatron_croc.data.loader import MicroBatchLoader
from megatron_croc.data.order.row_plan import OrderState
from megatron_croc.parallel.broadcast import broadcast_object, broadcast_tensor, is_source
from megatron_croc.parallel.stopwatch import region
from megatron_croc.training.safety.heartbeat import enter


class BatchBroadcaster:
    """Source of micro-batches, one optimizer step at a time."""

    def __init__(
        self,
        loader: MicroBatchLoader | None,
        pg_collection: ProcessGroupCollection,
        *,
        num_microbatches: int,
        img_size: int,
    ) -> None:
        """Wrap a loader.

        Args:
            loader: micro-batches of this replica, on its first rank; None on the others.
            pg_collection: process groups.
            num_microbatches: micro-batches of one optimizer step.
            img_size: height and width of the images, pixels.
        """
        self.loader = loader
        self.pg = pg_collection
        self.num_microbatches = num_microbatches
        self.img_size = img_size
        self.order_state: OrderState | None = None
        """Position in the order of samples after the last step, on every rank."""

    @region("data_wait")
    def next_step(self) -> list[Batch]:
        """Load the micro-batches of the next step.

        Raises:
            Exception: any error of the loader, on every rank of the replica.
        """
        batches: list[Batch] = []
        error: Exception | None = None
        state: OrderState | None = None
        if self.loader is not None:
            enter("reading data")
            try:
                batches = [next(self.loader) for _ in range(self.num_microbatches)]
                state = self.loader.state
            except Exception as exception:  # raised below, on every rank
                error = exception
        enter("sharing data", collective="broadcast")
        without_pixels = [replace(batch, pixel_values=None) for batch in batches]
        without_pixels, state, error = self._share((without_pixels, state, error))
        if error is not None:
            raise error
        self.order_state = state
        if self.pg.pp.rank() == 0:
            pixels = [batch.pixel_values for batch in batches] or [None] * self.num_microbatches
            without_pixels = [
                self._with_pixels(b, p) for b, p in zip(without_pixels, pixels, strict=True)
            ]
        return without_pixels

    def _share(self, value: Any) -> Any:
        """Broadcast a value of the replica's first rank: over CP, then over TP and PP."""
        if is_source(self.pg.mp):
            value = broadcast_object(value, self.pg.cp)
        return broadcast_object(value, self.pg.mp)

    def _with_pixels(self, batch: Batch, pixels: torch.Tensor | None) -> Batch:
        shape = (batch.num_images, 3, self.img_size, self.img_size)
        if is_source(self.pg.tp):
            pixels = broadcast_tensor(pixels, shape, dtype=torch.uint8, group=self.pg.cp)
        pixels = broadcast_tensor(pixels, shape, dtype=torch.uint8, group=self.pg.tp)
        return replace(batch, pixel_values=pixels)


@contextmanager
def open_batch_broadcast(
    run: RunConfig,
    pg_collection: ProcessGroupCollection,
    build_loader: Callable[..., MicroBatchLoader],
    **position: Any,
) -> Iterator[BatchBroadcaster]:
    """Open a loader on the first rank of each replica; close it at the end.

    Args:
        run: the run.
        pg_collection: process groups.
        build_loader: called with (run, dp_rank=, dp_size=, **position).
        position: start or data of the loader, passed on to `build_loader`.
    """
    dp = pg_collection.dp
    loader = None
    if is_source(pg_collection.mp) and is_source(pg_collection.cp):
        loader = build_loader(run, dp_rank=dp.rank(), dp_size=dp.size(), **position)
    packs_per_pass = run.training.micro_batch_size * dp.size()
    try:
        yield BatchBroadcaster(
            loader,
            pg_collection,
            num_microbatches=run.training.global_batch_size // packs_per_pass,
            img_size=run.model.vision_tower.img_size,
        )
    finally:
        if loader is not None:
            loader.close()
