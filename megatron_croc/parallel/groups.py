"""Start of torch.distributed and megatron-core; returns the process groups.

megatron's parallel state belongs to the whole process, see docs/design.md.
"""

import os
from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_croc.config.parallel import ParallelConfig
from megatron_croc.errors import ConfigError
from megatron_croc.log import world_size
from megatron_croc.parallel import device
from megatron_croc.parallel.megatron_versions import name_untested_megatron
from megatron_croc.parallel.processes import tie_processes_together


def start_distributed(config: ParallelConfig, *, seed: int) -> ProcessGroupCollection:
    """Join the other processes and create the parallel groups.

    Args:
        config: sizes of the axes; their product must divide the number of processes.
        seed: seed of megatron's generators, equal on all data-parallel ranks.

    Returns:
        megatron's groups (tp, pp, cp, dp, mp, embd, ...).

    Raises:
        ConfigError: the number of processes does not fit the layout.
    """
    processes = world_size()
    if processes % config.model_parallel_size:
        raise ConfigError(
            f"{processes} processes cannot be divided into replicas of "
            f"tensor {config.tensor_model_parallel_size} x pipeline "
            f"{config.pipeline_model_parallel_size} x context {config.context_parallel_size} "
            f"= {config.model_parallel_size}; start a multiple of {config.model_parallel_size}"
        )
    tie_processes_together()
    name_untested_megatron()
    start_torch(config)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
        context_parallel_size=config.context_parallel_size,
        distributed_timeout_minutes=config.distributed_timeout_minutes,  # type: ignore[arg-type]
        create_gloo_process_groups=False,  # only for optimizer state gathered on hosts
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return ProcessGroupCollection.use_mpu_process_groups()


def start_torch(config: ParallelConfig) -> None:
    """Select this process's device and join torch.distributed; idempotent."""
    if dist.is_initialized():
        return
    processes = world_size()
    device.forbid_tf32()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0" if processes == 1 else "29500")
    device.set_local_device(int(os.environ.get("LOCAL_RANK", "0")))
    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    if processes == 1:
        dist.init_process_group(
            device.distributed_backend(),
            store=dist.HashStore(),
            rank=0,
            world_size=1,
            timeout=timeout,
        )
    else:
        dist.init_process_group(device.distributed_backend(), timeout=timeout)


def stop_distributed() -> None:
    """Leave all groups; safe to call twice."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
