"""Marks in the trace: which micro-batch runs forward or backward, and which part of the step."""

import functools
from collections.abc import Callable
from typing import Any, Literal

from megatron.core.pipeline_parallel import schedules

from megatron_croc.rehearsal.recorder import Recorder
from megatron_croc.training import build, step
from megatron_croc.training.step import TrainStep

_PHASES = {"summing gradients": "gradients", "updating weights": "optimizer"}
"""Phase of the heartbeat -> phase of the trace; of others the recorder's own."""


def install(recorder: Recorder, train_step: TrainStep, *, num_microbatches: int) -> None:
    """Let megatron's schedule and the training step mark where they are."""
    config = train_step.models[0].config
    num_chunks = len(train_step.chunks)
    group_size = config.microbatch_group_size_per_vp_stage  # type: ignore[union-attr]
    table = schedules.get_schedule_table(num_microbatches, num_chunks, group_size)

    def marked(real: Callable[..., Any], direction: Literal["forward", "backward"]) -> Any:
        count = 0

        @functools.wraps(real)
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            micro_batch, chunk = table[count % len(table)]
            count += 1
            if direction == "backward":
                chunk = num_chunks - 1 - chunk
            recorder.mark(micro_batch=micro_batch, direction=direction, chunk=chunk)
            result = real(*args, **kwargs)
            recorder.mark()
            return result

        return run

    schedules.forward_step = marked(schedules.forward_step, "forward")
    schedules.backward_step = marked(schedules.backward_step, "backward")
    for module in (step, build):
        module.enter = _entering(recorder, module.enter)  # type: ignore[assignment]


def _entering(recorder: Recorder, real: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(real)
    def enter(phase: str, **about: Any) -> None:
        real(phase, **about)
        if phase in _PHASES:
            recorder.mark(phase=_PHASES[phase])

    return enter
