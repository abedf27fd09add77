"""Validation on the same held-out samples every time, without dropout and update."""

from dataclasses import fields, replace

from megatron_croc.data.loader import build_valid_loader
from megatron_croc.parallel.stopwatch import region
from megatron_croc.training.answers import check_answers
from megatron_croc.training.batch_broadcast import open_batch_broadcast
from megatron_croc.training.build import TrainingState
from megatron_croc.training.reporting.metrics import StepMetrics

_AVERAGED = ("text_loss", "reconstruction_loss", "loss")


@region("validation", whole=True)
def evaluate(training: TrainingState) -> StepMetrics:
    """Compute the mean losses of `eval_iters` global batches, and check answers if configured."""
    run = training.run
    steps: list[StepMetrics] = []
    with open_batch_broadcast(run, training.pg_collection, build_valid_loader) as broadcaster:
        for _ in range(run.training.eval_iters):
            steps.append(training.train_step.evaluate(broadcaster.next_step()))
    metrics = _combine(steps)
    if run.training.eval_answers_iters:
        counts = check_answers(training)
        metrics = replace(
            metrics, num_answers=counts.num_answers, num_answers_right=counts.num_right
        )
    return metrics


def _combine(steps: list[StepMetrics]) -> StepMetrics:
    combined = {}
    for field in fields(StepMetrics):
        values = [getattr(step, field.name) for step in steps]
        if not all(isinstance(value, int | float) for value in values):
            continue  # rates, pool counts, and metrics that this stage lacks
        scale = len(values) if field.name in _AVERAGED else 1
        combined[field.name] = sum(values) / scale
    return StepMetrics(**{"reconstruction_loss": None, **combined})
