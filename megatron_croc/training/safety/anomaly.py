"""Steps that are refused: loss or gradient not finite, or a loss that spikes.

    forward, backward --> loss and gradient norm of the whole batch, equal on all ranks
        normal: every rank updates     anomaly: no rank updates; a report names ranks and samples

A skipped step leaves weights, moments and Adam's step count unchanged. It still counts as a step:
iteration, consumed samples and learning rate advance, because data order and schedule are functions
of the iteration. `croc replay REPORT` repeats the step.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_croc.atomic_files import write_atomically
from megatron_croc.checkpoint.state import TrainState
from megatron_croc.config.reliability import ReliabilityConfig
from megatron_croc.data.batch import Batch
from megatron_croc.errors import RunError
from megatron_croc.log import get_logger, rank, world_size
from megatron_croc.training.reporting.metrics import StepMetrics, StepTotals

logger = get_logger(__name__)

SPIKE_WINDOW = 32
"""Number of recent losses that a loss is compared with."""

SPIKE_MIN = 8
"""Number of recent losses needed before a loss can count as a spike."""


class AnomalyGuard:
    """Check of every step; counts and reports the steps it refuses."""

    def __init__(
        self,
        config: ReliabilityConfig,
        state: TrainState,
        pg_collection: ProcessGroupCollection,
        *,
        settings: Mapping[str, Any],
        train_iters: int,
        folder: Path | None,
    ) -> None:
        """Continue with the counts in `state`.

        Args:
            config: limits on skipped steps and spikes.
            state: state of the run; skips and recent losses are counted in it.
            pg_collection: process groups.
            settings: all settings of the run; part of every report, for `croc replay`.
            train_iters: optimizer steps of the whole run.
            folder: folder of the run; reports go to `anomalies/` in it. None: log only.
        """
        self.config, self.state, self.pg = config, state, pg_collection
        self.settings, self.train_iters = settings, train_iters
        self.folder = None if folder is None else folder / "anomalies"
        self.last_good = replace(state)
        self.report: Path | None = None

    def accepts(self, metrics: StepMetrics) -> bool:
        """Return True if the step may update the weights; the same on every rank."""
        state = self.state
        if self._fault(metrics) is not None:
            if state.skipped_in_a_row == 0:
                self.last_good = replace(state)
            state.num_skipped += 1
            state.skipped_in_a_row += 1
            return False
        state.skipped_in_a_row = 0
        if self.config.spike_factor:
            # A new list: `last_good` keeps the old one.
            state.recent_losses = [*state.recent_losses, metrics.loss][-SPIKE_WINDOW:]
        return True

    def gives_up(self) -> bool:
        """Return True if more steps in a row were skipped than max_consecutive_skips allows."""
        return self.state.skipped_in_a_row > self.config.max_consecutive_skips

    def error(self, *, unsaved: str | None = None) -> RunError:
        """Error that ends the run after too many skipped steps.

        Args:
            unsaved: reason why the last good state could not be saved; None: it was.
        """
        limit = self.config.max_consecutive_skips
        kept = f"; {unsaved}; the same command goes on from the latest one" if unsaved else ""
        where = f"; see {self.report} and run croc replay on it" if self.report else ""
        return RunError(
            f"{self.state.skipped_in_a_row} steps in a row had to be skipped, the last is "
            f"{self.state.iteration}; max_consecutive_skips={limit}{where}{kept}; fix the cause, "
            "or raise the setting to go past these samples"
        )

    def _fault(self, metrics: StepMetrics) -> str | None:
        """Description of the anomaly of a step; None for a normal step."""
        for name, value in (("loss", metrics.loss), ("gradient norm", metrics.grad_norm)):
            if value is not None and not math.isfinite(value):
                return f"{name} is {value}"
        factor, recent = self.config.spike_factor, self.state.recent_losses
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
        """Find the ranks and samples that caused a refused step, and write the report.

        Every rank must call it, while the gradients are still in their buffers.
        """
        own = self._examine_rank(batches, totals, chunks)
        ranks: list[Any] = [None] * world_size()
        dist.all_gather_object(ranks, own)
        suspects = [entry for entry in ranks if not _is_finite(entry)]
        # A spike is finite on all ranks: then the losses of all replicas are reported.
        suspects = suspects or [entry for entry in ranks if entry["has_losses"]]
        # Ranks with bad weights first, then those with a bad loss.
        suspects.sort(
            key=lambda entry: (not entry["bad_weights"], not any(_bad_micro_batches(entry)))
        )
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
            "run": dict(self.settings),
        }
        if self.folder is not None:
            self.report = self.folder / f"iter_{iteration:07d}.json"
        if rank() == 0:
            if self.report is not None:
                _write(self.report, report)
            described = "; ".join(_describe(entry) for entry in suspects[:2])
            logger.warning(
                "step %d is skipped on all ranks (%s): %s; report: %s",
                iteration,
                reason,
                described,
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
            "bad_weights": bad_weights(chunks),
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


def bad_weights(chunks: list[nn.Module]) -> list[str]:
    """Names of this rank's first weights that are not finite, at most three."""
    bad = (
        name.removeprefix("module.")
        for chunk in chunks
        for name, weight in chunk.named_parameters()
        if not torch.isfinite(weight.detach().float().sum())
        and not torch.isfinite(weight.detach()).all()
    )
    return list(itertools.islice(bad, 3))


def local_gradients_are_finite(chunks: list[nn.Module], dp_cp: dist.ProcessGroup) -> bool:
    """Return True if the gradients that this rank computed are finite.

    Called after the sum over replicas. The distributed optimizer sums each rank's shard in place;
    the rest of the buffer still holds this rank's own gradients, and only those are checked.
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
    """Micro-batches whose loss is not finite."""
    for micro_batch in entry["micro_batches"]:
        if any(isinstance(micro_batch.get(name), str) for name in ("text", "reconstruction")):
            yield micro_batch


def _is_finite(entry: dict[str, Any]) -> bool:
    finite = entry["gradients_are_finite"] and not entry["bad_weights"]
    return finite and not any(_bad_micro_batches(entry))


def _describe(entry: dict[str, Any]) -> str:
    """Text such as "rank 1: loss of micro-batch 3 (samples a, b)"."""
    if entry["bad_weights"]:
        names = ", ".join(entry["bad_weights"])
        return f"rank {entry['rank']}: its weights themselves are not finite ({names}, ...)"
    bad = list(_bad_micro_batches(entry))
    what = "loss" if bad else ("losses" if entry["gradients_are_finite"] else "gradient")
    shown = [
        f"micro-batch {m['number']} (samples {', '.join(m['sample_ids'])})"
        for m in bad or entry["micro_batches"]
    ]
    more = f" and {len(shown) - 2} more" if len(shown) > 2 else ""
    return f"rank {entry['rank']}: {what} of {', '.join(shown[:2])}{more}"


def _plain(value: float | None) -> float | str | None:
    """Convert a number for JSON: nan and inf become the strings "nan" and "inf"."""
    return value if value is None or math.isfinite(value) else str(value)


def _write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
