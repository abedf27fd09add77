"""The runs that faults are put into: data made on the spot, a tiny model, and their traces."""

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
    """The train command's words for a run of 6 steps that saves every second one and resumes."""
    return [
        f"--recipe=tiny/{STAGE}",
        f"--data-path={data / STAGE}",
        f"--tokenizer-model={data / 'tokenizer.model'}",
        f"--save={save}",
        f"--load={save}",
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
    return run_command("megatron_croc.cli.train", words)


def trace_fault(folder: Path) -> Fault:
    """No fault: only notes what is trained on."""
    return Fault(fault="trace", trace=str(folder))


def curve(save: Path) -> list[dict]:
    """The lines of metrics.jsonl without what is a time."""
    from megatron_croc.training.reporting.metrics_log import without_times

    lines = (save / "metrics.jsonl").read_text().splitlines()
    return [without_times(json.loads(line)) for line in lines]


def effective_samples(trace: Path) -> dict[int, list[str]]:
    """Step -> samples of the weights the run ended with: of a step done again, the last time."""
    steps: dict[int, dict[str, list[str]]] = {}
    for path in sorted(trace.glob("rank_*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            steps.setdefault(row["iteration"], {})[path.stem] = row["samples"]
    return {
        iteration: sorted(sample for samples in by_rank.values() for sample in samples)
        for iteration, by_rank in sorted(steps.items())
    }
