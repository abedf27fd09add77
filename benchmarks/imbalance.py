#!/usr/bin/env python
"""Seconds that unequal replicas cost at 64 GPUs, by the replay, with and without balanced steps.

    python benchmarks/imbalance.py                                # distributions that are made up
    python benchmarks/imbalance.py --data SHARDS --tokenizer-model FILE --conversation-template v1

Croc-7B, stage pretrain_croc, data parallel on 64 H100 with both overlaps, micro-batch 2, one
micro-batch a step. A rank of the first and of another replica is rehearsed once; each step of each
distribution is then a replay of these traces, with the samples of all 64 replicas. Costs are peak x
efficiency: nothing is measured. `--data` takes the rows of the run's own plan, by stored lengths
(croc data lengths). The cost of imbalance is the step's time over that of a step in which every
replica has the mean load.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np

from megatron_croc.config.run import RunConfig
from megatron_croc.costs.samples import SampleCost
from megatron_croc.data.order.balance import compose_steps, deal_micro_batches
from megatron_croc.data.order.grouping import GROUPED_WINDOW
from megatron_croc.data.synthetic import llava_like
from megatron_croc.planning.gpus import get_gpu
from megatron_croc.planning.workload import from_numbers
from megatron_croc.recipes import get_recipe
from megatron_croc.rehearsal.job import Rows
from megatron_croc.rehearsal.loads import replica_loads
from megatron_croc.rehearsal.prediction import step_of
from megatron_croc.rehearsal.replay.costs import PeakCosts
from megatron_croc.rehearsal.replay.replay import replay
from megatron_croc.rehearsal.run import Rehearsal, children_at_once, perform
from megatron_croc.rehearsal.sizes import Loads, drawn_loads, load_of, load_of_samples, step_sizes
from megatron_croc.rehearsal.trace import Trace
from megatron_croc.rehearsal.trace_file import read_trace

GPUS, STEPS = 64, 8
RESULTS = Path(__file__).parent / "results" / "imbalance.json"

Draw = Callable[[RunConfig], Loads]
"""Run, of some seed and with or without balancing -> loads of the replicas of a step."""


def the_run() -> RunConfig:
    """The planner's first layout for 64 H100."""
    run = get_recipe("croc_7b/pretrain_croc")
    run.parallel.tensor_model_parallel_size, run.parallel.sequence_parallel = 1, False
    run.optimizer.overlap_grad_reduce = run.optimizer.overlap_param_gather = True
    return replace(run, training=replace(run.training, transformer_impl="local"))


def rehearse(run: RunConfig, folder: Path) -> list[Trace]:
    """Steps of the rehearsed ranks, of micro-batches of mean samples."""
    rehearsal = Rehearsal(
        run=run,
        world_size=GPUS,
        gpu="h100",
        rows=Rows(kind="mean"),
        folder=folder,
        step_only=True,
    )
    perform(
        rehearsal,
        at_once=children_at_once(None),
        time_limit=3600.0,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )
    return [step_of(read_trace(outcome.trace)) for outcome in rehearsal.outcomes]


def like_llava(run: RunConfig) -> Loads:
    """Loads of a step of samples made up in the shape of LLaVA-1.5's."""
    size, micro = run.training.global_batch_size, run.training.micro_batch_size
    number = size if run.data.balance_replicas is None else GROUPED_WINDOW * size
    tokens, images = llava_like(number, seed=run.training.seed)
    rows = np.arange(size).reshape(-1, GPUS, micro).swapaxes(0, 1)
    if run.data.balance_replicas is not None:
        costs = SampleCost.build(run)(tokens, images)
        step = compose_steps(
            costs,
            np.zeros(number, dtype=bool),
            global_batch_size=size,
            replicas=run.data.balance_replicas,
            begin=0,
            key=(run.training.seed,),
        )[:size]
        rows = np.stack(
            [
                step[
                    deal_micro_batches(
                        costs[step], dp_rank=rank, dp_size=GPUS, micro_batch_size=micro, turn=0
                    )
                ]
                for rank in range(GPUS)
            ]
        )
    return [
        [load_of(float(tokens[its].sum()), float(images[its].sum())) for its in own] for own in rows
    ]


def distributions(arguments: argparse.Namespace) -> Iterator[tuple[str, RunConfig, Draw]]:
    """(name, run, loads of a step) of each distribution of lengths."""
    run = the_run()
    if arguments.data is None:
        for name, spread in (("log-normal texts, `croc plan`'s defaults", 0.5),):
            workload = from_numbers(run, text_tokens=200.0, spread=spread)
            yield name, run, lambda its, workload=workload: drawn_loads(its, workload, GPUS)
        yield "LLaVA-like, made up", run, like_llava
        return
    data = replace(
        run.data,
        data_path=(arguments.data,),
        tokenizer_model=arguments.tokenizer_model,
        conversation_template=arguments.conversation_template,
    )

    def planned(its: RunConfig) -> Loads:
        loads = replica_loads(its, Rows(kind="data"), dp_size=GPUS)
        if loads is None:
            raise SystemExit(f"{arguments.data}: no stored lengths; run croc data lengths")
        return loads

    yield f"{arguments.name or arguments.data}, stored lengths", replace(run, data=data), planned


def compare(steps: list[Trace], run: RunConfig, draw: Draw) -> dict[str, float]:
    """Mean seconds of some steps as drawn and balanced, and of equal replicas."""
    costs = PeakCosts(gpu=get_gpu("h100"))
    (mean, *_) = step_sizes(run, "mean", from_numbers(run, text_tokens=200.0), dp_rank=0, dp_size=1)
    base = load_of_samples(mean)
    seconds: dict[str, list[float]] = {}
    spread: list[float] = []
    for seed in range(STEPS):
        seeded = replace(run, training=replace(run.training, seed=seed))
        for kind, balance in (("drawn", None), ("balanced", GPUS)):
            loads = draw(replace(seeded, data=replace(run.data, balance_replicas=balance)))
            equal = {part: fmean(its[0][part] for its in loads) for part in base}
            if balance is None:
                spread += [its[0]["language_model"] for its in loads]
            for name, its in ((kind, loads), (f"{kind}, equal", [[equal]] * GPUS)):
                relative = [[{p: load[p] / base[p] for p in base} for load in own] for own in its]
                timeline = replay(steps, costs, loads=relative, are_relative=True).timeline
                seconds.setdefault(name, []).append(timeline.seconds)
    means = {name: fmean(values) for name, values in seconds.items()}
    return {
        "mean_tokens_of_a_replica": fmean(spread),
        "sd_tokens_of_a_replica": float(np.std(spread)),
        **means,
        "cost_drawn": 1 - means["drawn, equal"] / means["drawn"],
        "cost_balanced": 1 - means["balanced, equal"] / means["balanced"],
    }


def main() -> None:
    """Rehearse, replay, print a line for each distribution, and add it to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", metavar="SHARDS", help="folder of shards with stored lengths")
    parser.add_argument("--name", help="name of the data in the table")
    parser.add_argument("--tokenizer-model", help="its tokenizer")
    parser.add_argument("--conversation-template", default="v1", help="its template")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        steps = rehearse(the_run(), Path(name))
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, run, draw in distributions(arguments):
        found[name] = row = compare(steps, run, draw)
        print(
            f"| {name} | {row['mean_tokens_of_a_replica']:,.0f} +- "
            f"{row['sd_tokens_of_a_replica']:,.0f} | {row['drawn']:.3f} | {row['cost_drawn']:.1%} |"
            f" {row['balanced']:.3f} | {row['cost_balanced']:.1%} |",
            flush=True,
        )
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
