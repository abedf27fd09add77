#!/usr/bin/env python
"""A long run with everything on: memory, files and threads of all its processes, and step time.

    python benchmarks/soak.py                              # 2,000 steps on two ranks, then the ways
    python benchmarks/soak.py --steps 200 --rounds 1 --out /tmp/soak     # a quick look

The tiny recipe at its smallest, DALI, two loader threads, packing, a validation every 25 steps and
a checkpoint every 50. The run is watched from outside: resident memory, open files and threads of
every process that belongs to it. A figure is flat if its slope over the second half, with the upper
end of a 95 % interval, stays within the bound that the table names.

Then three ways of the same run take turns, so that a slow machine slows all alike:

    safe    as above: saves in the background, heartbeats, watchdog, metrics
    plain   the same, but training waits for each save
    bare    no checkpoint, no heartbeat on disk, no watchdog, no metrics file
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from megatron_croc.training.safety.heartbeat import beat_file, read_beat
from megatron_croc.verification.faults.launch import free_port
from megatron_croc.verification.faults.runs import STAGE, make_data, train_words
from megatron_croc.verification.faults.soak import RSS_GROWTH

RESULTS = Path(__file__).parent / "results"
SAMPLES = 200
"""Measurements of the long run."""

BOUNDS = {"rss_mib": RSS_GROWTH, "files": 0.5, "threads": 0.5, "processes": 0.5, "shm_mib": 0.5}
"""Largest slope that counts as flat, per 1,000 steps and rank."""

WARM_UP = 10
"""First steps of a run that are not timed."""

WAYS: dict[str, tuple[str, ...]] = {
    "safe": ("--async-save",),
    "plain": ("--no-async-save",),
    "bare": (),
}


def write_data(folder: Path) -> Path:
    """Shards with sample lengths, and a tokenizer; returns `folder`."""
    from megatron_croc.data.prepare.lengths import index_lengths
    from megatron_croc.recipes.tiny import tiny

    make_data(folder)
    template = tiny(STAGE).data.conversation_template
    for name in (STAGE, f"valid_{STAGE}"):
        measured = index_lengths(
            folder / name,
            tokenizer_type="SentencePieceTokenizer",
            tokenizer_model=str(folder / "tokenizer.model"),
            template=template,
        )
        list(measured)
    return folder


def words_of(way: str, data: Path, save: Path, steps: int) -> list[str]:
    """The words of the train command for one way."""
    words = train_words(
        data,
        save,
        f"--valid-data-path={data / f'valid_{STAGE}'}",
        f"--train-iters={steps}",
        "--save-interval=50",
        "--keep-last=3",
        "--eval-interval=25",
        "--eval-iters=1",
        "--image-decoder=dali",
        "--num-workers=2",
        "--packing",
        *WAYS[way],
    )
    return [word for word in words if way != "bare" or not word.startswith("--save")]


def run_rank(way: str, times: Path, words: Sequence[str]) -> int:
    """Train in this process; write wall and CPU seconds at the begin of every step to `times`."""
    import torch

    from megatron_croc.training import loop
    from megatron_croc.verification.faults.inject import on_enter, run_command

    torch.set_num_threads(1)
    if way == "bare":
        loop.watch_over = _without_watchdog  # type: ignore[attr-defined]
    stamps = array("d")

    def stamp(phase: str, _: int | None) -> None:
        if phase.startswith("waiting for data"):
            stamps.extend((time.perf_counter(), time.process_time()))

    on_enter(stamp)
    status = run_command("megatron_croc.cli.main", ["train", *words])
    times.write_bytes(stamps.tobytes())
    return status


@contextlib.contextmanager
def _without_watchdog(*_: Any, **__: Any) -> Iterator[Any]:
    yield argparse.Namespace(first_step=None)


@contextlib.contextmanager
def started(way: str, folder: Path, data: Path, steps: int, ranks: int) -> Iterator[list]:
    """Start the ranks of one run; they are killed if the body fails."""
    folder.mkdir(parents=True)
    port = str(free_port())
    processes = []
    for rank in range(ranks):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }
        words = words_of(way, data, folder / "save", steps)
        command = [sys.executable, __file__, "--rank-of", way, str(_times(folder, rank)), *words]
        with open(folder / f"{rank}.log", "wb") as log:
            processes.append(
                psutil.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
    try:
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def _times(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.times"


def finish(processes: Sequence[psutil.Popen], folder: Path) -> np.ndarray:
    """Wait for the end of a run; returns float64 [steps - 1, 2], seconds of wall and CPU a step.

    The CPU seconds are those of all ranks together.
    """
    for rank, process in enumerate(processes):
        if process.wait() != 0:
            raise SystemExit((folder / f"{rank}.log").read_text()[-4000:])
    stamps = [
        np.frombuffer(_times(folder, rank).read_bytes()).reshape(-1, 2)
        for rank in range(len(processes))
    ]
    steps = [np.diff(one, axis=0) for one in stamps]
    return np.stack([steps[0][:, 0], sum(one[:, 1] for one in steps)], axis=1)


def usage_of(processes: Sequence[psutil.Popen]) -> dict[str, float]:
    """Resources of all processes of a run; processes that have just ended count nothing."""
    totals = {"rss_mib": 0.0, "files": 0, "threads": 0, "processes": 0}
    for root in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in (root, *root.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    totals["rss_mib"] += process.memory_info().rss / 2**20
                    totals["files"] += process.num_fds()
                    totals["threads"] += process.num_threads()
                    totals["processes"] += 1
    shared = sum(path.stat().st_size for path in Path("/dev/shm").glob("torch_*"))
    return totals | {"shm_mib": shared / 2**20}


def watch(processes: Sequence[psutil.Popen], save: Path, every: int) -> list[dict[str, float]]:
    """Measure the run about every `every` steps until a rank ends."""
    rows: list[dict[str, float]] = []
    following = 1
    while all(process.poll() is None for process in processes):
        beat = read_beat(beat_file(save / "heartbeats", 0))
        if beat is not None and beat.iteration >= following:
            rows.append({"step": beat.iteration, **usage_of(processes)})
            following = beat.iteration + every
        time.sleep(0.1)
    return rows[:-1]  # the last one may stand in the end of the run


def slopes(rows: Sequence[dict[str, float]], ranks: int) -> dict[str, tuple[float, float]]:
    """Slope of each figure over the second half, per 1,000 steps and rank, and its upper 95 % end.

    The interval comes from a moving-block bootstrap of the residuals: neighbours are alike.
    """
    half = rows[len(rows) // 2 :]
    steps = np.array([row["step"] for row in half]) / 1e3
    draw = np.random.default_rng(1)
    block = max(1, len(half) // 10)
    found = {}
    for name in BOUNDS:
        values = np.array([row[name] for row in half], dtype=float) / ranks
        slope, base = np.polyfit(steps, values, 1)
        residuals = values - slope * steps - base
        drawn = []
        for _ in range(1000):
            begins = draw.integers(0, len(half) - block + 1, -(-len(half) // block))
            noise = np.concatenate([residuals[b : b + block] for b in begins])[: len(half)]
            drawn.append(np.polyfit(steps, slope * steps + base + noise, 1)[0])
        found[name] = (float(slope), float(np.percentile(drawn, 97.5)))
    return found


def compare(root: Path, data: Path, steps: int, ranks: int, rounds: int) -> dict[str, list]:
    """Seconds of wall (median) and of CPU (mean) per step of each way, a pair for each round."""
    found: dict[str, list] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in WAYS:
            folder = root / f"{way}-{number}"
            with started(way, folder, data, steps, ranks) as processes:
                times = finish(processes, folder)[WARM_UP:]
            found[way].append((float(np.median(times[:, 0])), float(times[:, 1].mean())))
    return found


def report(result: dict[str, Any]) -> Iterator[str]:
    """Lines for people."""
    rows = result["samples"]
    yield f"{'step':>6} {'memory MiB':>11} {'files':>6} {'threads':>8} {'processes':>10}"
    for place in np.linspace(0, len(rows) - 1, 6).astype(int):
        row = rows[place]
        yield (
            f"{row['step']:6.0f} {row['rss_mib']:11.1f} {row['files']:6.0f} "
            f"{row['threads']:8.0f} {row['processes']:10.0f}"
        )
    for name, (slope, upper) in result["slopes"].items():
        flat = "flat" if upper <= BOUNDS[name] else "GROWS"
        yield (
            f"{name}: {slope:+.2f} per 1,000 steps and rank in the second half, at most "
            f"{upper:+.2f} (95 %; bound {BOUNDS[name]}): {flat}"
        )
    yield (
        f"second half against first: wall {result['halves']['wall']:.3f}, "
        f"CPU {result['halves']['cpu']:.3f}"
    )
    for way, ratios in result.get("against_bare", {}).items():
        yield (
            f"{way} against bare: wall {statistics.median(r[0] for r in ratios):.3f}, CPU "
            f"{statistics.median(r[1] for r in ratios):.3f} (medians of {len(ratios)} rounds)"
        )


def keep(result: dict[str, Any], folder: Path) -> None:
    """Write soak.json: after the long run, and again at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "soak.json").write_text(json.dumps(result) + "\n")


def main() -> int:
    """Run, print and keep the figures; 1: something grows."""
    if sys.argv[1:2] == ["--rank-of"]:
        return run_rank(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000, help="steps of the long run")
    parser.add_argument("--ranks", type=int, default=2, help="processes of data parallelism")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the three ways")
    parser.add_argument("--round-steps", type=int, default=110, help="steps of each of their runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of soak.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        data = write_data(root / "data")
        with started("safe", root / "long", data, options.steps, options.ranks) as processes:
            rows = watch(processes, root / "long" / "save", max(1, options.steps // SAMPLES))
            times = finish(processes, root / "long")[WARM_UP:]
        first, second = times[: len(times) // 2], times[len(times) // 2 :]
        result = {
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, no GPU",
            "steps": options.steps,
            "ranks": options.ranks,
            "slopes": slopes(rows, options.ranks),
            "halves": {
                "wall": float(np.median(second[:, 0]) / np.median(first[:, 0])),
                "cpu": float(second[:, 1].mean() / first[:, 1].mean()),
            },
            "step_seconds": {
                "wall": float(np.median(times[:, 0])),
                "cpu": float(times[:, 1].mean()),
            },
            "samples": rows,
        }
        keep(result, options.out)
        ways = compare(root, data, options.round_steps, options.ranks, options.rounds)
    result["against_bare"] = {
        way: [
            (one[0] / bare[0], one[1] / bare[1])
            for one, bare in zip(ways[way], ways["bare"], strict=True)
        ]
        for way in WAYS
        if way != "bare"
    }
    keep(result, options.out)
    print("\n".join(report(result)))
    return int(any(upper > BOUNDS[name] for name, (_, upper) in result["slopes"].items()))


if __name__ == "__main__":
    sys.exit(main())
