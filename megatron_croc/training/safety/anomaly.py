"""Steps that must not reach the weights: loss or gradient not finite, or a loss that spikes.

    forward, backward --> loss and gradient norm of the whole batch, equal on all ranks
        right: update      not right: no rank updates; who and which samples goes into a report

A skipped step leaves weights, moments and Adam's step count as they were. It is still a step of the
run: iteration, consumed samples and learning rate go on, so that the data order and the schedule
stay functions of the iteration. `croc replay REPORT` does the step again.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_croc.atomic_files import write_atomically
from megatron_croc.checkpoint.state import TrainState
from megatron_croc.config.base import to_tree
from megatron_croc.config.run import RunConfig
from megatron_croc.data.batch import Batch
from megatron_croc.errors import RunError
from megatron_croc.log import get_logger, rank, world_size
from megatron_croc.training.reporting.metrics import StepMetrics, StepTotals

logger = get_logger(__name__)

SPIKE_WINDOW = 32
"""Losses a spike is measured against."""

SPIKE_MIN = 8
"""Losses that must be there before any counts as a spike."""


class AnomalyGuard:
    """Decides about every step; counts and reports the ones it refuses."""

    def __init__(
        self,
        run: RunConfig,
        state: TrainState,
        pg_collection: ProcessGroupCollection,
        *,
        train_iters: int,
        folder: Path | None,
    ) -> None:
        """Go on where `state` says.

        Args:
            run: the run.
            state: the trainer's own; skips and recent losses are counted in it.
            pg_collection: process groups.
            train_iters: optimizer steps of the whole run.
            folder: of the run; reports go to `anomalies/` in it. None: to the log only.
        """
        self.run, self.state, self.pg = run, state, pg_collection
        self.train_iters = train_iters
        self.folder = None if folder is None else folder / "anomalies"
        self.last_good = replace(state)
        self.report: Path | None = None

    def accepts(self, metrics: StepMetrics) -> bool:
        """Whether the step may update the weights; the same answer on every rank."""
        state = self.state
        if self._fault(metrics) is not None:
            if state.skipped_in_a_row == 0:
                self.last_good = replace(state)
            state.num_skipped += 1
            state.skipped_in_a_row += 1
            return False
        state.skipped_in_a_row = 0
        if self.run.reliability.spike_factor:
            # A list of its own: `last_good` keeps the one before.
            state.recent_losses = [*state.recent_losses, metrics.loss][-SPIKE_WINDOW:]
        return True

    def gives_up(self) -> bool:
        """Whether more steps in a row were skipped than the run puts up with."""
        return self.state.skipped_in_a_row > self.run.reliability.max_consecutive_skips

    def error(self) -> RunError:
        """Why the run ends, for the user."""
        limit = self.run.reliability.max_consecutive_skips
        where = f"; see {self.report} and run croc replay on it" if self.report else ""
        return RunError(
            f"{self.state.skipped_in_a_row} steps in a row had to be skipped, the last is "
            f"{self.state.iteration}; max_consecutive_skips={limit}{where}; mend the cause, or "
            "raise the setting to go past these samples"
        )

    def _fault(self, metrics: StepMetrics) -> str | None:
        """What is wrong with a step."""
        for name, value in (("loss", metrics.loss), ("gradient norm", metrics.grad_norm)):
            if value is not None and not math.isfinite(value):
                return f"{name} is {value}"
        factor, recent = self.run.reliability.spike_factor, self.state.recent_losses
        if factor and len(recent) >= SPIKE_MIN:
            mean = sum(recent) / len(recent)
            if metrics.loss > factor * mean:
                return f"loss {metrics.loss:.4f} is more than {factor} times the recent {mean:.4f}"
        return None

    def examine(
        self,
        metrics: StepMetrics,
        batches: list[Batch],
        totals: StepTotals,
        chunks: list[nn.Module],
    ) -> None:
        """Find the ranks and samples behind a refused step, and write them down; all ranks call.

        Call it while the gradients are still in their buffers.
        """
        own = self._examine_rank(batches, totals, chunks)
        ranks: list[Any] = [None] * world_size()
        dist.all_gather_object(ranks, own)
        suspects = [entry for entry in ranks if not _is_finite(entry)]
        # A spike is finite everywhere: then every replica's losses are of interest.
        suspects = suspects or [entry for entry in ranks if entry["has_losses"]]
        suspects.sort(key=lambda entry: not any(_bad_micro_batches(entry)))  # losses first
        iteration = self.state.iteration + 1
        reason = self._fault(metrics)
        report = {
            "iteration": iteration,
            "reason": reason,
            "skipped_in_a_row": self.state.skipped_in_a_row,
            "loss": _plain(metrics.loss),
            "text_loss": _plain(metrics.text_loss),
            "reconstruction_loss": _plain(metrics.reconstruction_loss),
            "grad_norm": _plain(metrics.grad_norm),
            "consumed_samples": self.state.consumed_samples,
            "train_iters": self.train_iters,
            "world_size": world_size(),
            "ranks": suspects,
            "run": to_tree(self.run),
        }
        if self.folder is not None:
            self.report = self.folder / f"iter_{iteration:07d}.json"
        if rank() == 0:
            if self.report is not None:
                _write(self.report, report)
            told = "; ".join(_describe(entry) for entry in suspects[:2])
            logger.warning(
                "step %d is skipped on all ranks (%s): %s; report: %s",
                iteration,
                reason,
                told,
                self.report or "none without --save or --log-dir",
            )

    def _examine_rank(
        self, batches: list[Batch], totals: StepTotals, chunks: list[nn.Module]
    ) -> dict[str, Any]:
        pg = self.pg
        losses: list[dict[str, Tensor]] = totals.losses or [{} for _ in batches]
        return {
            "rank": rank(),
            "tp": pg.tp.rank(),
            "pp": pg.pp.rank(),
            "cp": pg.cp.rank(),
            "dp": pg.dp.rank(),
            "has_losses": bool(totals.losses),
            "gradients_are_finite": local_gradients_are_finite(chunks, pg.dp_cp),
            "micro_batches": [
                {
                    # Counted over all replicas, in the order of the samples.
                    "number": number * pg.dp.size() + pg.dp.rank(),
                    "sample_ids": list(batch.sample_ids),
                    **{name: _plain(loss.item()) for name, loss in parts.items()},
                }
                for number, (batch, parts) in enumerate(zip(batches, losses, strict=True))
            ],
        }


def local_gradients_are_finite(chunks: list[nn.Module], dp_cp: dist.ProcessGroup) -> bool:
    """Whether what this very rank computed is finite, after gradients were summed over replicas.

    The distributed optimizer sums each rank's shard in place and leaves the rest of the buffer as
    this rank computed it, so it can be told apart from what came from others.
    """
    return all(bool(torch.isfinite(piece).all()) for piece in _local_pieces(chunks, dp_cp))


def _local_pieces(chunks: list[nn.Module], dp_cp: dist.ProcessGroup) -> Iterator[Tensor]:
    size, own = dp_cp.size(), dp_cp.rank()
    for chunk in chunks:
        for buffer in chunk.buffers:  # type: ignore[union-attr]
            for bucket in buffer.buckets:
                if size == 1:
                    yield bucket.grad_data
                    continue
                shards = bucket.grad_data.chunk(size)
                yield from (shard for number, shard in enumerate(shards) if number != own)


def _bad_micro_batches(entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Those whose loss is not finite."""
    for micro_batch in entry["micro_batches"]:
        if any(isinstance(micro_batch.get(name), str) for name in ("text", "reconstruction")):
            yield micro_batch


def _is_finite(entry: dict[str, Any]) -> bool:
    return entry["gradients_are_finite"] and not any(_bad_micro_batches(entry))


def _describe(entry: dict[str, Any]) -> str:
    """rank 1: loss of micro-batch 3 (samples a, b)."""
    bad = list(_bad_micro_batches(entry))
    what = "loss" if bad else ("losses" if entry["gradients_are_finite"] else "gradient")
    shown = [
        f"micro-batch {m['number']} (samples {', '.join(m['sample_ids'])})"
        for m in bad or entry["micro_batches"]
    ]
    more = f" and {len(shown) - 2} more" if len(shown) > 2 else ""
    return f"rank {entry['rank']}: {what} of {', '.join(shown[:2])}{more}"


def _plain(value: float | None) -> float | str | None:
    """A number as JSON can hold it: "nan" and "inf" as words."""
    return value if value is None or math.isfinite(value) else str(value)


def _write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
