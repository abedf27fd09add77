"""Memory of this machine, compared with what the run needs."""

import torch

from megatron_croc.cli.doctor.finding import Finding
from megatron_croc.config.checks import find_faults
from megatron_croc.config.run import RunConfig
from megatron_croc.log import world_size
from megatron_croc.parallel.device import has_cuda
from megatron_croc.planning.fit import expected_fit, way_out
from megatron_croc.planning.this_device import this_device
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
