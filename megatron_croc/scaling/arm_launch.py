"""Run the arms of a comparison on this machine: every stage, then the held-out questions.

What is finished is skipped, so calling the same command again goes on where it stopped.
"""

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from megatron_croc.checkpoint.state import iteration_of, tracked_checkpoint
from megatron_croc.config.base import nearest, raise_faults, to_yaml
from megatron_croc.scaling.arms import ArmRun, Plan, StageRun
from megatron_croc.scaling.forked import run_forked

ACCURACY = "accuracy.json"
ANSWERS = "answers.jsonl"
QUESTIONS, BASELINE, IMAGES = "valid_finetune.json", "finetune.json", "images"
"""Held-out questions, training questions (for chance) and images, below the folder of data."""

MAX_NEW_TOKENS = 16
BATCH_SIZE = 100
"""Questions that are answered at a time."""


def is_trained(stage: StageRun) -> bool:
    """True when the stage's last checkpoint is there."""
    latest = tracked_checkpoint(stage.checkpoints)
    return latest is not None and iteration_of(latest) == stage.run.training.train_iters


def is_finished(arm: ArmRun) -> bool:
    """True when every stage is trained and the questions are answered."""
    return all(map(is_trained, arm.stages)) and (arm.folder / ACCURACY).is_file()


def launch_arms(
    plan: Plan,
    *,
    only: Sequence[str] | None = None,
    at_once: int = 1,
    nice: int = 0,
    minutes: float | None = None,
) -> list[str]:
    """Run what is not finished, in the order of the plan; returns the names that failed.

    Args:
        plan: the comparisons.
        only: names of the arms to run; None: all.
        at_once: arms side by side; a stage that two of them share is run once.
        nice: niceness of the runs.
        minutes: time after which no further run is started; None: no limit.

    Raises:
        ConfigError: an input is missing, there is no such arm, or a folder holds a run of other
            settings.
    """
    names = {arm.arm for arm in plan.runs}
    unknown = [name for name in only or () if name not in names]
    raise_faults([f"--arms: there is no {name}{nearest(name, names)}" for name in unknown])
    stages = {stage.name: stage for arm in plan.runs for stage in arm.stages}
    faults = [line for s in stages.values() if (line := _other_settings(s)) is not None]
    raise_faults([*_missing_inputs(plan), *faults])
    todo = [arm for arm in plan.runs if not is_finished(arm)]
    print(f"{len(plan.runs) - len(todo)} of {len(plan.runs)} arms are finished", flush=True)
    todo = [arm for arm in todo if only is None or arm.arm in only]
    locks = {name: Lock() for name in stages}
    end = time.monotonic() + (math.inf if minutes is None else 60 * minutes)

    def run(arm: ArmRun) -> str | None:
        started = time.monotonic()
        for stage in arm.stages:
            with locks[stage.name]:
                if is_trained(stage):
                    continue
                if time.monotonic() >= end:
                    return None
                if not _train(stage, nice):
                    return _failed(arm, stage.folder / "output.log")
        if time.monotonic() >= end:
            return None
        if not _answer(arm, plan.data, nice):
            return _failed(arm, arm.folder / "output.log")
        seconds = time.monotonic() - started
        print(f"{arm.arm}, seed {arm.seed}: finished in {seconds:.0f} s", flush=True)
        return None

    with ThreadPoolExecutor(at_once) as pool:
        return [name for name in pool.map(run, todo) if name is not None]


def _missing_inputs(plan: Plan) -> Iterator[str]:
    """Find inputs that are not there: a missing question would show after hours of training."""
    names = [QUESTIONS, BASELINE, IMAGES]
    needed = [plan.data / name for name in names]
    for stage in (stage for arm in plan.runs for stage in arm.stages):
        paths = (*stage.run.data.data_path, *stage.run.data.valid_data_path)
        needed += map(Path, (*paths, str(stage.run.data.tokenizer_model)))
    for arm in plan.runs:
        if (start := arm.stages[0].run.checkpoint.pretrained_checkpoint) is not None:
            needed.append(Path(start))
    for path in dict.fromkeys(needed):
        if not path.exists():
            yield f"--data {plan.data}: there is no {path.relative_to(plan.data)}"


def _other_settings(stage: StageRun) -> str | None:
    """Fault of a folder whose run had other settings."""
    try:
        before = (stage.folder / "run.yaml").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    if before == to_yaml(stage.run):
        return None
    return (
        f"{stage.folder}: holds a run of other settings; name another --out, or remove this folder "
        "and the stages after it"
    )


def _failed(arm: ArmRun, log: Path) -> str:
    name = f"{arm.arm}, seed {arm.seed}"
    print(f"{name}: failed; see {log}", flush=True)
    return name


def _train(stage: StageRun, nice: int) -> bool:
    stage.folder.mkdir(parents=True, exist_ok=True)
    config = stage.folder / "run.yaml"
    config.write_text(to_yaml(stage.run), encoding="utf-8")
    words = ["train", "--config", str(config)]
    return run_forked(words, stage.folder / "output.log", nice=nice) == 0


def _answer(arm: ArmRun, data: Path, nice: int) -> bool:
    arm.folder.mkdir(parents=True, exist_ok=True)
    (arm.folder / ANSWERS).unlink(missing_ok=True)  # of a run that was stopped while it answered
    words = [
        *("generate", "--model", str(arm.stages[-1].checkpoints)),
        *("--tokenizer", str(arm.stages[-1].run.data.tokenizer_model)),
        *("--input", str(data / QUESTIONS), "--image-folder", str(data / IMAGES)),
        *("--baseline", str(data / BASELINE)),
        *("--batch-size", str(BATCH_SIZE), "--max-new-tokens", str(MAX_NEW_TOKENS)),
        *("--output", str(arm.folder / ANSWERS), "--report", str(arm.folder / ACCURACY)),
    ]
    return run_forked(words, arm.folder / "output.log", nice=nice) == 0
