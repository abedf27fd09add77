"""Memory of this machine, compared with what the run needs."""

import os

import torch

from megatron_croc.cli.doctor.finding import Finding
from megatron_croc.config.checks import find_faults
from megatron_croc.config.run import RunConfig
from megatron_croc.log import world_size
from megatron_croc.parallel.device import has_cuda
from megatron_croc.planning.fit import HOST_RESERVED, Device, expected_fit, way_out
from megatron_croc.planning.workload import Workload


def look_at_memory(
    run: RunConfig, workload: Workload, *, processes: int | None, is_example: bool, samples: str
) -> Finding:
    """Compare the longest samples expected with this machine: the GPUs, or the RAM of a CPU run.

    Args:
        run: the run.
        workload: distribution of its samples.
        processes: of the whole run; None: torchrun's, or as many as this machine's GPUs (one on a
            CPU), rounded up to a whole copy of the model.
        is_example: True when the run is the doctor's own example: that it does not fit is a note.
        samples: the flags that describe the samples.
    """
    count = _processes(run) if processes is None else processes
    faults = find_faults(run, count)
    if faults:
        text = f"not compared: {len(faults)} fault(s) with {count} process(es): {faults[0]}"
        return Finding("note", "memory", text, "give --world-size, the processes of the run")
    device = this_device(count)
    fit = expected_fit(run, count, device, workload)
    text = f"a run of {count} process(es) {fit}, {samples}"
    if fit.fits:
        return Finding("ok", "memory", text)
    flags = way_out(run, count, device, workload)
    remedy = f"it fits with {flags}" if flags else "no layout fits: more processes (--world-size)"
    if not has_cuda():
        remedy = "train it on GPUs: croc check --gpu NAME tells if it fits there"
    return Finding("note" if is_example else "error", "memory", text, remedy)


def _processes(run: RunConfig) -> int:
    here = torch.cuda.device_count() if has_cuda() else 1
    given = max(world_size(), here)
    copy = max(1, run.parallel.model_parallel_size)
    return -(-given // copy) * copy


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
