"""What one optimizer step did: sums collected where they arise, reduced once per step.

first stage: replaced tokens, their distance, time it took, uses of each pool row
last stage:  text and reconstruction loss      } one all-reduce over all ranks, read once
any stage:   tokens, images, samples, operations
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_croc.config.run import RunConfig
from megatron_croc.data.batch import Batch
from megatron_croc.model.parameters import trained_parts
from megatron_croc.model.prompt_pool import MatchingSample, Replacement
from megatron_croc.parallel.collectives import all_reduce
from megatron_croc.parallel.device import to_device
from megatron_croc.parallel.stopwatch import region
from megatron_croc.planning.flops import Work, count_flops
from megatron_croc.training.optimizer import part_of_group


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One step (or validation batch), summed over the whole global batch; equal on all ranks."""

    text_loss: float
    """Mean cross entropy of the labelled tokens."""

    reconstruction_loss: float | None
    """Mean SmoothL1 over the visual tokens' elements, unweighted; None outside pretrain_croc."""

    loss: float
    """text + weight * reconstruction, what is minimised."""

    num_tokens: int
    """Tokens without padding."""

    num_images: int
    """Images."""

    num_samples: int
    """Samples."""

    flops: float
    """Useful operations, see planning.flops."""

    matched_distance: float | None = None
    """Mean distance of a replaced token to its pool token."""

    matching_seconds: float | None = None
    """What matching kept a replica waiting, mean over the replicas."""

    matching_hidden_seconds: float | None = None
    """What was searched for matches while the replica computed, mean over the replicas."""

    pool_counts: tuple[int, ...] | None = None
    """How often each pool row was used; None outside pretrain_croc."""

    matching_sample: MatchingSample | None = field(default=None, repr=False, compare=False)
    """An image this rank matched in this step, if any; the only field that differs by rank."""

    num_answers: int | None = None
    """Held-out answers that were checked; None where none were."""

    num_answers_right: int | None = None
    """Those the model would give word for word."""

    grad_norm: float | None = None
    """Norm of the whole gradient before clipping; None in validation."""

    is_skipped: bool = False
    """Whether the step was refused, and changed nothing."""

    learning_rates: dict[str, float] = field(default_factory=dict)
    """Of each trained part, as this step used them."""

    @property
    def pool_usage(self) -> float | None:
        """Share of pool rows used in this step."""
        return None if self.pool_counts is None else usage(self.pool_counts)


def usage(counts: Sequence[int]) -> float:
    """Share of pool rows used at all."""
    return sum(count > 0 for count in counts) / len(counts)


def entropy(counts: Sequence[int]) -> float:
    """Entropy of the rows' shares over that of equal shares: 1 if all rows are used alike."""
    total = sum(counts)
    if total == 0 or len(counts) == 1:
        return 0.0
    shares = (count / total for count in counts if count)
    return sum(-share * math.log(share) for share in shares) / math.log(len(counts))


class StepTotals:
    """Sums of one step on this rank."""

    def __init__(self, run: RunConfig, pg_collection: ProcessGroupCollection) -> None:
        """Start at zero."""
        self.run, self.pg = run, pg_collection
        self.num_microbatches = 0
        self.last_started = -1
        self.work = Work(num_tokens=0, num_pairs=0, num_images=0)
        self.num_samples = 0
        self.losses: list[dict[str, Tensor]] = []
        self.distance_sum: Tensor | None = None
        self.num_replaced = 0
        self.matching_seconds = self.matching_hidden_seconds = 0.0
        self.matching_sample: MatchingSample | None = None
        self.pool_counts: Tensor | None = None

    @property
    def num_microbatches_in_world(self) -> int:
        """Micro-batches of the step over all replicas."""
        return self.num_microbatches * self.pg.dp.size()

    def count_batch(self, batch: Batch) -> None:
        """Add a micro-batch's tokens and images; call it while the batch is on the CPU."""
        self.num_microbatches += 1
        self.num_samples += len(batch.sample_ids)
        more = Work.from_lengths(
            batch.mixed_mask.cu_seqlens.diff().tolist(),
            num_images=batch.num_images,
            span_lengths=batch.mixed_mask.spans.diff(dim=1).flatten().tolist(),
        )
        self.work = Work(
            num_tokens=self.work.num_tokens + more.num_tokens,
            num_pairs=self.work.num_pairs + more.num_pairs,
            num_images=self.work.num_images + more.num_images,
        )

    def start_micro_batch(self) -> int:
        """Note a forward pass, and give it its number (over all chunks of this rank)."""
        self.last_started += 1
        return self.last_started

    def count_replacement(self, replacement: Replacement) -> None:
        """Add one micro-batch's matching (first stage)."""
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
        """Add what the schedule collected (last stage; empty elsewhere)."""
        self.losses.extend(losses)

    @region("sync")
    def reduce(
        self, *, grad_norm: float | None = None, param_groups: list[dict] | None = None
    ) -> StepMetrics:
        """Sum over all ranks; every rank gets the same metrics."""
        sums = to_device(torch.tensor([*self._known_on_host(), 0.0, 0.0, 0.0], dtype=torch.float64))
        pool_counts = sums.new_zeros(self.run.model.prompt_pool.pool_size)
        if self.pg.tp.rank() == 0:
            for part in self.losses:  # context-parallel ranks hold shares of them
                sums[-3] += part["text"].double()
                sums[-2] += part["reconstruction"].double()
        # Tensor- and context-parallel ranks all know the whole replica's matches.
        if self._speaks_for_replica and self.distance_sum is not None:
            assert self.pool_counts is not None
            sums[-1] += self.distance_sum
            pool_counts += self.pool_counts
        everything = torch.cat([sums, pool_counts])
        all_reduce(everything)
        num_tokens, num_images, num_samples, flops, num_replaced, seconds, hidden, *more = (
            everything.tolist()
        )
        text, reconstruction, distance, *uses = more
        weight = self.run.model.reconstruction.reconstruction_loss_weight
        return StepMetrics(
            text_loss=text,
            reconstruction_loss=reconstruction if self.run.reconstructs else None,
            loss=text + weight * reconstruction,
            num_tokens=int(num_tokens),
            num_images=int(num_images),
            num_samples=int(num_samples),
            flops=flops,
            matched_distance=distance / num_replaced if num_replaced else None,
            matching_seconds=seconds / self.pg.dp.size() if num_replaced else None,
            matching_hidden_seconds=hidden / self.pg.dp.size() if num_replaced else None,
            pool_counts=tuple(map(int, uses)) if self.run.reconstructs else None,
            matching_sample=self.matching_sample,
            grad_norm=grad_norm,
            learning_rates=_learning_rates(self.run, param_groups or []),
        )

    @property
    def _speaks_for_replica(self) -> bool:
        return self.pg.tp.rank() == 0 and self.pg.cp.rank() == 0

    def _known_on_host(self) -> list[float]:
        """Tokens, images, samples, operations; replaced tokens, seconds kept waiting, hidden."""
        counts, matching = [0.0] * 4, [0.0] * 3
        if self._speaks_for_replica and self.pg.pp.rank() == 0:
            flops = sum(count_flops(self.run, self.work).values())
            counts = [self.work.num_tokens, self.work.num_images, self.num_samples, flops]
        if self._speaks_for_replica:
            matching = [self.num_replaced, self.matching_seconds, self.matching_hidden_seconds]
        return [*counts, *matching]


def _learning_rates(run: RunConfig, param_groups: list[dict]) -> dict[str, float]:
    trained = trained_parts(run)
    rates = {part_of_group(group): float(group["lr"]) for group in param_groups}
    return {part: rate for part, rate in rates.items() if part in trained}
