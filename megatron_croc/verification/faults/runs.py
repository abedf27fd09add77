"""Runs for fault injection: generated data, a tiny model, and the trace of its samples."""

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_croc.verification.faults.inject import Fault

NUM_IMAGES = 60
STAGE = "pretrain_croc"

MODEL = (
    "--num-layers=2",
    "--hidden-size=64",
    "--ffn-hidden-size=96",
    "--vision-num-layers=3",
    "--vision-hidden-size=32",
    "--vision-ffn-hidden-size=64",
    "--img-size=56",
    "--pool-size=32",
    "--micro-batch-size=1",
    "--global-batch-size=4",
    "--image-decoder=pil",
    "--num-workers=1",
    "--no-tensorboard",
)
"""A Croc of two layers; 4 samples a step."""


def make_data(folder: Path) -> Path:
    """Draw a data set with tokenizer and shards; returns `folder`."""
    from megatron_croc.data.demo.small import write_demo

    return write_demo(folder, (STAGE, f"valid_{STAGE}"), num_images=NUM_IMAGES)


def train_words(data: Path, save: Path, *more: str) -> list[str]:
    """The train command's words for a run of 6 steps that saves every second one."""
    return [
        f"--recipe=tiny/{STAGE}",
        f"--data-path={data / STAGE}",
        f"--tokenizer-model={data / 'tokenizer.model'}",
        f"--save={save}",
        "--train-iters=6",
        "--save-interval=2",
        *MODEL,
        *more,
    ]


def faulty_train(faults: Sequence[Fault], words: Sequence[str]) -> int:
    """The train command in this process, with faults; its exit status."""
    from megatron_croc.verification.faults.inject import inject, run_command

    for fault in faults:
        inject(fault)
    return run_command("megatron_croc.cli.main", ["train", *words])


def trace_fault(folder: Path) -> Fault:
    """Return a trace without a fault: the samples of every step, written to `folder`."""
    return Fault(fault="trace", trace=str(folder))


def curve(save: Path) -> list[dict]:
    """Rows of metrics.jsonl without times and rates."""
    from megatron_croc.training.reporting.metrics_log import without_times

    lines = (save / "metrics.jsonl").read_text().splitlines()
    return [without_times(json.loads(line)) for line in lines]


def effective_samples(trace: Path) -> dict[int, list[str]]:
    """Step -> samples behind the final weights; of a repeated step, the last attempt."""
    steps: dict[int, dict[str, list[str]]] = {}
    for path in sorted(trace.glob("rank_*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            steps.setdefault(row["iteration"], {})[path.stem] = row["samples"]
    return {
        iteration: sorted(sample for samples in by_rank.values() for sample in samples)
        for iteration, by_rank in sorted(steps.items())
    }
