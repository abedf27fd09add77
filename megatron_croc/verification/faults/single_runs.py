"""Scenarios with a run of their own; the others are made by `break_and_resume`."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from megatron_croc.verification.faults.damage import flip_bit, truncate_shard, zero_images
from megatron_croc.verification.faults.inject import Fault
from megatron_croc.verification.faults.promises import check_exits, check_said, expect
from megatron_croc.verification.faults.runs import STAGE, curve, trace_fault, train_words
from megatron_croc.verification.faults.workplace import (
    Outcome,
    Workplace,
    trace_rows,
    uses_samples_once,
)


def kill_under_torchrun(place: Workplace, save: Path) -> Outcome:
    """Kill a rank under torchrun, which restarts the job by itself."""
    save.mkdir(parents=True)
    kill = Fault(fault="kill", rank=1, iteration=4, marker=str(save / "struck"))
    faults = json.dumps([asdict(kill), asdict(trace_fault(save / "trace"))])
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command = [
        sys.executable,
        "-m",
        *launcher,
        "-m",
        "megatron_croc.verification.faults.inject",
        faults,
    ]
    command += ["megatron_croc.cli.main", "train", *train_words(place.data, save)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        # Restarted ranks sometimes cannot join the store of the agent (torch 2.13).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    expect(done.returncode == 0, f"torchrun ended with {done.returncode}: {done.stderr[-300:]}")
    struck = (save / "struck").stat().st_mtime
    first = next(row for row in trace_rows(save) if row["time"] > struck)
    return Outcome(
        samples_once=place.check_equal(save),
        steps_lost=3 - (first["iteration"] - 1),
        seconds=first["time"] - struck,
    )


def skip_bad_step(place: Workplace, save: Path) -> Outcome:
    """A gradient of NaN on one rank: the step is skipped, and training goes on."""
    fault = Fault(fault="nan_gradient", rank=1, iteration=4)
    exits = place.train(save, fault)
    check_exits(exits, [0, 0])
    check_said(exits, r"step 4 is skipped on all ranks \(gradient norm is nan\): rank 1")
    expect((save / "anomalies" / "iter_0000004.json").exists(), "there is no report")
    ends = [row["loss"] for row in curve(save) if row["iteration"] == 6]
    expect(len(ends) == 1 and ends[0] == ends[0], "the run did not come to a finite end")
    return Outcome(samples_once=uses_samples_once(save), steps_lost=1)


def refuse_damage(place: Workplace, save: Path) -> Outcome:
    """A flipped bit under --strict-resume: the run does not start."""
    check_exits(place.train(save, more=("--exit-interval=4",)), [0, 0])
    flip_bit(save)
    exits = place.train(save, more=("--strict-resume",))
    check_exits(exits, [1, 1])
    check_said(exits, r"iter_0000004.*\n?.*damaged")
    return Outcome()


def skip_bad_images(place: Workplace, save: Path) -> Outcome:
    """Images of zeros in a shard: their samples are skipped, and training goes on."""
    # Four, because up to 3 samples of an epoch remain unused: they do not fill a step.
    zero_images(_copied_shard(place, save), 4)
    exits = place.train(save, more=("--train-iters=none", "--train-epochs=1"))
    check_exits(exits, [0, 0])
    check_said(exits, r"bad sample \(image\).*sample " + re.escape(STAGE))
    return Outcome(samples_once=uses_samples_once(save), steps_lost=0)


def refuse_cut_shard(place: Workplace, save: Path) -> Outcome:
    """A shard of half its size: the run does not start."""
    shard = _copied_shard(place, save)
    truncate_shard(shard)
    exits = place.train(save)
    check_exits(exits, [1, 1])
    check_said(exits, "error: .*" + re.escape(shard.name))
    return Outcome()


def _copied_shard(place: Workplace, save: Path) -> Path:
    """Copy the data to the folder of the run; return its first shard."""
    shutil.copytree(place.data, save / "data")
    return min((save / "data" / STAGE).glob("*.tar"))
