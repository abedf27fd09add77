"""Steps on this CPU against the replay's prediction, and the bubble against (p - 1) / (m + p - 1).

    python benchmarks/timeline.py [--layouts pp2 tp2] [--out benchmarks/results]

Runs forward and backward of the tiny recipe on two gloo ranks at PP 2, PP 2 x VPP 2, TP 2 with
sequence parallelism and DP 2, each with 1 to 16 equal micro-batches. The costs of every segment of
a pass are measured in the run of 4 micro-batches alone; from them and the order of calls, the
replay predicts the time of all others. Two clocks: seconds on the wall, which other processes
stretch, and the CPU seconds along the longest path through both ranks, which they do not.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

LAYOUTS = {
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2 vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "tp2 sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "dp2": {},
}
COUNTS = (1, 2, 4, 8, 16)
MEASURED = 4
"""Micro-batches of the run that gives the costs."""

REPEATS = 7
MICRO_BATCH_SIZE = 8


def work(layout: str, folder: Path) -> None:
    """On each rank: measure, and write what was recorded."""
    import torch
    import torch.distributed as dist
    from timeline_recorder import SLOTS, Recorder, install, mark_passes

    from megatron_croc.data.synthetic import make_step
    from megatron_croc.parallel.groups import start_distributed
    from megatron_croc.recipes import get_recipe
    from megatron_croc.rehearsal.trace import Group, Header
    from megatron_croc.rehearsal.trace_file import write_trace
    from megatron_croc.training import step
    from megatron_croc.training.build import build_training_state

    torch.set_num_threads(1)
    run = get_recipe("tiny/finetune")
    for name, value in LAYOUTS[layout].items():
        setattr(run.parallel, name, value)
    run.training.micro_batch_size = MICRO_BATCH_SIZE
    run.training.global_batch_size = MICRO_BATCH_SIZE * 2 * max(COUNTS)
    pg = start_distributed(run.parallel, seed=1)
    rank = dist.get_rank()
    if rank == 0:
        (folder / "mailbox").touch()
        os.truncate(folder / "mailbox", SLOTS * 8)
    dist.barrier()
    training = build_training_state(run, pg, train_iters=1000)
    recorder = Recorder(folder / "mailbox")
    install(recorder)
    prepare = mark_passes(recorder)
    schedule = step.run_schedule
    ends = []

    def timed(*arguments: Any, **options: Any) -> Any:
        dist.barrier()
        began = time.perf_counter()
        recorder.start()
        result = schedule(*arguments, **options)
        cpu = recorder.stop()
        ends.append((began, time.perf_counter(), cpu, recorder.busy_wall, recorder.busy_cpu))
        return result

    step.run_schedule = timed
    chunks = len(training.chunks)
    group_size: Any = training.train_step.models[0].config.microbatch_group_size_per_vp_stage
    batch = make_step(run, 0, dp_rank=0, dp_size=pg.dp.size(), images=(1,))[:1]
    results: dict[int, Any] = {}
    for count in counts_of(layout):
        ends.clear()
        for repeat in range(REPEATS + 1):
            if repeat == 1:  # the first warms up
                ends.clear()
                recorder.wall.clear()
                recorder.cpu.clear()
                recorder.waited.clear()
            for chunk in training.chunks:
                chunk.zero_grad_buffer()  # type: ignore[operator]
            prepare(count, chunks, group_size)
            training.train_step.forward_backward(batch * count)
        sizes = {axis: getattr(pg, axis).size() for axis in ("tp", "cp", "dp", "pp")}
        header = Header(
            rank=rank,
            world_size=dist.get_world_size(),
            sizes=sizes,
            vpp=chunks,
            groups=tuple(Group(name=n, ranks=r, is_ready=True) for n, r in recorder.groups.items()),
            backend="gloo",
        )
        write_trace(folder / f"{count}.{rank}.jsonl", header, recorder.events)
        tables = {"wall": dict(recorder.wall), "cpu": dict(recorder.cpu)}
        mine = {"ends": list(ends), "waited": dict(recorder.waited), **tables}
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        results[count] = everyone
    if rank == 0:
        (folder / "measured.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def counts_of(layout: str) -> tuple[int, ...]:
    """Numbers of micro-batches; the interleaved schedule needs a multiple of the stages."""
    return tuple(c for c in COUNTS if "vpp" not in layout or c % 2 == 0)


def costs_of(ranks: list[Any], clock: str) -> dict[str, Any]:
    """Table of costs from one run."""
    operations = {
        key: {"each": median(seconds) if clock == "cpu" else fmean(seconds)}
        for its in ranks
        for key, seconds in its[clock].items()
    }
    kinds: dict[str, list[float]] = {}
    if clock == "wall":  # the shorter side did not wait for the other
        for key in {key for its in ranks for key in its["waited"]}:
            sides = [min(its["waited"][key]) for its in ranks if key in its["waited"]]
            kinds.setdefault(key.split()[0], []).append(min(sides))
    found = {kind: fmean(times) for kind, times in kinds.items()}
    transfer = min(found.get("send", 0.0), found.get("receive", 0.0))
    collectives = {k: {"each": v} for k, v in found.items() if k not in ("send", "receive")}
    return {
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPU cores",
        "operations": operations,
        "collectives": {"*": {}, **collectives},
        "transfer": {"each": transfer},
    }


def measure(layout: str) -> list[dict[str, Any]]:
    """Run one layout and predict each of its runs."""
    from megatron_croc.rehearsal.replay.costs import table_costs
    from megatron_croc.rehearsal.replay.replay import replay
    from megatron_croc.rehearsal.trace_file import read_trace

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", __file__, "--worker", layout, "--out", name]
        environment = {"PYTHONPATH": os.getcwd(), **os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, check=True)
        measured = json.loads((folder / "measured.json").read_text())
        rows = []
        for count in counts_of(layout):
            traces = [read_trace(folder / f"{count}.{rank}.jsonl") for rank in range(2)]
            row: dict[str, Any] = {"layout": layout, "micro_batches": count}
            stages = 2 if "pp2" in layout else 1
            chunks = 2 if "vpp2" in layout else 1
            row["formula"] = (stages - 1) / (count * chunks + stages - 1)
            for clock in ("cpu", "wall"):
                table = costs_of(measured[str(MEASURED)], clock)
                costs = table_costs(table, name="this CPU")
                result = replay(traces, costs)
                assert not result.faults, result.faults
                steps = zip(*(its["ends"] for its in measured[str(count)]), strict=True)
                times, bubbles = zip(*(_step(sides, clock) for sides in steps), strict=True)
                timeline = result.timeline
                row[clock] = {
                    "measured": median(times),
                    "predicted": timeline.seconds,
                    "error": timeline.seconds / median(times) - 1,
                    "bubble_measured": median(bubbles),
                    "bubble_predicted": 1 - timeline.compute / timeline.seconds,
                }
            rows.append(row)
    return rows


def _step(sides: tuple[list[float], ...], clock: str) -> tuple[float, float]:
    """(seconds, share in which a rank does not compute) of one step."""
    if clock == "cpu":
        seconds = max(side[2] for side in sides)
        busy = fmean(side[4] for side in sides)
    else:
        seconds = max(side[1] for side in sides) - max(side[0] for side in sides)
        busy = fmean(side[3] for side in sides)
    return seconds, 1 - busy / seconds


def report(rows: list[dict[str, Any]]) -> str:
    """A table for people."""
    lines = [
        "| layout | m | CPU ms | predicted | error | waits | predicted | (p-1)/(vm+p-1) "
        "| wall ms | predicted | error |",
        "|---" * 11 + "|",
    ]
    for row in rows:
        cells = [row["layout"], row["micro_batches"], *_cells(row["cpu"])]
        cells += [f"{row['cpu'][name]:.1%}" for name in ("bubble_measured", "bubble_predicted")]
        cells += [f"{row['formula']:.1%}", *_cells(row["wall"])]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _cells(clock: dict[str, float]) -> list[str]:
    measured, predicted = clock["measured"] * 1e3, clock["predicted"] * 1e3
    return [f"{measured:.1f}", f"{predicted:.1f}", f"{clock['error']:+.1%}"]


def main() -> None:
    """Run every layout, then report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--worker", metavar="LAYOUT", help="set by this script")
    options = parser.parse_args()
    if options.worker is not None:
        work(options.worker, options.out)
        return
    rows = [row for layout in options.layouts for row in measure(layout)]
    print(report(rows))
    result = {
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPU cores",
        "load_average": os.getloadavg()[0],
        "command": "python benchmarks/timeline.py",
        "costs": f"measured at {MEASURED} micro-batches",
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "timeline.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
