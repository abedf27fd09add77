"""One optimizer step: micro-batches through megatron's schedule, then the update.

Losses are sums. Each is divided by its own count over the whole global batch, so neither the loss
nor any gradient depends on how the batch is cut into micro-batches and ranks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_croc.config.run import RunConfig
from megatron_croc.data.batch import Batch
from megatron_croc.model.croc_model import CrocModel
from megatron_croc.model.interface import Labels, ModelInputs, ModelOutput, StepContext
from megatron_croc.parallel.collectives import all_reduce
from megatron_croc.parallel.device import current_device, to_device
from megatron_croc.parallel.stopwatch import region
from megatron_croc.training.optimizer import measure_gradients, update_weights
from megatron_croc.training.reporting.metrics import StepMetrics, StepTotals
from megatron_croc.training.safety.anomaly import AnomalyGuard
from megatron_croc.training.safety.heartbeat import enter
from megatron_croc.training.schedule import run_schedule


@dataclass(frozen=True, kw_only=True)
class Denominators:
    """Global denominators of the two loss sums."""

    text: Tensor
    """Number of labelled tokens, float64 scalar on the device."""

    reconstruction: Tensor
    """Number of elements of all visual tokens, float64 scalar on the device."""


def to_model_inputs(batch: Batch, cp: dist.ProcessGroup) -> ModelInputs:
    """Convert a batch on the CPU to inputs of the model on the device."""
    device = current_device()
    labels = Labels.of_pack(batch.labels, cp)
    batch = batch.to(device, non_blocking=True)
    return ModelInputs(
        input_ids=batch.input_ids,
        labels=labels.to(device, non_blocking=True),
        mixed_mask=batch.mixed_mask,
        image_starts=batch.image_starts,
        replaced=batch.replaced,
        pixel_values=batch.pixel_values,
        image_seeds=batch.image_seeds,
    )


class TrainStep:
    """Training and validation steps over the model chunks of this rank."""

    def __init__(
        self, run: RunConfig, chunks: list[nn.Module], pg_collection: ProcessGroupCollection
    ) -> None:
        """Take the model chunks, wrapped in DistributedDataParallel."""
        self.run = run
        self.chunks = chunks
        self.pg = pg_collection
        self.models: list[CrocModel] = unwrap_model(chunks, DistributedDataParallel)

    def train(
        self,
        batches: list[Batch],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        *,
        guard: AnomalyGuard | None = None,
        on_gradients: Callable[[], None] | None = None,
    ) -> StepMetrics:
        """Run forward pass, backward pass and update of one global batch.

        Args:
            batches: micro-batches of this replica, on the CPU.
            optimizer: distributed optimizer.
            scheduler: learning-rate schedule; advances also after a refused step.
            guard: may refuse the update; weights and optimizer then stay unchanged on all ranks.
            on_gradients: called after the gradients are reduced, before the update.

        Returns:
            metrics of the whole global batch.
        """
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()  # type: ignore[operator]
        optimizer.zero_grad()
        totals = self.forward_backward(batches)
        if on_gradients is not None:
            on_gradients()
        enter("measuring gradients and losses", collective="all-reduce")
        grad_norm = measure_gradients(optimizer)
        metrics = totals.reduce(grad_norm=grad_norm, param_groups=optimizer.param_groups)
        if guard is None or guard.accepts(metrics):
            enter("updating weights", collective="all-gather")
            update_weights(optimizer, grad_norm)
        else:
            guard.examine(metrics, batches, totals, self.chunks)
            metrics = replace(metrics, is_skipped=True)
        scheduler.step(increment=self.run.training.global_batch_size)
        return metrics

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> StepMetrics:
        """Compute the losses of one global batch, without dropout and update."""
        for chunk in self.chunks:
            chunk.eval()
        return self.forward_backward(batches, forward_only=True).reduce()

    def forward_backward(self, batches: list[Batch], *, forward_only: bool = False) -> StepTotals:
        """Run all micro-batches through the pipeline; gradients stay in the DDP buffers."""
        enter("counting labels", collective="all-reduce")
        totals = StepTotals(self.run, self.pg)
        for batch in batches:
            totals.count_batch(batch)
        step = partial(
            _forward_step,
            run=self.run,
            denominators=self._denominators(batches),
            totals=totals,
            context=StepContext(on_replacement=totals.count_replacement),
        )
        inputs = [to_model_inputs(batch, self.pg.cp) for batch in batches]
        with_next = list(zip(inputs, [*inputs[1:], None], strict=True))
        losses = run_schedule(
            step,
            with_next,
            [len(batch.input_ids) for batch in batches],
            chunks=self.chunks,
            pg_collection=self.pg,
            forward_only=forward_only,
        )
        for model in self.models:
            if model.target_channel is not None:
                model.target_channel.flush()
        totals.count_losses(losses)
        return totals

    @region("sync")
    def _denominators(self, batches: list[Batch]) -> Denominators:
        """Counts over all micro-batches and replicas, known before the first forward pass."""
        model = self.run.model
        per_image = model.vision_tower.num_visual_tokens * model.language_model.hidden_size
        counts = [
            sum(batch.num_label_tokens for batch in batches),
            sum(batch.num_images for batch in batches) * per_image,
        ]
        counts = to_device(torch.tensor(counts, dtype=torch.float64))
        all_reduce(counts, group=self.pg.dp)
        text, reconstruction = counts.clamp(min=1.0)
        return Denominators(text=text, reconstruction=reconstruction)


def _forward_step(
    iterator: Iterator[tuple[ModelInputs, ModelInputs | None]],
    chunk: nn.Module,
    *,
    run: RunConfig,
    denominators: Denominators,
    totals: StepTotals,
    context: StepContext,
) -> tuple[Tensor | ModelOutput, partial]:
    """Forward pass of one micro-batch on one model chunk, called by megatron's schedule."""
    inputs, upcoming = next(iterator)
    enter("forward", micro_batch=totals.start_micro_batch())
    output = chunk(inputs, upcoming, context)
    loss_func = partial(_loss, inputs=inputs, run=run, denominators=denominators, totals=totals)
    return output, loss_func


def _loss(
    output: ModelOutput,
    *,
    inputs: ModelInputs,
    run: RunConfig,
    denominators: Denominators,
    totals: StepTotals,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Share of the global loss that one micro-batch contributes: a float32 scalar."""
    enter("backward", micro_batch=totals.last_started)
    assert output.text_loss_sum is not None
    if run.training.loss_reduction == "micro_batch":
        denominators = _micro_batch_denominators(inputs, run, totals.num_microbatches_in_world)
    text = output.text_loss_sum / denominators.text
    reconstruction = output.reconstruction_loss_sum / denominators.reconstruction
    loss = text + run.model.reconstruction.reconstruction_loss_weight * reconstruction
    parts = {"text": text.detach(), "reconstruction": reconstruction.detach()}
    # megatron does not scale a loss that is returned with a token count.
    return loss.float(), torch.zeros((), dtype=torch.int), parts


def _micro_batch_denominators(
    inputs: ModelInputs, run: RunConfig, num_microbatches: int
) -> Denominators:
    """Denominators for a mean of micro-batch means, as in the released code."""
    assert inputs.labels is not None
    labelled = max(inputs.labels.num_in_pack, 1)
    elements = max(inputs.replaced.numel() * run.model.language_model.hidden_size, 1)
    counts = to_device(torch.tensor([labelled, elements], dtype=torch.float64))
    text, reconstruction = counts * num_microbatches
    return Denominators(text=text, reconstruction=reconstruction)
