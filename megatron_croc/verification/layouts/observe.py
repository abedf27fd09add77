"""Losses, gradients and weights of some training steps, observed on every rank of a layout.

Every rank keeps its own shards of gradients and weights; `assemble` joins them.
"""

import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_croc.config.run import RunConfig
from megatron_croc.data.batch import Batch
from megatron_croc.data.loader import build_train_loader
from megatron_croc.data.synthetic import MIXED_IMAGES, make_step
from megatron_croc.log import rank
from megatron_croc.model.sharded_weights import iter_shards
from megatron_croc.parallel.device import max_memory_allocated, synchronize
from megatron_croc.parallel.groups import start_distributed
from megatron_croc.training.batch_broadcast import open_batch_broadcast
from megatron_croc.training.build import TrainingState, build_training_state

Pieces = list[tuple[str, tuple[int, ...], tuple[slice, ...], Tensor]]
"""Global name, whole shape, block, and the block's numbers."""


@dataclass(kw_only=True)
class RankObservation:
    """Observations of one rank."""

    steps: list[dict[str, float]]
    gradients: Pieces
    weights: Pieces
    seconds_per_step: float
    peak_bytes: int


@dataclass(kw_only=True)
class Observation:
    """Observations of one layout: losses of every step, whole tensors by global name, cost."""

    steps: list[dict[str, float]]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    seconds_per_step: float
    peak_bytes: int


def observe(run: RunConfig, steps: int, images: Sequence[int] = MIXED_IMAGES) -> RankObservation:
    """Train `steps` steps; gradients are those of the first, weights those after the last.

    `images` are the numbers of images of made-up samples, used when the run names no data.
    """
    pg = start_distributed(run.parallel, seed=run.training.seed)
    training = build_training_state(run, pg, train_iters=max(steps, 2))
    # Warm-up starts at a rate of 0; begin where a step moves the weights.
    training.scheduler.step(increment=run.training.global_batch_size)
    rows: list[dict[str, float]] = []
    gradients: Pieces = []

    def keep_gradients() -> None:
        if not gradients:
            gather_gradient_shards(training)
            gradients.extend(_pieces(training, lambda p: getattr(p, "main_grad", None)))

    times: list[float] = []
    for batches in _batches(training, steps, images):
        started = time.perf_counter()
        metrics = training.train_step.train(
            batches, training.optimizer, training.scheduler, on_gradients=keep_gradients
        )
        synchronize()
        times.append(time.perf_counter() - started)
        rows.append(
            {
                "text_loss": metrics.text_loss,
                "reconstruction_loss": metrics.reconstruction_loss or 0.0,
                "grad_norm": metrics.grad_norm or 0.0,
            }
        )
    for chunk in training.chunks:
        if run.optimizer.overlap_param_gather:
            chunk.disable_forward_pre_hook(param_sync=True)  # type: ignore[operator]
    peak = max_memory_allocated() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return RankObservation(
        steps=rows,
        gradients=gradients,
        weights=_pieces(training, lambda p: p),
        seconds_per_step=sum(times[1:]) / max(len(times) - 1, 1),
        peak_bytes=peak,
    )


def _batches(training: TrainingState, steps: int, images: Sequence[int]) -> Iterator[list[Batch]]:
    """Global batches that do not depend on the layout: read from data, or synthetic."""
    run, pg = training.run, training.pg_collection
    if run.data.data_path:
        with open_batch_broadcast(run, pg, build_train_loader, state=None) as broadcaster:
            for _ in range(steps):
                yield broadcaster.next_step()
        return
    for step in range(steps):
        yield make_step(run, step, dp_rank=pg.dp.rank(), dp_size=pg.dp.size(), images=images)


def gather_gradient_shards(training: TrainingState) -> None:
    """All-gather the gradient buffers: after reduction a rank holds its own shard only."""
    for chunk in training.chunks:
        buffers: Any = chunk.buffers  # of DistributedDataParallel, not torch's
        for bucket in (bucket for buffer in buffers for bucket in buffer.buckets):
            group = bucket.data_parallel_group if hasattr(bucket, "data_parallel_group") else None
            group = group or training.pg_collection.dp_cp
            shards = list(bucket.grad_data.chunk(group.size()))
            gathered = [torch.empty_like(shard) for shard in shards]
            dist.all_gather(gathered, shards[group.rank()].clone(), group=group)
            for shard, whole in zip(shards, gathered, strict=True):
                shard.copy_(whole)


def _pieces(training: TrainingState, pick: Any) -> Pieces:
    models: list[nn.Module] = [chunk.module for chunk in training.chunks]  # type: ignore[misc]
    return [
        (shard.name, shard.shape, shard.block, shard.data.detach().float().cpu().clone())
        for model in models
        for shard in iter_shards(model, pick)
    ]


def assemble(ranks: list[RankObservation]) -> Observation:
    """Join the shards of all ranks; the largest difference between replicas is kept."""
    return Observation(
        steps=ranks[0].steps,
        gradients=_whole([rank.gradients for rank in ranks]),
        weights=_whole([rank.weights for rank in ranks]),
        seconds_per_step=max(rank.seconds_per_step for rank in ranks),
        peak_bytes=max(rank.peak_bytes for rank in ranks),
    )


def _whole(pieces_of_ranks: list[Pieces]) -> dict[str, Tensor]:
    whole: dict[str, Tensor] = {}
    filled: dict[str, Tensor] = {}
    for pieces in pieces_of_ranks:
        for name, shape, block, data in pieces:
            tensor = whole.setdefault(name, torch.zeros(shape))
            seen = filled.setdefault(name, torch.zeros(shape, dtype=torch.bool))
            differs = seen[block] & (tensor[block] != data)
            if differs.any() and not torch.allclose(tensor[block], data, rtol=1e-3, atol=1e-7):
                tensor[block] = float(
                    "nan"
                )  # replicas that drifted apart are an error by themselves
                continue
            tensor[block] = data
            seen[block] = True
    return whole


def work(run: RunConfig, steps: int, folder: Path) -> None:
    """Observe one rank and write the result to `folder`."""
    observation = observe(run, steps)
    torch.save(observation, folder / f"rank{rank()}.pt")
    dist.barrier()
