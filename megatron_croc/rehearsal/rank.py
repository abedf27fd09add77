"""The child of a rehearsal: `python -m megatron_croc.rehearsal.rank AT_ONCE JOB ...`.

It becomes a process that has a GPU, as far as torch can tell, and imports the model once. Each job
then runs in a fork of it, so a job costs neither the imports nor their memory again. For each job
that ends it prints a line: status, seconds, path.

It changes torch for the whole process, so nothing else may import it.
"""

import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from megatron_croc.errors import CrocError
from megatron_croc.planning.gpus import get_gpu
from megatron_croc.rehearsal import fake_cuda, fake_tensors, kernels, without_shim
from megatron_croc.rehearsal.job import Job
from megatron_croc.rehearsal.places import blame
from megatron_croc.rehearsal.recorder import Recorder
from megatron_croc.rehearsal.shim import ShimError, load_shim


def main(at_once: int, paths: list[Path]) -> None:
    """Run the jobs of all files, `at_once` at a time; all are for the same GPU."""
    recorder = Recorder()
    recorder.forward_only = become_device(Job.read(paths[0]).gpu, recorder)
    # Both look for CUDA when they are imported, and find the fake one from here on.
    from megatron_croc.parallel.processes import die_with_parent
    from megatron_croc.rehearsal import act

    die_with_parent()

    gc.collect()
    gc.freeze()  # the forks leave what is imported alone
    waiting, running = list(reversed(paths)), dict[int, tuple[Path, float]]()
    while waiting or running:
        if waiting and len(running) < at_once:
            path = waiting.pop()
            sys.stdout.flush()
            child = os.fork()
            if child == 0:
                die_with_parent()
                _perform(act.rehearse, path, recorder)
            running[child] = path, time.monotonic()
            continue
        child, status = os.wait()
        path, began = running.pop(child)
        seconds = time.monotonic() - began
        print(f"{os.waitstatus_to_exitcode(status)} {seconds:.1f} {path}", flush=True)


def become_device(gpu: str, recorder: Recorder) -> str | None:
    """Turn this process into one that has a GPU; the reason if it can run forward passes only."""
    reason = None
    try:
        load_shim()
    except ShimError as error:
        reason = str(error)
        without_shim.install()
    torch.autograd.set_multithreading_enabled(False)
    torch.set_num_threads(1)
    fake_cuda.install(recorder, get_gpu(gpu))
    recorder.mode = fake_tensors.install(recorder)
    kernels.install(recorder)
    return reason


def _perform(rehearse: Any, path: Path, recorder: Recorder) -> None:
    """Run one job, write `<path>.result.json` and, if it worked, its trace; then end."""
    log = os.open(path.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    job = Job.read(path)
    os.environ.update(RANK=str(job.rank), WORLD_SIZE=str(job.world_size))
    result: dict[str, Any]
    try:
        result = rehearse(job, recorder, trace=path.with_suffix(".trace.jsonl"))
    except CrocError as error:
        result = {"rank": job.rank, "refused": str(error)}
    except Exception as error:
        traceback.print_exc()
        result = {"rank": job.rank, "phase": recorder.phase, "error": blame(error)}
    path.with_suffix(".result.json").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(1 if "error" in result or "refused" in result else 0)


if __name__ == "__main__":
    main(int(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
