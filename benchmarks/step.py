"""Cost of mixed attention in a whole training step: `visual` and `prefix` against `causal`.

    python benchmarks/step.py [--recipe croc_7b/pretrain_croc] [--out benchmarks/results]

One process, one GPU, one model with fresh weights: forward, backward and update on made-up samples
of Croc's shape (35 tokens, an image, 300 tokens), the masks taken in turn so that drift hits all
alike. A 7B model with its optimizer's state is 18 bytes a parameter, about 120 GB; with
--recompute it is meant for one GPU of 141 GB, and --num-layers takes less of the language model.
On a CPU the tiny recipe runs and its times say nothing about a GPU. Not run on a GPU so far.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from megatron_croc.config.model import AttentionBackend, MaskType
from megatron_croc.config.run import RunConfig
from megatron_croc.data.batch import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Batch
from megatron_croc.data.sample.collate import ReadySample, expand_sample
from megatron_croc.data.sample.tokenization import TokenizedSample
from megatron_croc.data.synthetic import make_batch
from megatron_croc.parallel.device import (
    device_name,
    has_cuda,
    max_memory_allocated,
    synchronize,
)
from megatron_croc.parallel.groups import start_distributed, stop_distributed
from megatron_croc.recipes import get_recipe
from megatron_croc.training.build import TrainingState, build_training_state

TEXT_BEFORE, TEXT_AFTER = 35, 300


def configure(options: argparse.Namespace) -> RunConfig:
    """The recipe on one device."""
    run = get_recipe(options.recipe)
    run.parallel.tensor_model_parallel_size = 1
    run.parallel.sequence_parallel = False
    run.training.micro_batch_size = options.micro_batch_size
    run.training.global_batch_size = options.micro_batch_size * options.micro_batches
    run.model.attention_backend = options.attention_backend
    if options.num_layers is not None:
        run.model.language_model.num_layers = options.num_layers
    if options.recompute:
        run.training.recompute_granularity = "full"
        run.training.recompute_method = "uniform"
        run.training.recompute_num_layers = 1
    return run


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


def measure(training: TrainingState, steps: dict[str, list[Batch]], repeats: int) -> dict[str, Any]:
    """Median milliseconds of a step under each mask, and the last loss."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 2):  # two to warm up
        for name, batches in steps.items():
            synchronize()
            started = time.perf_counter()
            training.train_step.train(batches, training.optimizer, training.scheduler)
            synchronize()
            if repeat >= 2:
                times[name].append((time.perf_counter() - started) * 1e3)
    return {
        name: {"milliseconds": statistics.median(found), "fastest": min(found)}
        for name, found in times.items()
    }


def main() -> None:
    """Run the steps, print the table, keep it when asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    recipe = "croc_7b/pretrain_croc" if has_cuda() else "tiny/pretrain_croc"
    parser.add_argument("--recipe", default=recipe)
    parser.add_argument("--masks", nargs="+", choices=get_args(MaskType), default=None)
    parser.add_argument("--micro-batch-size", type=int, default=2, help="samples of a packed row")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--num-layers", type=int, help="of the language model; default: all")
    parser.add_argument("--recompute", action="store_true", help="whole layers, in the backward")
    parser.add_argument("--attention-backend", choices=get_args(AttentionBackend), default="auto")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, help="folder for step.json")
    options = parser.parse_args()

    run = configure(options)
    masks: list[MaskType] = options.masks or ["causal", "visual", "prefix"]
    pg_collection = start_distributed(run.parallel, seed=run.training.seed)
    training = build_training_state(run, pg_collection, train_iters=1000)
    steps = {mask_type: make_step(run, mask_type) for mask_type in masks}
    tokens = sum(batch.mixed_mask.bounds[-1] for batch in steps[masks[0]])
    results = measure(training, steps, options.repeats)
    peak = max_memory_allocated() / 2**30 if has_cuda() else None
    stop_distributed()

    floor = results[masks[0]]["milliseconds"]
    print(f"{'mask':<8} {'ms':>10} {'tokens/s':>10} {'over ' + masks[0]:>12}")
    for mask_type, row in results.items():
        row["tokens_per_second"] = tokens / row["milliseconds"] * 1e3
        row["relative"] = row["milliseconds"] / floor
        print(
            f"{mask_type:<8} {row['milliseconds']:10.1f} {row['tokens_per_second']:10.0f} "
            f"{row['relative'] - 1:+12.1%}"
        )
    if peak is not None:
        print(f"peak memory {peak:.1f} GiB")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        result = {
            "hardware": device_name() if has_cuda() else f"cpu, {platform.machine()}",
            "torch": torch.__version__,
            "options": {name: str(value) for name, value in vars(options).items() if name != "out"},
            "tokens": tokens,
            "peak_gib": peak,
            "masks": results,
        }
        (options.out / "step.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
