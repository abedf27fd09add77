"""Building of model, optimizer, schedule and metrics writer from a RunConfig."""

import logging
from collections.abc import Set
from dataclasses import dataclass
from functools import partial

from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_croc.checkpoint.sharded import load_checkpoint, load_weights
from megatron_croc.checkpoint.state import TrainState
from megatron_croc.config.base import to_tree
from megatron_croc.config.parts import trained_parts
from megatron_croc.config.run import RunConfig
from megatron_croc.log import get_logger, log_on_rank_zero
from megatron_croc.model.croc_model import CrocModel
from megatron_croc.model.freezing import freeze
from megatron_croc.model.initialization import initialize_weights
from megatron_croc.model.sharded_weights import WeightSource, fill_weights
from megatron_croc.model.transformer_configs import language_model_config
from megatron_croc.parallel.device import current_device, require_determinism
from megatron_croc.parallel.target_channel import TargetChannel
from megatron_croc.training.groups_of_one import skip_groups_of_one
from megatron_croc.training.optimizer import build_optimizer, build_scheduler
from megatron_croc.training.reporting.reporting import Reporter
from megatron_croc.training.reporting.time_split import TimeSplit
from megatron_croc.training.safety.heartbeat import enter
from megatron_croc.training.shared_gradients import sum_over_tensor_parallel
from megatron_croc.training.step import TrainStep

logger = get_logger(__name__)


@dataclass(kw_only=True)
class TrainingState:
    """Everything that one rank holds while training."""

    run: RunConfig
    pg_collection: ProcessGroupCollection
    chunks: list[nn.Module]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    train_step: TrainStep
    state: TrainState
    train_iters: int


def build_model(run: RunConfig, pg_collection: ProcessGroupCollection) -> list[CrocModel]:
    """Build this rank's model chunks with initial weights and frozen parts, not wrapped in DDP."""
    if run.training.deterministic:
        require_determinism()
    config = language_model_config(
        run.model.language_model, parallel=run.parallel, training=run.training
    )
    trained = trained_parts(run.training, reconstructs=run.reconstructs)
    num_chunks = run.parallel.virtual_pipeline_model_parallel_size or 1
    channel = TargetChannel(
        pp=pg_collection.pp, ends=pg_collection.embd, is_interleaved=num_chunks > 1
    )
    pp_rank, pp_size = pg_collection.pp.rank(), pg_collection.pp.size()
    chunks: list[CrocModel] = []
    for number in range(num_chunks):
        chunk = CrocModel(
            run,
            config,
            pg_collection,
            pre_process=pp_rank == 0 and number == 0,
            post_process=pp_rank == pp_size - 1 and number == num_chunks - 1,
            target_channel=channel,
            vp_stage=number if num_chunks > 1 else None,
        )
        initialize_weights(chunk, run.model, seed=run.training.seed)
        freeze(chunk, trained=trained)
        chunks.append(chunk.to(current_device()))
    return chunks


def wrap_model(
    run: RunConfig, models: list[CrocModel], pg_collection: ProcessGroupCollection
) -> list[nn.Module]:
    """Wrap every chunk in DistributedDataParallel, and set the schedule's gradient hooks."""
    skip_groups_of_one()
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=run.optimizer.overlap_grad_reduce,
        overlap_param_gather=run.optimizer.overlap_param_gather,
        use_distributed_optimizer=True,
    )
    config = models[0].config
    chunks: list[nn.Module] = [
        DistributedDataParallel(
            config,  # type: ignore[arg-type]
            ddp_config,
            model,
            disable_bucketing=number > 0,  # later chunks have no work to overlap with
            pg_collection=pg_collection,
        )
        for number, model in enumerate(models)
    ]
    hooks = [chunk.no_sync for chunk in chunks]
    config.no_sync_func = hooks if len(hooks) > 1 else hooks[0]  # type: ignore[union-attr]
    config.finalize_model_grads_func = partial(  # type: ignore[union-attr]
        _finalize, shared=models[0].image_shared_parameters()
    )
    return chunks


def _finalize(
    model: list[nn.Module],
    num_tokens: Tensor | None,
    *,
    shared: Set[Tensor],
    pg_collection: ProcessGroupCollection,
    **options: object,
) -> None:
    """Reduce gradients over DP, SP, tied embeddings and shared images, without dividing them.

    The losses are divided by their global denominators already.
    """
    enter("summing gradients", collective="reduce-scatter")
    finalize_model_grads(model, None, pg_collection=pg_collection, **options)  # type: ignore[arg-type]
    sum_over_tensor_parallel(model[0], shared, pg_collection.tp)


def build_training_state(
    run: RunConfig,
    pg_collection: ProcessGroupCollection,
    *,
    train_iters: int,
    weights: WeightSource | None = None,
) -> TrainingState:
    """Build model, optimizer and schedule; resume them, or load weights of the previous stage.

    Args:
        run: the run.
        pg_collection: process groups.
        train_iters: optimizer steps of the whole run.
        weights: initial weights of a run that is not resumed, if `pretrained_checkpoint` is a
            model in Hugging Face's format.

    Raises:
        CheckpointError: a checkpoint is damaged, or belongs to another stage or model.
    """
    enter("building the model")
    models = build_model(run, pg_collection)
    chunks = wrap_model(run, models, pg_collection)
    enter("building the optimizer")
    optimizer = build_optimizer(run.optimizer, chunks, pg_collection)
    scheduler = build_scheduler(
        run.optimizer,
        optimizer,
        train_iters=train_iters,
        global_batch_size=run.training.global_batch_size,
    )
    enter("reading the checkpoint", collective="all-gather")
    state = load_checkpoint(run.checkpoint, run.stage, chunks, optimizer, pg_collection)
    if state is None:
        state = TrainState(stage=run.stage)
        start = run.checkpoint.pretrained_checkpoint
        if start is not None:
            log_on_rank_zero(logger, logging.INFO, "loading weights from %s", start)
        if weights is not None:
            for model in models:
                fill_weights(model, weights)
        elif start is not None:
            load_weights(start, chunks, pg_collection, verify=run.checkpoint.verify_checkpoint)
        if start is not None:
            optimizer.reload_model_params()  # the fp32 main weights are copies of the initial ones
    scheduler.step(increment=state.iteration * run.training.global_batch_size)
    return TrainingState(
        run=run,
        pg_collection=pg_collection,
        chunks=chunks,
        optimizer=optimizer,
        scheduler=scheduler,
        train_step=TrainStep(run, chunks, pg_collection),
        state=state,
        train_iters=train_iters,
    )


def build_reporter(
    run: RunConfig,
    *,
    train_iters: int,
    world_size: int,
    resumed_at: int | None = None,
    times: TimeSplit | None = None,
) -> Reporter:
    """Build the writer of metrics.

    Args:
        run: the run.
        train_iters: optimizer steps of the whole run.
        world_size: number of ranks.
        resumed_at: steps done at the start; lines of later steps are moved out of metrics.jsonl.
        times: time by region; None: not measured.
    """
    packs_per_step, data = run.training.global_batch_size, run.data
    return Reporter(
        run.logging,
        run.model,
        folder=run.log_folder,
        settings=to_tree(run),
        positions_per_step=packs_per_step * data.row_length if data.packing else None,
        train_iters=train_iters,
        resumed_at=resumed_at,
        world_size=world_size,
        times=times,
    )
