"""Repeat one skipped step of a run, and find the first module whose values are not finite.

    report (iteration, settings) --> last checkpoint before the step --> the steps in between
        --> the step itself: same samples, replaced tokens and weights --> loss per sample, modules

The order of samples and every random draw are functions of the settings and the iteration, so one
process can repeat a step of any layout; under torchrun the layout of the run is used.
"""

import itertools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_croc.checkpoint.state import STATE_FILE
from megatron_croc.config.base import apply_changes, changes_from_tree, raise_faults, to_tree
from megatron_croc.config.run import RunConfig
from megatron_croc.data.batch import IGNORE_INDEX, Batch
from megatron_croc.data.loader import build_train_loader
from megatron_croc.errors import RunError
from megatron_croc.log import world_size
from megatron_croc.model.language_model import LanguageModelOutput
from megatron_croc.parallel.groups import start_distributed
from megatron_croc.training.batch_broadcast import open_batch_broadcast
from megatron_croc.training.build import TrainingState, build_training_state
from megatron_croc.training.optimizer import measure_gradients
from megatron_croc.training.reporting.metrics import StepMetrics
from megatron_croc.training.safety.anomaly import AnomalyGuard, bad_weights


def read_report(path: str | Path) -> dict[str, Any]:
    """Read a report of an AnomalyGuard.

    Raises:
        RunError: the file cannot be read, or is not such a report.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: not readable as a report of a skipped step ({error})") from error
    if not isinstance(report, dict) or not {"iteration", "run", "train_iters"} <= set(report):
        raise RunError(f"{path}: no report of a skipped step; they are in SAVE/anomalies/")
    return report


def run_of_report(report: dict[str, Any], *, source: str) -> RunConfig:
    """Settings of the reported run, changed for replay.

    Nothing is saved, and the run starts from the last checkpoint before the step. In a single
    process the layout is 1 x 1 x 1.
    """
    run, faults = RunConfig(), []
    apply_changes(run, changes_from_tree(RunConfig, report["run"], faults, source=source))
    raise_faults(faults)
    run.checkpoint.load = _checkpoint_before(run, report["iteration"])
    run.checkpoint.save = run.logging.log_dir = None
    if world_size() == 1:
        run.parallel = type(run.parallel)()
    return run


def _checkpoint_before(run: RunConfig, iteration: int) -> str | None:
    """Path of the last checkpoint before step `iteration`; None: replay from the start."""
    found = [
        (int(folder.name.removeprefix("iter_")), str(folder))
        for root in {run.checkpoint.save, run.checkpoint.load} - {None}
        for folder in Path(str(root)).glob("iter_*")
        if folder.name.removeprefix("iter_").isdigit() and (folder / STATE_FILE).exists()
    ]
    return max(((i, name) for i, name in found if i < iteration), default=(0, None))[1]


@dataclass(kw_only=True)
class MicroBatchFindings:
    """Result of one micro-batch: loss of each sample, and the first modules that are not finite."""

    number: int
    """Number of the micro-batch over all replicas, as in the report."""

    sample_ids: tuple[str, ...]
    """Sample ids."""

    text_losses: list[tuple[int, float]] = field(default_factory=list)
    """(labelled tokens, mean loss) of each sample; empty on ranks that do not hold the losses."""

    reconstruction_loss: float | None = None
    """Mean reconstruction loss of the visual tokens."""

    bad_value: str | None = None
    """First module whose output is not finite, in the order of the forward pass."""

    bad_gradient: str | None = None
    """First module whose output gradient is not finite, in the order of the backward pass."""

    @property
    def is_finite(self) -> bool:
        """True when all losses, outputs and gradients are finite."""
        losses = [loss for _, loss in self.text_losses] + [self.reconstruction_loss or 0.0]
        return not (self.bad_value or self.bad_gradient) and all(map(math.isfinite, losses))


@dataclass(kw_only=True)
class Findings:
    """Result of a repeated step."""

    start: int
    """Iteration of the checkpoint that the replay started from."""

    metrics: StepMetrics
    """Metrics of the whole step; the weights are not updated."""

    bad_weights: list[str]
    """Weights that are not finite before the step, at most three."""

    micro_batches: list[MicroBatchFindings]
    """Results of this replica's micro-batches."""


def replay(run: RunConfig, report: dict[str, Any]) -> Findings:
    """Train up to the step of `report`, and repeat that step without its update.

    Raises:
        RunError: the checkpoint is not from before the step.
    """
    pg = start_distributed(run.parallel, seed=run.training.seed)
    training = build_training_state(run, pg, train_iters=report["train_iters"])
    state = training.state
    guard = AnomalyGuard(
        run.reliability,
        state,
        pg,
        settings=to_tree(run),
        train_iters=report["train_iters"],
        folder=None,
    )
    start = state.iteration
    if start >= report["iteration"]:
        raise RunError(
            f"--load {run.checkpoint.load} stands at iteration {start}, past the step "
            f"{report['iteration']} to replay: give an earlier checkpoint"
        )
    with open_batch_broadcast(
        run, pg, build_train_loader, state=state.resume_point()
    ) as broadcaster:
        while state.iteration < report["iteration"] - 1:
            batches = broadcaster.next_step()
            metrics = training.train_step.train(
                batches, training.optimizer, training.scheduler, guard=guard
            )
            state.advance(metrics.num_samples, broadcaster.order_state)
        batches = broadcaster.next_step()
    metrics = _whole_step(training, batches)
    dp = pg.dp
    return Findings(
        start=start,
        metrics=metrics,
        bad_weights=bad_weights(training.chunks),
        micro_batches=[
            _examine(training, batch, number * dp.size() + dp.rank())
            for number, batch in enumerate(batches)
        ],
    )


def _whole_step(training: TrainingState, batches: list[Batch]) -> StepMetrics:
    _zero_gradients(training)
    totals = training.train_step.forward_backward(batches)
    return totals.reduce(grad_norm=measure_gradients(training.optimizer))


def _zero_gradients(training: TrainingState) -> None:
    for chunk in training.chunks:
        chunk.train()
        chunk.zero_grad_buffer()  # type: ignore[operator]
    training.optimizer.zero_grad()


def _examine(training: TrainingState, batch: Batch, number: int) -> MicroBatchFindings:
    """Run one micro-batch forward and backward, with hooks on every module."""
    findings = MicroBatchFindings(number=number, sample_ids=batch.sample_ids)
    _zero_gradients(training)
    with _watched_modules(training, batch, findings):
        metrics = training.train_step.forward_backward([batch]).reduce()
    findings.reconstruction_loss = metrics.reconstruction_loss
    return findings


@contextmanager
def _watched_modules(
    training: TrainingState, batch: Batch, findings: MicroBatchFindings
) -> Iterator[None]:
    """Record the first output and first gradient that are not finite, and each sample's loss."""

    def watch(name: str, module: nn.Module) -> Any:
        def after_forward(_: nn.Module, __: object, output: object) -> None:
            if (
                isinstance(output, LanguageModelOutput)
                and output.token_losses is not None
                and training.pg_collection.cp.size() == 1  # else each rank has a part of them
            ):
                findings.text_losses = _losses_by_sample(output.token_losses, batch)
            for tensor in _tensors(output):
                if not torch.isfinite(tensor).all():
                    findings.bad_value = findings.bad_value or f"output of {name}"
                if not tensor.is_leaf:  # a leaf (a returned bias) would keep the hook
                    tensor.register_hook(after_backward)

        def after_backward(gradient: Tensor) -> None:
            if not torch.isfinite(gradient).all():
                gradient_of = f"gradient of the output of {name}"
                findings.bad_gradient = findings.bad_gradient or gradient_of

        return module.register_forward_hook(after_forward)

    hooks = [
        watch(name or "the model", module)
        for model in training.train_step.models
        for name, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(value: object) -> Iterator[Tensor]:
    """Floating-point tensors in the output of a module."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        for entry in fields(value):
            yield from _tensors(getattr(value, entry.name))


def _losses_by_sample(token_losses: Tensor, batch: Batch) -> list[tuple[int, float]]:
    """(labelled tokens, mean loss) of each sample; `token_losses` are those of the whole pack."""
    counted = batch.labels.cpu() != IGNORE_INDEX
    losses = torch.zeros(len(counted))
    losses[counted] = token_losses.detach().float().cpu()[: int(counted.sum())]
    ends = batch.mixed_mask.cu_seqlens.tolist()
    by_sample = []
    for first, last in itertools.pairwise(ends):
        own = losses[first:last][counted[first:last]]
        by_sample.append((own.numel(), own.mean().item() if own.numel() else 0.0))
    return by_sample
