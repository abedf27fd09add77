"""Start what is not finished: on this machine, or as one Slurm array.

A run's folder holds run.yaml and metrics.jsonl. It is finished once metrics.jsonl has the
validation of its last step, so calling the same command again goes on where it stopped.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_croc.config.base import to_yaml
from megatron_croc.scaling.grid import Grid, GridRun
from megatron_croc.training.reporting.metrics_log import read_metric_rows

METRICS = "metrics.jsonl"


def folder_of(entry: GridRun) -> Path:
    """Log folder of a run."""
    assert entry.run.logging.log_dir is not None
    return Path(entry.run.logging.log_dir)


def read_metrics(folder: Path) -> list[dict]:
    """The rows of a run's log; a last line that was cut off is left out."""
    try:
        return [row for _, row in read_metric_rows(folder / METRICS) if row is not None]
    except FileNotFoundError:
        return []


def final_validation(entry: GridRun) -> dict | None:
    """The last step's validation of a finished run of exactly these settings."""
    folder = folder_of(entry)
    try:
        if (folder / "run.yaml").read_text(encoding="utf-8") != to_yaml(entry.run):
            return None
    except FileNotFoundError:
        return None
    last = entry.run.training.train_iters
    found = [r for r in read_metrics(folder) if r.get("iteration") == last and "valid_loss" in r]
    return found[-1] if found else None


def prepare(grid: Grid) -> list[GridRun]:
    """Write run.yaml of every unfinished run; returns these runs."""
    todo = [entry for entry in grid.runs if final_validation(entry) is None]
    for entry in todo:
        folder = folder_of(entry)
        folder.mkdir(parents=True, exist_ok=True)
        if entry.run.checkpoint.save is None:  # it starts anew: rows of a dead run must not stay
            (folder / METRICS).unlink(missing_ok=True)
        (folder / "run.yaml").write_text(to_yaml(entry.run), encoding="utf-8")
    return todo


def train_command(config: str, world_size: str | int) -> list[str]:
    """One run on one node."""
    return [
        *("torchrun", "--standalone", "--nproc-per-node", str(world_size)),
        *("-m", "megatron_croc", "train", "--config", config),
    ]


def run_logged(command: Sequence[str], log: Path, *, nice: int = 0) -> int:
    """Run a command on one thread with its output in a file; returns the exit status."""
    words = ["nice", "-n", str(nice), *command] if nice else command
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with log.open("w", encoding="utf-8") as file:
        return subprocess.run(
            words, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode


def launch_locally(grid: Grid, *, at_once: int = 1, nice: int = 0) -> list[str]:
    """Run what is not finished, `at_once` runs side by side; returns the names that failed."""
    todo = prepare(grid)
    print(f"{len(grid.runs) - len(todo)} of {len(grid.runs)} runs are finished", flush=True)

    def run(entry: GridRun) -> bool:
        folder = folder_of(entry)
        words = train_command(str(folder / "run.yaml"), grid.world_size)
        command = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
        code = run_logged(command, folder / "output.log", nice=nice)
        state = "finished" if code == 0 else f"failed (exit {code}); see {folder / 'output.log'}"
        print(f"{entry.name}: {state}", flush=True)
        return code == 0

    with ThreadPoolExecutor(at_once) as pool:
        succeeded = list(pool.map(run, todo))
    return [entry.name for entry, good in zip(todo, succeeded, strict=True) if not good]


def write_slurm(
    grid: Grid,
    out: Path,
    *,
    gpus_per_node: int = 8,
    at_once: int = 4,
    hours: float = 24.0,
    extra: Sequence[str] = (),
) -> Path:
    """Write out/array.sbatch and out/runs.txt (a run's folder per line); returns the script.

    `hours` is the time limit of one run; `extra` are further #SBATCH options.
    """
    todo = prepare(grid)
    (out / "runs.txt").write_text("".join(f"{folder_of(e)}\n" for e in todo), encoding="utf-8")
    per_node = min(grid.world_size, gpus_per_node)
    nodes = -(-grid.world_size // gpus_per_node)
    minutes = max(1, round(hours * 60))
    options = [
        "--job-name=croc-scaling",
        f"--array=0-{max(len(todo) - 1, 0)}%{at_once}",
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        f"--gpus-per-node={per_node}",
        f"--time={minutes}",
        f"--output={out}/slurm-%A_%a.log",
        *extra,
    ]
    listing = shlex.quote(str(out / "runs.txt"))
    lines = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH {option}" for option in options),
        "set -euo pipefail",
        f'RUN=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {listing})',
        'HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "srun torchrun --nnodes $SLURM_NNODES --nproc-per-node "
        f'{per_node} --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" '
        '--rdzv-endpoint "$HEAD:$((20000 + SLURM_JOB_ID % 20000))" '
        '-m megatron_croc train --config "$RUN/run.yaml"',
    ]
    script = out / "array.sbatch"
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return script
