"""A whole training step on one device: speed, MFU, memory, parts; masks and settings side by side.

    python benchmarks/step.py [--recipe croc_7b/pretrain_croc] [--sweep] [--out benchmarks/results]

One process, one GPU, one model with random weights: forward, backward and update on made-up samples
of Croc's shape (35 tokens, an image, 300 tokens), the masks taken in turn so that drift hits all
alike. --sweep tries micro-batches of 1, 2, 4 and 8 samples with and without recomputing whole
layers; a setting that does not fit has its reason in place of figures. A 7B model with its
optimizer's state is 18 bytes a parameter, about 120 GB: it is meant for one GPU of 141 GB, and
--num-layers takes less of the language model. `matching` is the share of the step that waits for
the one-to-one matching. MFU counts the useful operations, those of
megatron_croc/costs/flops.py. On a CPU the tiny recipe runs, and its times say nothing about a
GPU. Not run on a GPU so far.
"""

import argparse
import itertools
import json
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from megatron.core.utils import get_model_config

from megatron_croc.config.model import AttentionBackend, MaskType
from megatron_croc.config.run import RunConfig
from megatron_croc.costs.flops import Work, count_flops
from megatron_croc.data.batch import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Batch
from megatron_croc.data.sample.collate import ReadySample, expand_sample
from megatron_croc.data.sample.tokenization import TokenizedSample
from megatron_croc.data.synthetic import make_batch
from megatron_croc.errors import first_line
from megatron_croc.parallel.device import (
    device_name,
    has_cuda,
    max_memory_allocated,
    reset_peak_memory,
    synchronize,
)
from megatron_croc.parallel.groups import start_distributed, stop_distributed
from megatron_croc.parallel.stopwatch import MegatronTimers, drop_stopwatch, start_stopwatch
from megatron_croc.recipes import get_recipe
from megatron_croc.training.build import TrainingState, build_training_state
from megatron_croc.training.reporting.metrics import StepTotals
from megatron_croc.training.reporting.reporting import peak_flops

TEXT_BEFORE, TEXT_AFTER = 35, 300
WAITED = "matching, waited for"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Something that changes the speed of a step, not its result."""

    micro_batch_size: int
    recompute: Literal["none", "full"]

    def __str__(self) -> str:
        """Name of the setting in the table."""
        layers = ", layers recomputed" if self.recompute == "full" else ""
        return f"micro-batch {self.micro_batch_size}{layers}"


def configure(options: argparse.Namespace) -> RunConfig:
    """The recipe on one device."""
    run = get_recipe(options.recipe)
    run.parallel.tensor_model_parallel_size = 1
    run.parallel.sequence_parallel = False
    run.model.attention_backend = options.attention_backend
    run.training.fp8_format = options.fp8_format
    if options.num_layers is not None:
        run.model.language_model.num_layers = options.num_layers
    return run


def choose(run: RunConfig, training: TrainingState, setting: Setting, batches: int) -> None:
    """Switch the built model to a setting; its layers read these fields in every forward pass."""
    run.training.micro_batch_size = setting.micro_batch_size
    run.training.global_batch_size = setting.micro_batch_size * batches
    is_full = setting.recompute == "full"
    config = get_model_config(training.chunks[0])
    config.recompute_granularity = "full" if is_full else None
    config.recompute_method = "uniform" if is_full else None
    config.recompute_num_layers = 1 if is_full else None


def make_sample(run: RunConfig, number: int) -> ReadySample:
    """A sample of Croc's shape, made from numbers alone."""
    rng = np.random.default_rng((run.training.seed, number))
    vocab_size, size = run.model.language_model.vocab_size, run.model.vision_tower.img_size
    question = [*rng.integers(1, vocab_size, TEXT_BEFORE).tolist(), IMAGE_TOKEN_INDEX]
    answer = rng.integers(1, vocab_size, TEXT_AFTER).tolist()
    tokens = TokenizedSample(
        sample_id=f"step-{number}",
        input_ids=np.array(question + answer),
        labels=np.array([IGNORE_INDEX] * len(question) + answer),
    )
    num_visual_tokens = run.model.vision_tower.num_visual_tokens
    return ReadySample(
        tokens=expand_sample(
            tokens, num_visual_tokens=num_visual_tokens, seq_length=run.data.seq_length
        ),
        epoch=0,
        pixel_values=[torch.from_numpy(rng.integers(0, 256, (3, size, size), dtype=np.uint8))],
    )


def make_step(run: RunConfig, mask_type: MaskType) -> list[Batch]:
    """The micro-batches of one step; the same samples under every mask."""
    run.model.attention_mask_type = mask_type
    size = run.training.micro_batch_size
    return [
        make_batch(run, [make_sample(run, number) for number in range(first, first + size)])
        for first in range(0, run.training.global_batch_size, size)
    ]


def work_of(training: TrainingState, batches: list[Batch]) -> Work:
    """Size of a step, as the trainer's metrics count it."""
    totals = StepTotals(training.run, training.pg_collection)
    for batch in batches:
        totals.count_batch(batch)
    return totals.work


def measure(
    training: TrainingState, steps: dict[MaskType, list[Batch]], repeats: int
) -> dict[MaskType, tuple[float, dict[str, float]]]:
    """Median seconds of a step under each mask, and the mean seconds of its parts.

    `matching, waited for` is the matching that no other work hides, `matching, hidden` the rest.
    """
    times: dict[MaskType, list[float]] = {name: [] for name in steps}
    parts: dict[MaskType, list[dict[str, float]]] = {name: [] for name in steps}
    watch = start_stopwatch()
    get_model_config(training.chunks[0]).timers = MegatronTimers(watch, is_pipelined=False)
    for repeat in range(repeats + 2):  # two to warm up
        for name, batches in steps.items():
            synchronize()
            watch.read()
            started = time.perf_counter()
            metrics = training.train_step.train(batches, training.optimizer, training.scheduler)
            synchronize()
            if repeat >= 2:
                times[name].append(time.perf_counter() - started)
                waited, hidden = metrics.matching_seconds, metrics.matching_hidden_seconds
                matching = {WAITED: waited or 0.0, "matching, hidden": hidden or 0.0}
                parts[name].append(watch.read() | matching)
    drop_stopwatch()
    return {name: (statistics.median(found), _mean(parts[name])) for name, found in times.items()}


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    names = sorted({name for row in rows for name in row})
    return {name: statistics.fmean(row.get(name, 0.0) for row in rows) for name in names}


def rows_of(
    run: RunConfig, training: TrainingState, setting: Setting, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row for each mask, or one with the reason why the setting does not run."""
    choose(run, training, setting, options.micro_batches)
    reset_peak_memory()
    try:
        steps = {mask: make_step(run, mask) for mask in options.masks}
        results = measure(training, steps, options.repeats)
    except torch.OutOfMemoryError as error:
        return [{"setting": str(setting), "reason": first_line(error)}]
    peak, flops_per_second = max_memory_allocated() / 2**30, peak_flops(device_name())
    rows = []
    for mask, (seconds, parts) in results.items():
        run.model.attention_mask_type = mask
        work = work_of(training, steps[mask])
        rate = sum(count_flops(run, work).values()) / seconds
        rows.append(
            {
                "setting": str(setting),
                "mask": mask,
                "seconds": seconds,
                "over": seconds / results[options.masks[0]][0] - 1,
                "tokens_per_second": work.num_tokens / seconds,
                "samples_per_second": run.training.global_batch_size / seconds,
                "tflops": rate / 1e12,
                "mfu": rate / flops_per_second if flops_per_second else None,
                "peak_gib": peak or None,  # of all masks together; None on a CPU
                "matching_share": parts[WAITED] / seconds,
                "parts": parts,
            }
        )
    return rows


def to_line(row: dict[str, Any]) -> str:
    """One line of the table."""
    if "reason" in row:
        return f"{row['setting']:<34} {row['reason'][:90]}"
    mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
    peak = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
    return (
        f"{row['setting']:<34} {row['mask']:<8} {row['seconds'] * 1e3:9.1f} {row['over']:+8.1%} "
        f"{row['tokens_per_second']:10.0f} {row['samples_per_second']:10.2f} {mfu:>7} {peak:>7} "
        f"{row['matching_share']:9.2%}"
    )


HEADER = (
    f"{'setting':<34} {'mask':<8} {'ms':>9} {'over':>8} {'tokens/s':>10} {'samples/s':>10} "
    f"{'MFU':>7} {'GiB':>7} {'matching':>9}"
)


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    recipe = "croc_7b/pretrain_croc" if has_cuda() else "tiny/pretrain_croc"
    parser.add_argument("--recipe", default=recipe)
    masks = ["causal", "visual", "prefix"]
    parser.add_argument("--masks", nargs="+", choices=get_args(MaskType), default=masks)
    parser.add_argument("--micro-batch-sizes", type=int, nargs="+", default=[2], metavar="SAMPLES")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--num-layers", type=int, help="of the language model; default: all")
    parser.add_argument("--recompute", action="store_true", help="whole layers, in the backward")
    parser.add_argument("--fp8-format", choices=("hybrid", "e4m3"), help="needs Transformer Engine")
    parser.add_argument("--sweep", action="store_true", help="1 to 8 samples, both ways")
    parser.add_argument("--attention-backend", choices=get_args(AttentionBackend), default="auto")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, help="folder for step.json")
    return parser.parse_args()


def main() -> None:
    """Run the steps, print the table, keep it when asked."""
    options = parse()
    sizes = (1, 2, 4, 8) if options.sweep else options.micro_batch_sizes
    ways = ("none", "full") if options.sweep else ("full" if options.recompute else "none",)
    settings = [
        Setting(micro_batch_size=size, recompute=way)
        for size, way in itertools.product(sizes, ways)
    ]
    run = configure(options)
    pg_collection = start_distributed(run.parallel, seed=run.training.seed)
    training = build_training_state(run, pg_collection, train_iters=1000)
    rows: list[dict[str, Any]] = []
    print(HEADER)
    for setting in settings:
        for row in rows_of(run, training, setting, options):
            rows.append(row)
            print(to_line(row), flush=True)
        if options.out is not None:  # what is measured stays if a later setting ends the process
            write(options, rows)
    stop_distributed()


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write step.json."""
    options.out.mkdir(parents=True, exist_ok=True)
    result = {
        "hardware": device_name() if has_cuda() else f"cpu, {platform.machine()}",
        "torch": torch.__version__,
        "options": {name: str(value) for name, value in vars(options).items() if name != "out"},
        "rows": rows,
    }
    (options.out / "step.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
