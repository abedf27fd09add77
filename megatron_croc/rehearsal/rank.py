"""The child process: one rank of the job, rehearsed. `python -m megatron_croc.rehearsal.rank JOB`.

It changes torch for the whole process, so nothing else may import it.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from megatron_croc.errors import CrocError
from megatron_croc.planning.gpus import get_gpu
from megatron_croc.rehearsal import fake_cuda, fake_tensors, kernels
from megatron_croc.rehearsal.job import Job
from megatron_croc.rehearsal.places import blame
from megatron_croc.rehearsal.recorder import Recorder
from megatron_croc.rehearsal.shim import ShimError, load_shim


def main(path: Path) -> int:
    """Rehearse the job of a file; writes `<path>.result.json` and, if it worked, its trace."""
    job = Job.read(path)
    os.environ.update(RANK=str(job.rank), WORLD_SIZE=str(job.world_size))
    recorder = Recorder()
    result: dict[str, Any]
    try:
        _become_device(job, recorder)
        # These import megatron-core and torch.cuda, which are the fake ones from here on.
        from megatron_croc.rehearsal import act

        result = act.rehearse(job, recorder, trace=path.with_suffix(".trace.jsonl"))
    except CrocError as error:
        result = {"rank": job.rank, "refused": str(error)}
    except ShimError as error:
        result = {"rank": job.rank, "refused": f"no backward pass here: {error}"}
    except Exception as error:
        traceback.print_exc()
        result = {"rank": job.rank, "phase": recorder.phase, "error": blame(error)}
    path.with_suffix(".result.json").write_text(json.dumps(result))
    return 0 if "error" not in result and "refused" not in result else 1


def _become_device(job: Job, recorder: Recorder) -> None:
    """Turn this process into one that has a GPU, as far as torch can tell."""
    import torch

    if not job.forward_only:
        load_shim()
    torch.autograd.set_multithreading_enabled(False)
    torch.set_num_threads(1)
    fake_cuda.install(recorder, get_gpu(job.gpu))
    recorder.mode = fake_tensors.install(recorder)
    kernels.install(recorder)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
