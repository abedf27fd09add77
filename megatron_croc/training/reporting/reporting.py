"""Output of metrics to console, metrics.jsonl, TensorBoard, W&B and Prometheus, by rank 0."""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_croc.best_effort import AppendedLines, BestEffort
from megatron_croc.config.logging import LoggingConfig
from megatron_croc.config.model import CrocModelConfig
from megatron_croc.log import get_logger, log_on_rank_zero, rank
from megatron_croc.ops.assignment import optimality_gap
from megatron_croc.parallel.device import device_name
from megatron_croc.training.reporting.console import console_lines
from megatron_croc.training.reporting.metrics import StepMetrics, entropy, usage
from megatron_croc.training.reporting.metrics_log import METRICS_FILE, drop_undone_steps
from megatron_croc.training.reporting.prometheus import Endpoint, open_endpoint
from megatron_croc.training.reporting.stragglers import (
    STRAGGLERS_FILE,
    find_stragglers,
    stragglers_line,
)
from megatron_croc.training.reporting.tensorboard import TensorBoard
from megatron_croc.training.reporting.time_split import IntervalTimes, TimeSplit
from megatron_croc.training.reporting.weights_and_biases import open_wandb

logger = get_logger(__name__)

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "B200": 2250e12, "A100": 312e12}
"""Dense bf16 operations per second of one device, from NVIDIA's data sheets."""

COLLAPSED = 1.25
"""Threshold of the collapse warning: pool tokens used in an interval over tokens replaced in one
image. Near 1, all images share almost all of their pool tokens."""


def peak_flops(name: str) -> float | None:
    """Peak operations per second of a device; None when unknown (no MFU is reported then)."""
    return next((peak for model, peak in PEAK_FLOPS.items() if model in name), None)


class Reporter:
    """Writer of metrics: one line per interval. Ranks other than 0 write nothing."""

    def __init__(
        self,
        config: LoggingConfig,
        model: CrocModelConfig,
        *,
        folder: Path | None,
        settings: Mapping[str, Any],
        positions_per_step: int | None,
        train_iters: int,
        world_size: int,
        resumed_at: int | None = None,
        times: TimeSplit | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Open the writers that `config` asks for.

        Args:
            config: intervals and writers.
            model: sizes of the prompt pool.
            folder: folder of metrics.jsonl and TensorBoard events; None: neither is written.
            settings: all settings of the run, for W&B.
            positions_per_step: positions of all packs of one step, padding included; None without
                packing.
            train_iters: optimizer steps of the whole run.
            world_size: processes of the run.
            resumed_at: steps done at the start, whose later lines are moved out of metrics.jsonl;
                None: no lines are moved.
            times: time by region, read once per interval; None: not measured.
            clock: seconds from any origin.
        """
        self.config, self.model, self.positions_per_step = config, model, positions_per_step
        self.train_iters, self.world_size, self.times = train_iters, world_size, times
        self.interval: list[StepMetrics] = []
        self.waited = 0.0
        self.warned_of_collapse = False
        self.clock = clock
        self.started = clock()
        self.peak = peak_flops(device_name())
        self.is_writer = rank() == 0
        self.jsonl: AppendedLines | None = None
        self.stragglers: AppendedLines | None = None
        self.tensorboard: TensorBoard | None = None
        self.wandb = None
        self._wandb_effort = BestEffort("W&B", errors=(Exception,))
        self.folder = folder if self.is_writer else None
        self.endpoint: Endpoint | None = None
        if not self.is_writer:
            return
        self.endpoint = open_endpoint(config.prometheus_port)
        if self.folder is not None:
            with BestEffort(str(self.folder)):
                self.folder.mkdir(parents=True, exist_ok=True)
            undone = partial(drop_undone_steps, self.folder, resumed_at or 0)
            prepare = None if resumed_at is None else undone
            self.jsonl = AppendedLines(self.folder / METRICS_FILE, prepare=prepare)
            self.stragglers = AppendedLines(self.folder / STRAGGLERS_FILE)
            self.tensorboard = TensorBoard(self.folder) if config.tensorboard else None
        self.wandb = open_wandb(config, settings, self.folder)

    def add_step(
        self,
        iteration: int,
        metrics: StepMetrics,
        *,
        waited: float,
        progress: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Add one training step; every log_interval steps a line with mean losses is written.

        Args:
            iteration: steps done.
            metrics: metrics of this step.
            waited: seconds this step waited for data.
            progress: counters after this step, written unchanged.
        """
        self.interval.append(replace(metrics, matching_sample=None))  # some MB a step
        self.waited += waited
        self._count(metrics)
        if self.times is not None:
            self.times.end_step()
        if iteration % self.config.log_interval and iteration != self.train_iters:
            return
        now = self.clock()
        elapsed, self.started = now - self.started, now
        row = self._summary(iteration, elapsed) | dict(progress)
        if self.times is not None:
            times = self.times.read(num_steps=len(self.interval))
            row |= times.row()
            self._compare_ranks(iteration, times, self.times)
        if self.is_writer:  # rank 0 matches an image in every step that has one
            row |= self._matching(metrics, elapsed)
        self._write(iteration, row)
        self.interval, self.waited = [], 0.0

    def add_validation(self, iteration: int, metrics: StepMetrics) -> None:
        """Write the line of one validation."""
        row = {
            "iteration": iteration,
            "valid_loss": metrics.loss,
            "valid_text_loss": metrics.text_loss,
            "valid_reconstruction_loss": metrics.reconstruction_loss,
        }
        if metrics.num_answers and metrics.num_answers_right is not None:
            row["valid_answers_right"] = metrics.num_answers_right / metrics.num_answers
            row["valid_num_answers"] = metrics.num_answers
        self._write(iteration, row)

    def add_task_metrics(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Write the line of one evaluation of local tasks: `eval/TASK/METRIC`."""
        self._write(iteration, {"iteration": iteration, **metrics})

    def restart_clock(self) -> None:
        """Leave the time of a validation or a save out of the throughput."""
        self.started = self.clock()

    def _summary(self, iteration: int, elapsed: float) -> dict[str, Any]:
        steps = [step for step in self.interval if not step.is_skipped]
        num_skipped = len(self.interval) - len(steps)
        steps = steps or self.interval
        last = steps[-1]
        total = {name: sum(getattr(s, name) for s in steps) for name in ("num_tokens", "flops")}
        samples = sum(s.num_samples for s in steps)
        lost = sum(s.num_labels_lost for s in steps)
        row = {
            "iteration": iteration,
            "loss": _mean(steps, "loss"),
            "text_loss": _mean(steps, "text_loss"),
            "reconstruction_loss": _mean(steps, "reconstruction_loss"),
            "grad_norm": last.grad_norm,
            "matched_distance": last.matched_distance,
            "skipped_steps": num_skipped or None,
            "cut_samples": sum(s.num_cut_samples for s in steps) or None,
            "labels_cut": lost / (lost + sum(s.num_labels for s in steps)) if lost else None,
            "seconds_per_step": elapsed / len(self.interval),
            "samples_per_second": samples / elapsed,
            "tokens_per_second": total["num_tokens"] / elapsed,
            "world_size": self.world_size,
            "train_iters": self.train_iters,
            "tflops_per_device": total["flops"] / elapsed / self.world_size / 1e12,
            "data_wait_share": self.waited / elapsed,
            "imbalance_predicted": _mean(steps, "imbalance_predicted"),
            **{f"lr/{part}": rate for part, rate in last.learning_rates.items()},
        }
        if self.positions_per_step is not None:
            row["packing_fill"] = total["num_tokens"] / (len(steps) * self.positions_per_step)
        if self.peak is not None:
            row["mfu"] = total["flops"] / elapsed / self.world_size / self.peak
        return row

    def _count(self, metrics: StepMetrics) -> None:
        """Add a step to the counters of the endpoint."""
        if self.endpoint is not None:
            trained = not metrics.is_skipped
            self.endpoint.count(
                samples=metrics.num_samples * trained,
                tokens=metrics.num_tokens * trained,
                skipped_steps=float(metrics.is_skipped),
            )

    def _compare_ranks(self, iteration: int, times: IntervalTimes, split: TimeSplit) -> None:
        """Write the times of all ranks, and warn about slow ranks."""
        if not (self.is_writer and self.config.log_straggler and self.world_size > 1):
            return
        percent, by_rank = self.config.straggler_percent, times.rank_times()
        slow = find_stragglers(by_rank, split.places, percent=percent)
        if self.stragglers is not None:
            self.stragglers.write(stragglers_line(iteration, by_rank, slow))
        if slow:
            more = f" and {len(slow) - 4} more, see {STRAGGLERS_FILE}" if len(slow) > 4 else ""
            logger.warning(f"stragglers: {'; '.join(map(str, slow[:4]))}{more}")

    def _matching(self, metrics: StepMetrics, elapsed: float) -> dict[str, Any]:
        """Cost, quality and spread of the matching of the interval; warns once after a collapse."""
        steps = [step for step in self.interval if step.pool_counts is not None]
        if not steps:
            return {}
        by_step = [step.pool_counts for step in steps if step.pool_counts is not None]
        counts = [sum(row) for row in zip(*by_step, strict=True)]
        self._warn_of_collapse(counts)
        row: dict[str, Any] = {"pool_usage": usage(counts), "pool_entropy": entropy(counts)}
        seconds = [step.matching_seconds or 0.0 for step in steps]
        row["matching_seconds_per_step"] = sum(seconds) / len(self.interval)
        row["matching_share"] = sum(seconds) / elapsed
        hidden = [step.matching_hidden_seconds or 0.0 for step in steps]
        row["hidden_matching_seconds_per_step"] = sum(hidden) / len(self.interval)
        row["hidden_matching_share"] = sum(hidden) / elapsed
        sample = metrics.matching_sample
        if sample is not None and self.model.prompt_pool.assign_mode == "hungarian":
            row["matching_gap"] = optimality_gap(*sample)
        return row

    def _warn_of_collapse(self, counts: list[int]) -> None:
        pool, num_replaced = self.model.prompt_pool, self.model.num_replaced_tokens
        num_images = sum(counts) // num_replaced
        num_used = sum(count > 0 for count in counts)
        few = COLLAPSED * num_replaced
        if self.warned_of_collapse or num_images < 8 or num_used > few or pool.pool_size <= few:
            return
        self.warned_of_collapse = True
        if pool.pool_init != "unit":
            remedy = "start the stage with --pool-init unit"
        elif pool.assign_mode != "hungarian":
            remedy = "start the stage with --assign-mode hungarian"
        else:
            remedy = "a smaller --pool-size would do"
        logger.warning(
            f"{num_images} images used {num_used} of {pool.pool_size} pool tokens, hardly more "
            f"than the {num_replaced} tokens replaced in each; the others are not trained: {remedy}"
        )

    def _write(self, iteration: int, row: dict[str, Any]) -> None:
        if not self.is_writer:
            return
        row = {name: value for name, value in row.items() if _is_number(value)}
        for level, line in console_lines(row, self.train_iters, wide=self.config.log_wide):
            log_on_rank_zero(logger, level, line)
        if self.jsonl is not None:
            self.jsonl.write(json.dumps(row))
        scalars = {name: value for name, value in row.items() if name != "iteration"}
        if self.endpoint is not None:
            self.endpoint.set({"iteration": iteration, **scalars})
        if self.tensorboard is not None:
            self.tensorboard.write(scalars, iteration)
        if self.wandb is not None:
            with self._wandb_effort:
                self.wandb.log(scalars, step=iteration)

    def sync(self) -> None:
        """Flush metrics.jsonl to disk, before a checkpoint counts its steps as done."""
        if self.jsonl is not None:
            self.jsonl.sync()

    def close(self) -> None:
        """Flush and close all writers."""
        if self.times is not None:
            self.times.close()
        if self.endpoint is not None:
            self.endpoint.close()
        for lines in (self.jsonl, self.stragglers):
            if lines is not None:
                lines.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            with self._wandb_effort:
                self.wandb.finish()


def _is_number(value: float | None) -> bool:
    """True unless a value is missing, or nan because every step of the interval was skipped."""
    return value is not None and math.isfinite(value)


def _mean(steps: list[StepMetrics], name: str) -> float | None:
    values = [value for step in steps if (value := getattr(step, name)) is not None]
    return sum(values) / len(values) if values else None
