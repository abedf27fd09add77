"""From a RunConfig to everything the loop needs."""

from dataclasses import dataclass

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
from megatron_croc.config.run import RunConfig
from megatron_croc.model.croc_model import CrocModel
from megatron_croc.model.freezing import freeze
from megatron_croc.model.initialization import initialize_weights
from megatron_croc.model.sharded_weights import WeightSource, fill_weights
from megatron_croc.model.transformer_configs import language_model_config
from megatron_croc.parallel.device import current_device
from megatron_croc.parallel.target_channel import TargetChannel
from megatron_croc.training.optimizer import build_optimizer, build_scheduler
from megatron_croc.training.safety.heartbeat import enter
from megatron_croc.training.step import TrainStep


@dataclass(kw_only=True)
class TrainingState:
    """What one rank holds while training."""

    run: RunConfig
    pg_collection: ProcessGroupCollection
    chunks: list[nn.Module]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    train_step: TrainStep
    state: TrainState
    train_iters: int


def build_model(run: RunConfig, pg_collection: ProcessGroupCollection) -> list[CrocModel]:
    """This rank's model chunks with fresh weights, frozen as the run says; not wrapped."""
    config = language_model_config(run)
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
        initialize_weights(chunk, run)
        freeze(chunk, run)
        chunks.append(chunk.to(current_device()))
    return chunks


def wrap_model(
    run: RunConfig, models: list[CrocModel], pg_collection: ProcessGroupCollection
) -> list[nn.Module]:
    """DistributedDataParallel around every chunk, and the schedule's hooks on its gradients."""
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
            disable_bucketing=number > 0,  # later chunks have nothing left to overlap with
            pg_collection=pg_collection,
        )
        for number, model in enumerate(models)
    ]
    hooks = [chunk.no_sync for chunk in chunks]
    config.no_sync_func = hooks if len(hooks) > 1 else hooks[0]  # type: ignore[union-attr]
    config.finalize_model_grads_func = _finalize  # type: ignore[union-attr]
    return chunks


def _finalize(model: list[nn.Module], num_tokens: Tensor | None, **groups: object) -> None:
    """Reduce gradients over DP, SP and tied embeddings; the losses were divided already."""
    enter("summing gradients", collective="reduce-scatter")
    finalize_model_grads(model, None, **groups)  # type: ignore[arg-type]


def build_training_state(
    run: RunConfig,
    pg_collection: ProcessGroupCollection,
    *,
    train_iters: int,
    weights: WeightSource | None = None,
) -> TrainingState:
    """Model, optimizer and schedule; resumed, or started from the stage before.

    Args:
        run: the run.
        pg_collection: process groups.
        train_iters: optimizer steps of the whole run.
        weights: where a run that is not resumed starts, when `pretrained_checkpoint` is no
            checkpoint of ours.
    """
    models = build_model(run, pg_collection)
    chunks = wrap_model(run, models, pg_collection)
    optimizer = build_optimizer(run, chunks, pg_collection)
    scheduler = build_scheduler(run, optimizer, train_iters)
    state = load_checkpoint(run, chunks, optimizer, pg_collection)
    if state is None:
        state = TrainState(stage=run.stage)
        start = run.checkpoint.pretrained_checkpoint
        if weights is not None:
            for model in models:
                fill_weights(model, weights)
        elif start is not None:
            load_weights(start, chunks, pg_collection, verify=run.checkpoint.verify_checkpoint)
        if start is not None:
            optimizer.reload_model_params()  # the fp32 main weights were copied from fresh ones
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
