"""The fastest layouts for a number of GPUs: the best five, why popular others lose, and flags.

    croc plan --recipe croc_7b/pretrain_croc --gpus 64 --gpu h100 --text-tokens 200
    croc plan --recipe victor_7b/finetune --gpus 16 --gpu a100 --shards FOLDER --json
    croc plan --recipe croc_7b/pretrain_croc --gpus 16 --write run.yaml
    croc plan --recipe croc_7b/pretrain_croc --gpus 64 --text-tokens 200 --replay

Settings may follow as for `croc train` (--global-batch-size 512). --write makes a file of the first
layout and the settings given, for --config. --replay rehearses a step of each
of the five (`croc rehearse`) and orders them by its replay, in minutes of CPU. Memory is the
estimate that `croc check` prints for the same samples; time is a model of compute, links and bubble
(docs/planning.md says how far off it was). No GPU is needed, and without --replay no torch.

    croc plan --published        # the time model against published throughputs
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_croc.cli.errors import reports_errors
from megatron_croc.cli.plan_replay import (
    add_replay_options,
    replay_as_dict,
    replay_lines,
    replayed,
)
from megatron_croc.cli.sample_options import add_sample_options, read_workload, sample_flags
from megatron_croc.planning.fit import GIB
from megatron_croc.planning.gpus import GPUS, Gpu, get_gpu
from megatron_croc.planning.layouts import LAYOUT
from megatron_croc.planning.search import Candidate, popular, reason, search
from megatron_croc.planning.workload import describe
from megatron_croc.recipes.command_line import parse_command, run_parser
from megatron_croc.recipes.run_file import as_run_file, write_run_file

NUM_SHOWN = 5


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; return the exit status, 1 also if nothing fits."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words == ["--published"]:
        from megatron_croc.planning.published import comparison

        print(comparison())
        return 0
    parser = run_parser(prog="croc plan", description=__doc__ or "")
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs (default 8)")
    parser.add_argument("--gpu", default="h100", help=", ".join(GPUS))
    add_sample_options(parser)
    parser.add_argument("--write", type=Path, metavar="FILE.yaml", help="write the first layout")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--replay", action="store_true", help="settle the order by replayed steps")
    add_replay_options(parser)
    options, run = parse_command(parser, words)
    gpu = get_gpu(options.gpu)
    workload = read_workload(options, run)
    candidates = search(run, options.gpus, gpu, workload)
    best = candidates[0]
    if best.free < 0:
        print(
            f"error: nothing fits {options.gpus} x {gpu.name}: {best.name} {reason(best, best)}",
            file=sys.stderr,
        )
        return 1
    shown = [candidate for candidate in candidates[:NUM_SHOWN] if candidate.free >= 0]
    settled = None
    if options.replay:
        settled = replayed(options, shown, gpu, workload)
        best = settled[0].candidate
        if settled[0].seconds is None:
            print(
                f"error: no layout was replayed: {best.name}: {settled[0].reason}", file=sys.stderr
            )
            return 1
    if options.write is not None:
        comment = f"{best.name} for {options.gpus} x {gpu.name}\n{next_commands(options, gpu)}"
        text = as_run_file(best.run, options.recipe, always=LAYOUT, comment=comment)
        write_run_file(options.write, text)
    if options.json:
        rows = [as_dict(c, options.gpus, gpu, candidates[0]) for c in shown]
        if settled is not None:
            order = [shown.index(entry.candidate) for entry in settled]
            rows = [
                {**rows[n], "replay": replay_as_dict(entry)}
                for n, entry in zip(order, settled, strict=True)
            ]
        print(json.dumps(rows))
        return 0
    print(f"{options.gpus} x {gpu.name}, samples {describe(workload)}\n")
    if settled is None:
        print(table(candidates[:NUM_SHOWN], options.gpus, gpu))
        print(f"\nwhy {best.name}: {praise(best)}")
    else:
        print("\n".join(replay_lines(settled)))
    print("\npopular layouts by the formula, each at its best micro-batch:")
    for label, candidate in popular(candidates).items():
        print(f"  {label:<32} {candidate.name:<26} {reason(candidate, candidates[0])}")
    if settled is None:
        print("\nthe order is a formula's; --replay settles it by replayed steps (minutes of CPU)")
    print(f"\n{best.flags}")
    if options.write is not None:
        print(f"\n{best.name} is written to {options.write}:\n{next_commands(options, gpu)}")
    return 0


def next_commands(options: argparse.Namespace, gpu: Gpu) -> str:
    """Commands that take the written file, a line each."""
    file, count = shlex.quote(str(options.write)), options.gpus
    check = f"croc check --config {file} --world-size {count} --gpu {gpu.name}"
    nodes = -(-count // gpu.gpus_per_node)
    train = "croc" if count == 1 else f"torchrun --nproc-per-node {count} -m megatron_croc"
    if nodes > 1:  # addresses of the nodes: docs/launching.md
        train = f"torchrun --nnodes {nodes} --nproc-per-node {count // nodes} -m megatron_croc"
    return f"{check} {sample_flags(options)}\n{train} train --config {file}"


def table(candidates: Sequence[Candidate], world_size: int, gpu: Gpu) -> str:
    """Markdown, the best first."""
    lines = [
        "| layout | s/step | tokens/s/GPU | MFU | GiB on a GPU | compute | bubble | TP+CP+PP | DP |"
        " matching, imbalance |",
        "|---" * 10 + "|",
    ]
    for candidate in candidates:
        time, parts = candidate.time, candidate.time.parts
        links = sum(parts[n] for n in ("tensor_parallel", "context_parallel", "pipeline_traffic"))
        rate = time.tokens / time.total / world_size
        lines.append(
            f"| {candidate.name} | {time.total:.2f} | {rate:,.0f} |"
            f" {time.mfu(world_size, gpu):.0%} | {candidate.fit.tensors / GIB:.1f} | "
            f"{parts['compute'] + parts['recompute']:.2f} | {parts['bubble']:.2f} | {links:.2f} | "
            f"{parts['data_parallel']:.2f} | {parts['matching'] + parts['imbalance']:.2f} |"
        )
    return "\n".join(lines)


def praise(candidate: Candidate) -> str:
    """Describe the parts of the step time of a layout, the largest first."""
    parts = sorted(candidate.time.parts.items(), key=lambda item: -item[1])
    shares = [
        f"{name.replace('_', ' ')} {seconds / candidate.time.total:.0%}"
        for name, seconds in parts
        if seconds > 0.005 * candidate.time.total
    ]
    return f"{', '.join(shares)}; {candidate.free / GIB:.0f} GiB stay free after the reserve"


def as_dict(candidate: Candidate, world_size: int, gpu: Gpu, best: Candidate) -> dict:
    """One layout for JSON; seconds and bytes."""
    return {
        "layout": candidate.name,
        "flags": candidate.flags,
        "seconds": candidate.time.total,
        "parts": candidate.time.parts,
        "tokens_per_second_per_gpu": candidate.time.tokens / candidate.time.total / world_size,
        "mfu": candidate.time.mfu(world_size, gpu),
        "memory": [vars(stage) for stage in candidate.fit.stages],
        "free_bytes": candidate.free,
        "reason": "the fastest that fits" if candidate is best else reason(candidate, best),
    }
