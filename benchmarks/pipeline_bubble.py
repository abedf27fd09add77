"""Bubble of a pipeline step, measured and compared with (p - 1) / (m + p - 1).

    python benchmarks/pipeline_bubble.py [--out benchmarks/results]

Runs forward and backward of the tiny recipe at PP 2 with m = 1, 2, 4, 8, 16 equal micro-batches.
The slope of the time over m is one micro-batch's work at full load, so the share of a pass that is
not m times the slope is bubble, and what little is fixed (counting, reducing gradients).
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

MICRO_BATCHES = (1, 2, 4, 8, 16)
MICRO_BATCH_SIZE = 8


def work(folder: Path) -> None:
    """On each rank: median seconds of a pass at every number of micro-batches."""
    import torch
    import torch.distributed as dist

    from megatron_croc.data.synthetic import make_step
    from megatron_croc.parallel.groups import start_distributed
    from megatron_croc.recipes import get_recipe
    from megatron_croc.training.build import build_training_state

    run = get_recipe("tiny/finetune")
    run.parallel.pipeline_model_parallel_size = 2
    run.training.micro_batch_size = MICRO_BATCH_SIZE
    pg = start_distributed(run.parallel, seed=1)
    training = build_training_state(run, pg, train_iters=1000)
    seconds = {}
    for count in MICRO_BATCHES:
        run.training.global_batch_size = MICRO_BATCH_SIZE * count
        batch = make_step(run, 0, dp_rank=0, dp_size=1, images=(1,))[:1]
        times = []
        for _ in range(13):
            for chunk in training.chunks:
                chunk.zero_grad_buffer()  # type: ignore[operator]
            dist.barrier()
            started = time.perf_counter()
            training.train_step.forward_backward(batch * count)
            dist.barrier()
            times.append(time.perf_counter() - started)
        seconds[count] = float(torch.tensor(times[2:]).median())
    if dist.get_rank() == 0:
        (folder / "bubble_seconds.json").write_text(json.dumps(seconds))


def report(seconds: dict[int, float], folder: Path) -> None:
    """Print and keep measured and predicted shares."""
    import numpy as np

    counts = np.array([c for c in seconds if c >= 2], dtype=float)
    times = np.array([seconds[int(c)] for c in counts])
    slope = np.polyfit(counts, times, 1)[0]
    rows = [
        {
            "micro_batches": count,
            "seconds": elapsed,
            "bubble_measured": 1.0 - count * slope / elapsed,
            "bubble_predicted": 1.0 / (count + 1.0),
        }
        for count, elapsed in seconds.items()
    ]
    print(f"{'m':>3s} {'s':>8s} {'measured':>9s} {'(p-1)/(m+p-1)':>14s}")
    for row in rows:
        print(
            f"{row['micro_batches']:3d} {row['seconds']:8.3f} "
            f"{row['bubble_measured']:9.1%} {row['bubble_predicted']:14.1%}"
        )
    result = {
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPU cores",
        "command": "python benchmarks/pipeline_bubble.py",
        "layout": "PP 2, gloo",
        "rows": rows,
    }
    (folder / "pipeline_bubble.json").write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Launch two processes, then report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--worker", action="store_true", help="set by this script")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.worker:
        work(options.out)
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", __file__, "--worker", "--out", str(options.out)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    subprocess.run(command, env=environment, check=True)
    raw = options.out / "bubble_seconds.json"
    seconds = {int(count): elapsed for count, elapsed in json.loads(raw.read_text()).items()}
    raw.unlink()
    report(seconds, options.out)


if __name__ == "__main__":
    main()
