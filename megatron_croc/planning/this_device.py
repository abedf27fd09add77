"""Memory of a process on this machine; the one module of planning that needs torch."""

import os

import torch

from megatron_croc.config.run import RunConfig
from megatron_croc.errors import ConfigError
from megatron_croc.parallel.device import has_cuda
from megatron_croc.planning.fit import GIB, HOST_RESERVED, Device
from megatron_croc.planning.memory import estimate_memory


def this_device(processes: int) -> Device:
    """Memory of the smallest visible GPU; without one, this machine's RAM over its processes."""
    if has_cuda():
        found = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
        smallest = min(found, key=lambda gpu: gpu.total_memory)
        return Device(name=smallest.name, memory=float(smallest.total_memory), per_node=len(found))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    name = "the CPU" if here == 1 else f"the CPU, its memory over {here} processes"
    return Device(name=name, memory=memory / here, reserved=HOST_RESERVED)


def refuse_too_large(run: RunConfig, processes: int) -> None:
    """Refuse a run whose model alone is larger than this machine, before anything is built.

    Counted are weights, gradients and optimizer of the fullest rank; activations, which depend on
    the samples, are left to `croc check`.

    Args:
        run: the run.
        processes: of the whole run.

    Raises:
        ConfigError: they do not fit, with the figures and the way out.
    """
    device = this_device(processes)
    stages = estimate_memory(run, processes)
    needed = max(stage.weights + stage.gradients + stage.optimizer for stage in stages)
    if needed <= device.memory:
        return
    remedy = "croc plan finds a layout that fits"
    if not has_cuda():
        remedy = "no GPU is in sight (nvidia-smi tells more): train on GPUs, or a tiny recipe here"
    raise ConfigError(
        f"weights, gradients and optimizer need {needed / GIB:.1f} GiB in one process, and "
        f"{device.name} has {device.memory / GIB:.1f} GiB: {remedy}"
    )
