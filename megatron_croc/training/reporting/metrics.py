"""Metrics of one optimizer step: sums collected by each rank, added once over all ranks.

first stage: tokens, images, samples, operations; matching: distance, time, uses of pool tokens
last stage:  text and reconstruction loss
             --> StepSums --> one all-reduce, one read of the device --> StepMetrics on every rank
operations of each replica travel in it too, each in a place of its own
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_croc.config.parts import trained_parts
from megatron_croc.config.run import RunConfig
from megatron_croc.costs.flops import Work, count_flops
from megatron_croc.data.batch import Batch
from megatron_croc.data.order.balance import imbalance
from megatron_croc.model.prompt_pool import MatchingSample, Replacement
from megatron_croc.parallel.collectives import all_reduce
from megatron_croc.parallel.device import current_device, to_device
from megatron_croc.parallel.stopwatch import region
from megatron_croc.training.optimizer import part_of_group


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Metrics of one step or validation batch, over the whole global batch; equal on all ranks."""

    text_loss: float
    """Mean cross entropy of the labelled tokens."""

    reconstruction_loss: float | None
    """Mean SmoothL1 over the visual tokens' elements, unweighted; None outside pretrain_croc."""

    loss: float
    """Minimised loss: text + weight * reconstruction."""

    num_tokens: int
    """Tokens without padding."""

    num_images: int
    """Number of images."""

    num_samples: int
    """Number of samples."""

    flops: float
    """Useful operations, see costs.flops."""

    imbalance_predicted: float | None = None
    """Operations of the busiest replica above the mean, as a share; None for one replica."""

    num_cut_samples: int = 0
    """Samples longer than seq_length."""

    num_labels: int = 0
    """Labelled tokens, after the cut."""

    num_labels_lost: int = 0
    """Labelled tokens that seq_length cut off."""

    matched_distance: float | None = None
    """Mean distance of a replaced token to its pool token."""

    matching_seconds: float | None = None
    """Seconds a replica waited for matching, mean over the replicas."""

    matching_hidden_seconds: float | None = None
    """Seconds of matching that ran beside other work, mean over the replicas."""

    pool_counts: tuple[int, ...] | None = None
    """Uses of each pool token; None outside pretrain_croc."""

    matching_sample: MatchingSample | None = field(default=None, repr=False, compare=False)
    """One image that this rank matched in this step; the only field that differs by rank."""

    num_answers: int | None = None
    """Held-out answers checked; None without a check."""

    num_answers_right: int | None = None
    """Answers that the model would generate word for word."""

    grad_norm: float | None = None
    """Norm of the whole gradient before clipping; None in validation."""

    is_skipped: bool = False
    """True when the step was refused and changed no weights."""

    learning_rates: dict[str, float] = field(default_factory=dict)
    """Learning rate of each trained part in this step."""

    @property
    def pool_usage(self) -> float | None:
        """Share of pool tokens used in this step."""
        return None if self.pool_counts is None else usage(self.pool_counts)


def usage(counts: Sequence[int]) -> float:
    """Share of pool tokens with at least one use."""
    return sum(count > 0 for count in counts) / len(counts)


def entropy(counts: Sequence[int]) -> float:
    """Normalised entropy of the pool tokens' uses: 1 when all are used equally often, 0 for one."""
    total = sum(counts)
    if total == 0 or len(counts) == 1:
        return 0.0
    shares = (count / total for count in counts if count)
    return sum(-share * math.log(share) for share in shares) / math.log(len(counts))


@dataclass(kw_only=True)
class StepSums:
    """Sums of one step that are added over ranks, by name.

    On one rank, sums that are known on the host are floats, those computed by the model are float64
    scalars on the device. After `unpack` all are floats.
    """

    num_tokens: float = 0.0
    """Tokens without padding."""

    num_images: float = 0.0
    """Images."""

    num_samples: float = 0.0
    """Samples."""

    flops: float = 0.0
    """Useful operations."""

    num_cut_samples: float = 0.0
    """Samples longer than seq_length."""

    num_labels: float = 0.0
    """Labelled tokens, after the cut."""

    num_labels_lost: float = 0.0
    """Labelled tokens that seq_length cut off."""

    num_replaced: float = 0.0
    """Replaced visual tokens."""

    matching_seconds: float = 0.0
    """Seconds spent waiting for matching."""

    matching_hidden_seconds: float = 0.0
    """Seconds of matching that ran beside other work."""

    text_loss: float | Tensor = 0.0
    """Text loss, divided by its global denominator already."""

    reconstruction_loss: float | Tensor = 0.0
    """Reconstruction loss, divided by its global denominator already."""

    distance: float | Tensor = 0.0
    """Distances of the replaced tokens to their pool tokens."""

    pool_counts: Tensor | list[float]
    """Uses of each pool token: float64 [P] on the device; a list of P after `unpack`."""

    def pack(self) -> Tensor:
        """Write all sums into one vector, without reading the device.

        Returns:
            float64 [number of scalars + P] on the device: scalars in the order of the fields.
        """
        assert isinstance(self.pool_counts, Tensor)
        scalars = [getattr(self, name) for name in self._scalar_names()]
        on_host = [0.0 if isinstance(value, Tensor) else value for value in scalars]
        vector = to_device(torch.tensor(on_host, dtype=torch.float64))
        for index, value in enumerate(scalars):
            if isinstance(value, Tensor):
                vector[index] += value
        return torch.cat([vector, self.pool_counts])

    @classmethod
    def unpack(cls, values: list[float]) -> "StepSums":
        """Read the sums from the values of a packed vector."""
        names = cls._scalar_names()
        scalars = dict(zip(names, values[: len(names)], strict=True))
        return cls(**scalars, pool_counts=values[len(names) :])

    @classmethod
    def _scalar_names(cls) -> list[str]:
        return [entry.name for entry in fields(cls) if entry.name != "pool_counts"]


class StepTotals:
    """Sums of one step on this rank."""

    def __init__(self, run: RunConfig, pg_collection: ProcessGroupCollection) -> None:
        """Start at zero."""
        self.run, self.pg = run, pg_collection
        self.num_microbatches = 0
        self.last_started = -1
        self.work = Work(num_tokens=0, num_pairs=0, num_labels=0, num_images=0)
        self.num_samples = 0
        self.num_cut_samples = self.num_labels_lost = 0
        self.losses: list[dict[str, Tensor]] = []
        self.distance_sum: Tensor | None = None
        self.num_replaced = 0
        self.matching_seconds = self.matching_hidden_seconds = 0.0
        self.matching_sample: MatchingSample | None = None
        self.pool_counts: Tensor | None = None

    @property
    def num_microbatches_in_world(self) -> int:
        """Number of micro-batches of the step over all replicas."""
        return self.num_microbatches * self.pg.dp.size()

    def count_batch(self, batch: Batch) -> None:
        """Add the tokens and images of a micro-batch. The batch must be on the CPU."""
        self.num_microbatches += 1
        self.num_samples += len(batch.sample_ids)
        self.num_cut_samples += len(batch.cuts)
        self.num_labels_lost += sum(cut.num_labels_lost for cut in batch.cuts)
        self.work += Work.from_lengths(
            batch.mixed_mask.cu_seqlens.diff().tolist(),
            num_labels=batch.num_label_tokens,
            num_images=batch.num_images,
            span_lengths=batch.mixed_mask.spans.diff(dim=1).flatten().tolist(),
        )

    def start_micro_batch(self) -> int:
        """Count a forward pass; return its number, over all model chunks of this rank."""
        self.last_started += 1
        return self.last_started

    def count_replacement(self, replacement: Replacement) -> None:
        """Add the matching of one micro-batch (first stage)."""
        used = replacement.index.flatten()
        if self.pool_counts is None:
            size = self.run.model.prompt_pool.pool_size
            self.pool_counts = torch.zeros(size, dtype=torch.float64, device=used.device)
        # Not bincount: it reads the smallest and largest index, and waits for them.
        ones = torch.ones_like(used, dtype=torch.float64)
        self.pool_counts.scatter_add_(0, used, ones)
        distance = replacement.distance.double().sum()
        self.distance_sum = distance if self.distance_sum is None else self.distance_sum + distance
        self.num_replaced += replacement.distance.numel()
        self.matching_seconds += replacement.seconds
        self.matching_hidden_seconds += replacement.hidden_seconds
        self.matching_sample = replacement.sample

    def count_losses(self, losses: list[dict[str, Tensor]]) -> None:
        """Add the losses that the schedule returned (last stage; empty elsewhere)."""
        self.losses.extend(losses)

    @region("sync")
    def reduce(
        self, *, grad_norm: float | None = None, param_groups: list[dict] | None = None
    ) -> StepMetrics:
        """Add the sums over all ranks and compute the metrics, equal on every rank.

        One all-reduce, and one read of the device.
        """
        dp_size, own = self.pg.dp.size(), self._own_sums()
        by_replica = [0.0] * dp_size
        by_replica[self.pg.dp.rank()] = own.flops
        vector = torch.cat([to_device(torch.tensor(by_replica, dtype=torch.float64)), own.pack()])
        all_reduce(vector)
        values = vector.tolist()
        by_replica, sums = values[:dp_size], StepSums.unpack(values[dp_size:])
        has_matching = sums.num_replaced > 0
        text, reconstruction = float(sums.text_loss), float(sums.reconstruction_loss)
        weight = self.run.model.reconstruction.reconstruction_loss_weight
        return StepMetrics(
            text_loss=text,
            reconstruction_loss=reconstruction if self.run.reconstructs else None,
            loss=text + weight * reconstruction,
            num_tokens=int(sums.num_tokens),
            num_images=int(sums.num_images),
            num_samples=int(sums.num_samples),
            num_cut_samples=int(sums.num_cut_samples),
            num_labels=int(sums.num_labels),
            num_labels_lost=int(sums.num_labels_lost),
            flops=sums.flops,
            imbalance_predicted=imbalance(np.array(by_replica)) if dp_size > 1 else None,
            matched_distance=float(sums.distance) / sums.num_replaced if has_matching else None,
            matching_seconds=sums.matching_seconds / dp_size if has_matching else None,
            matching_hidden_seconds=(
                sums.matching_hidden_seconds / dp_size if has_matching else None
            ),
            pool_counts=tuple(map(int, sums.pool_counts)) if self.run.reconstructs else None,
            matching_sample=self.matching_sample,
            grad_norm=grad_norm,
            learning_rates=_learning_rates(self.run, param_groups or []),
        )

    def _own_sums(self) -> StepSums:
        """Sums that this rank contributes, so that nothing is counted by two ranks.

        All ranks of a replica know its matching, so only TP rank 0 and CP rank 0 contributes it.
        Losses are shares of the CP ranks and equal on the TP ranks.
        """
        size = self.run.model.prompt_pool.pool_size
        sums = StepSums(pool_counts=torch.zeros(size, dtype=torch.float64, device=current_device()))
        if self.pg.tp.rank() != 0:
            return sums
        for part in self.losses:
            sums.text_loss = sums.text_loss + part["text"].double()
            sums.reconstruction_loss = sums.reconstruction_loss + part["reconstruction"].double()
        if self.pg.cp.rank() != 0:
            return sums
        if self.pg.pp.rank() == 0:
            sums.num_tokens = self.work.num_tokens
            sums.num_images = self.work.num_images
            sums.num_samples = self.num_samples
            sums.num_cut_samples = self.num_cut_samples
            sums.num_labels = self.work.num_labels
            sums.num_labels_lost = self.num_labels_lost
            sums.flops = sum(count_flops(self.run, self.work).values())
        sums.num_replaced = self.num_replaced
        sums.matching_seconds = self.matching_seconds
        sums.matching_hidden_seconds = self.matching_hidden_seconds
        if self.distance_sum is not None:
            assert self.pool_counts is not None
            sums.distance, sums.pool_counts = self.distance_sum, self.pool_counts
        return sums


def _learning_rates(run: RunConfig, param_groups: list[dict]) -> dict[str, float]:
    trained = trained_parts(run.training, reconstructs=run.reconstructs)
    rates = {part_of_group(group): float(group["lr"]) for group in param_groups}
    return {part: rate for part, rate in rates.items() if part in trained}
