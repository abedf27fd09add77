#!/usr/bin/env python
"""Time that training would wait for data, measured by a consumer that keeps its pace.

    python benchmarks/data_wait.py --seconds-per-step 1.0 --steps 20 \
        --recipe tiny/pretrain_croc --data-path data/captions --tokenizer-model tokenizer.model

Reads with the loader training uses (one data-parallel rank of `--dp-size`) and takes a whole
step's micro-batches every so many seconds. The wait of the first step, which fills the queue, is
given apart.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_croc.config.run import RunConfig
from megatron_croc.data.batch import Batch
from megatron_croc.data.loader import build_train_loader
from megatron_croc.errors import CrocError
from megatron_croc.recipes.command_line import parse_command, run_parser


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Waiting times of a consumer."""

    first_step: float
    """Seconds until the first step's micro-batches were there."""

    per_step: float
    """Mean seconds each later step waited."""

    share: float
    """Of the later steps' whole time."""

    samples: int
    """Samples of all steps."""

    tokens: int
    """Tokens of all steps, padding not counted."""


def measure_wait(
    batches: Iterator[Batch], *, num_microbatches: int, seconds_per_step: float, steps: int
) -> Waiting:
    """Take `steps` steps of micro-batches, sleeping through the time a step would compute.

    Args:
        batches: micro-batches of one rank, such as an open MicroBatchLoader.
        num_microbatches: of one step.
        seconds_per_step: pretended time of forward, backward and update.
        steps: at least 2.
    """
    waits: list[float] = []
    samples = tokens = 0
    for _ in range(steps):
        started = time.perf_counter()
        taken = [next(batches) for _ in range(num_microbatches)]
        waits.append(time.perf_counter() - started)
        samples += sum(len(batch.sample_ids) for batch in taken)
        tokens += sum(int(batch.mixed_mask.cu_seqlens[-1]) for batch in taken)
        time.sleep(seconds_per_step)
    later = sum(waits[1:])
    return Waiting(
        first_step=waits[0],
        per_step=later / (steps - 1),
        share=later / (later + seconds_per_step * (steps - 1)),
        samples=samples,
        tokens=tokens,
    )


def simulate(run: RunConfig, *, dp_size: int, seconds_per_step: float, steps: int) -> Waiting:
    """`measure_wait` over rank 0 of a run's own training loader."""
    rows_per_pass = run.training.micro_batch_size * dp_size
    with build_train_loader(run, dp_rank=0, dp_size=dp_size, state=None) as batches:
        return measure_wait(
            batches,
            num_microbatches=run.training.global_batch_size // rows_per_pass,
            seconds_per_step=seconds_per_step,
            steps=steps,
        )


def main() -> None:
    """Measure and print."""
    parser = run_parser(prog="python benchmarks/data_wait.py", description=__doc__ or "")
    parser.add_argument("--seconds-per-step", type=float, required=True, help="pretended compute")
    parser.add_argument("--steps", type=int, default=20, help="steps to take (default 20)")
    parser.add_argument("--dp-size", type=int, default=1, help="data-parallel ranks (default 1)")
    options, run = parse_command(parser, None)
    waiting = simulate(
        run,
        dp_size=options.dp_size,
        seconds_per_step=options.seconds_per_step,
        steps=options.steps,
    )
    print(f"first step      {waiting.first_step:.3f} s")
    print(f"later steps     {waiting.per_step * 1000:.1f} ms each, {waiting.share:.2%} of the time")
    print(f"samples, tokens {waiting.samples}, {waiting.tokens}")


if __name__ == "__main__":
    try:
        main()
    except CrocError as error:
        sys.exit(f"error: {error}")
