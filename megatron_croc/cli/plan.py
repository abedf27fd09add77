"""Which layout for these GPUs? Prints the best five, why popular others lose, and their flags.

    croc plan --recipe croc_7b/pretrain_croc --gpus 64 --gpu h100 --text-tokens 200
    croc plan --recipe victor_7b/finetune --gpus 16 --gpu a100 --shards FOLDER --json

Settings may follow as for `croc train` (--global-batch-size 512). Memory is the estimate that
`croc check` prints, for the longest samples expected; time is a model of compute, links and bubble
(docs/planning.md says how far off it was). Neither torch nor a GPU is needed.

    croc plan --published        # the time model against published throughputs
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_croc.errors import CrocError
from megatron_croc.planning.gpus import GPUS, Gpu, get_gpu
from megatron_croc.planning.search import Candidate, popular, reason, search
from megatron_croc.planning.workload import describe, from_numbers, from_shards
from megatron_croc.recipes.command_line import parse_command, run_parser

NUM_SHOWN = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; 1 after a fault, or when nothing fits."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words == ["--published"]:
        from megatron_croc.planning.published import comparison

        print(comparison())
        return 0
    parser = run_parser(prog="croc plan", description=__doc__ or "")
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs (default 8)")
    parser.add_argument("--gpu", default="h100", help=", ".join(GPUS))
    parser.add_argument("--text-tokens", type=float, default=200.0, help="mean of a sample")
    parser.add_argument("--text-spread", type=float, default=0.5, help="sd of the log of it")
    parser.add_argument("--images", type=float, default=1.0, help="mean of a sample")
    parser.add_argument("--shards", type=Path, help="dataset folder to take samples from instead")
    parser.add_argument("--json", action="store_true", help="print JSON")
    try:
        options, run = parse_command(parser, words)
        gpu = get_gpu(options.gpu)
        if options.shards is not None:
            workload = from_shards(run, options.shards)
        else:
            workload = from_numbers(
                run,
                text_tokens=options.text_tokens,
                images=options.images,
                spread=options.text_spread,
            )
        candidates = search(run, options.gpus, gpu, workload)
    except CrocError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    best = candidates[0]
    if best.free < 0:
        print(
            f"error: nothing fits {options.gpus} x {gpu.name}: {best.name} {reason(best, best)}",
            file=sys.stderr,
        )
        return 1
    if options.json:
        print(json.dumps([as_dict(c, options.gpus, gpu, best) for c in candidates[:NUM_SHOWN]]))
        return 0
    print(f"{options.gpus} x {gpu.name}, samples {describe(workload)}\n")
    print(table(candidates[:NUM_SHOWN], options.gpus, gpu))
    print(f"\nwhy {best.name}: {praise(best)}")
    print("\npopular layouts, each at its best micro-batch:")
    for label, candidate in popular(candidates).items():
        print(f"  {label:<32} {candidate.name:<26} {reason(candidate, best)}")
    print(f"\n{best.flags}")
    return 0


def table(candidates: Sequence[Candidate], world_size: int, gpu: Gpu) -> str:
    """Markdown, the best first."""
    lines = [
        "| layout | s/step | tokens/s/GPU | MFU | GB on a GPU | compute | bubble | TP+CP+PP | DP |"
        " matching, imbalance |",
        "|---" * 10 + "|",
    ]
    for candidate in candidates:
        time, parts = candidate.time, candidate.time.parts
        links = sum(parts[n] for n in ("tensor_parallel", "context_parallel", "pipeline_traffic"))
        worst = max(stage.total for stage in candidate.memory) / 1e9
        rate = time.tokens / time.total / world_size
        lines.append(
            f"| {candidate.name} | {time.total:.2f} | {rate:,.0f} |"
            f" {time.mfu(world_size, gpu):.0%} | {worst:.0f} | "
            f"{parts['compute'] + parts['recompute']:.2f} | {parts['bubble']:.2f} | {links:.2f} | "
            f"{parts['data_parallel']:.2f} | {parts['matching'] + parts['imbalance']:.2f} |"
        )
    return "\n".join(lines)


def praise(candidate: Candidate) -> str:
    """Where its time goes, the largest first."""
    parts = sorted(candidate.time.parts.items(), key=lambda item: -item[1])
    shares = [
        f"{name.replace('_', ' ')} {seconds / candidate.time.total:.0%}"
        for name, seconds in parts
        if seconds > 0.005 * candidate.time.total
    ]
    return f"{', '.join(shares)}; {candidate.free / 1e9:.0f} GB stay free after the reserve"


def as_dict(candidate: Candidate, world_size: int, gpu: Gpu, best: Candidate) -> dict:
    """One layout for JSON; seconds and bytes."""
    return {
        "layout": candidate.name,
        "flags": candidate.flags,
        "seconds": candidate.time.total,
        "parts": candidate.time.parts,
        "tokens_per_second_per_gpu": candidate.time.tokens / candidate.time.total / world_size,
        "mfu": candidate.time.mfu(world_size, gpu),
        "memory": [vars(stage) for stage in candidate.memory],
        "free_bytes": candidate.free,
        "reason": "the fastest that fits" if candidate is best else reason(candidate, best),
    }
