"""Micro-batches of one data-parallel rank, built ahead of training by a few threads.

    global batch      the next GBS packs of the plan (each of one sample, or of several)
      micro-batch m     | MBS packs of rank 0 | MBS packs of rank 1 | ...  in order, or by cost
                              |
    packs --thread pool (bounded, in order)--> Batch, one pack --> next(loader)

The plan and its state alone determine the packs of a global batch. The number of ranks and threads
only determines which rank and thread builds each part. Balanced plans give a cost to each pack, by
which every rank deals them alike.
"""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as WaitTimeoutError
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from megatron_croc.config.data import DataConfig
from megatron_croc.config.run import RunConfig
from megatron_croc.config.training import TrainingConfig
from megatron_croc.costs.samples import SampleCost
from megatron_croc.data.bad_samples import BadSampleBudget, BadSampleError
from megatron_croc.data.batch import Batch
from megatron_croc.data.batch_builder import BatchBuilder, build_batch_builder
from megatron_croc.data.order.balance import deal_micro_batches
from megatron_croc.data.order.row_plan import (
    OrderState,
    Pack,
    RowPlan,
    RowStream,
    Slot,
    build_row_plan,
    build_stored_order_plan,
)
from megatron_croc.data.sample.tokenization import build_tokenizer
from megatron_croc.data.sample.tokenizer_check import announce_tokenizer
from megatron_croc.errors import ConfigError, DataError
from megatron_croc.log import get_logger, log_on_rank_zero, rank

STALL_SECONDS = 600.0
"""Longest wait for one micro-batch; then the file system is taken to hang."""

logger = get_logger(__name__)

Built = tuple[Batch, list[BadSampleError]]


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One micro-batch to build."""

    slots: list[Slot]
    """Samples of the micro-batch."""

    state_after: OrderState | None
    """State of the order after the global batch; None except for its last micro-batch."""


def packs_of_replica(
    packs: Sequence[Pack], step: int, *, dp_rank: int, dp_size: int, micro_batch_size: int
) -> np.ndarray:
    """Numbers of a replica's packs in a global batch, int64 [micro-batches, MBS].

    Every rank computes the shares of all of them from the same costs; nothing is exchanged.

    Args:
        packs: the global batch.
        step: its number.
        dp_rank: the replica.
        dp_size: number of replicas.
        micro_batch_size: MBS, packs of a micro-batch.
    """
    if packs[0][0].cost is None:
        return np.arange(len(packs)).reshape(-1, dp_size, micro_batch_size)[:, dp_rank]
    costs = [sum(slot.cost or 0.0 for slot in pack) for pack in packs]
    return deal_micro_batches(
        np.array(costs),
        dp_rank=dp_rank,
        dp_size=dp_size,
        micro_batch_size=micro_batch_size,
        turn=step,
    )


class MicroBatchLoader(Iterator[Batch]):
    """Endless iterator over this rank's micro-batches. Close it, or use a `with` statement."""

    def __init__(
        self,
        *,
        builder: BatchBuilder,
        plan: RowPlan,
        data: DataConfig,
        training: TrainingConfig,
        state: OrderState | None,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        """Start to build micro-batches in the threads.

        Args:
            builder: makes batches from slots of the plan's folders.
            plan: packs of the run and the folders of their samples.
            data: threads, prefetching and the limit on bad samples.
            training: micro-batch size and global batch size.
            state: position to continue from; None: the start.
            dp_rank: this rank among the replicas.
            dp_size: number of replicas.

        Raises:
            ConfigError: the global batch does not divide among ranks and micro-batches.
            DataError: the state belongs to another order.
        """
        self._micro = training.micro_batch_size
        self._global = training.global_batch_size
        if not 0 <= dp_rank < dp_size:
            raise ConfigError(f"dp_rank = {dp_rank} is not below dp_size = {dp_size}")
        if self._global % (self._micro * dp_size):
            raise ConfigError(
                f"global_batch_size = {self._global} is not a multiple of micro_batch_size * "
                f"data parallel size = {self._micro} * {dp_size}: change one of them"
            )
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._stream = RowStream(plan, state)
        self._state = self._stream.state
        self._builder = builder
        folder = data.bad_sample_report
        self._budget = BadSampleBudget(
            data.max_bad_fraction,
            report=None if folder is None else Path(folder) / f"bad_samples-{rank()}.jsonl",
        )
        self._planned: deque[_Job] = deque()
        self._pending: deque[tuple[_Job, Future[Built]]] = deque()
        # Training takes all micro-batches of a step at once, so at least as many are kept ready.
        per_step = self._global // (self._micro * dp_size)
        workers = data.num_workers
        self._depth = max(workers * data.prefetch_factor, per_step) if workers else 0
        self._pool = (
            ThreadPoolExecutor(data.num_workers, thread_name_prefix="loader")
            if self._depth
            else None
        )
        self._closed = False
        self._refill()

    @property
    def num_samples(self) -> int:
        """Number of samples in all folders."""
        return self._builder.num_samples

    @property
    def state(self) -> OrderState:
        """State of the order after the last global batch that was returned completely."""
        return self._state

    @property
    def bad_counts(self) -> dict[str, int]:
        """Number of bad samples of each kind, on this rank since its start."""
        return dict(self._budget.counts)

    def _next_job(self) -> _Job:
        """Return this rank's next micro-batch; plan another global batch when none is left."""
        if not self._planned:
            step = self._stream.num_packs // self._global
            packs = self._stream.take(self._global)
            own = packs_of_replica(
                packs,
                step,
                dp_rank=self._dp_rank,
                dp_size=self._dp_size,
                micro_batch_size=self._micro,
            )
            for number, members in enumerate(own, start=1):
                slots = list(chain.from_iterable(packs[i] for i in members))
                state_after = self._stream.state if number == len(own) else None
                self._planned.append(_Job(slots=slots, state_after=state_after))
        return self._planned.popleft()

    def __next__(self) -> Batch:
        """Return the next micro-batch.

        Raises:
            DataError: too many bad samples, a damaged shard, or no result in STALL_SECONDS.
            OSError: every attempt to read failed.
        """
        if self._closed:
            raise RuntimeError("the loader is closed")
        try:
            job, (batch, bad) = self._take()
            self._budget.record(len(batch.sample_ids), bad)
        except BaseException:
            self.close(wait=False)  # a thread that hangs must not delay the error
            raise
        self._state = job.state_after or self._state
        return batch

    def _take(self) -> tuple[_Job, Built]:
        if self._pool is None:
            job = self._next_job()
            return job, self._builder.build(job.slots)
        job, future = self._pending.popleft()
        try:
            built = future.result(timeout=STALL_SECONDS)
        except WaitTimeoutError as error:
            if future.done():  # an error of the thread, not of our wait
                raise
            numbers = ", ".join(str(slot.index) for slot in job.slots)
            raise DataError(
                f"samples number {numbers} of data_path were not ready after "
                f"{STALL_SECONDS:.0f} s: look at its storage"
            ) from error
        self._refill()
        return job, built

    def _refill(self) -> None:
        """Submit jobs until prefetch_factor micro-batches per thread are pending."""
        while self._pool is not None and len(self._pending) < self._depth:
            job = self._next_job()
            self._pending.append((job, self._pool.submit(self._builder.build, job.slots)))

    def close(self, *, wait: bool = True) -> None:
        """Stop the threads and drop finished micro-batches. May be called twice."""
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=wait, cancel_futures=True)
        self._pending.clear()

    def __enter__(self) -> "MicroBatchLoader":
        """Return the loader."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the loader."""
        self.close()


def build_train_plan(run: RunConfig) -> RowPlan:
    """Plan the packs of a run's training.

    Raises:
        DataError: data is missing, or lacks the sample lengths that packing, grouping and balancing
            need.
    """
    return build_row_plan(
        run.data,
        num_visual_tokens=run.model.vision_tower.num_visual_tokens,
        global_batch_size=run.training.global_batch_size,
        seed=run.training.seed,
        cost=SampleCost.build(run) if run.data.balance_replicas else None,
    )


def check_data(run: RunConfig) -> None:
    """Open all data of a run before anything expensive is built.

    Raises:
        DataError: data or tokenizer missing, damaged or unfit for the model.
    """
    plans = [build_train_plan(run)]
    if run.training.eval_interval:
        for data_path in filter(None, (run.data.valid_data_path, run.data.eval_answers_data_path)):
            plans.append(build_stored_order_plan(data_path, seed=run.training.seed))
    for plan in plans:
        build_batch_builder(run, plan.blend.folders)
    tokenizer = build_tokenizer(run.data.tokenizer_type, run.data.tokenizer_model)
    announce_tokenizer(tokenizer, run.data.conversation_template)


def build_train_loader(
    run: RunConfig, *, dp_rank: int, dp_size: int, state: OrderState | None
) -> MicroBatchLoader:
    """Open the training stream of one data-parallel rank, at the position of `state`."""
    replicas = run.data.balance_replicas
    if replicas is not None and dp_size > replicas:
        log_on_rank_zero(
            logger,
            logging.WARNING,
            f"balance_replicas={replicas}: steps are composed for at most {replicas} replicas; the "
            f"{dp_size} of this run will wait for each other more. A new run should set "
            f"balance_replicas to {dp_size}",
        )
    return _build_loader(run, build_train_plan(run), state, dp_rank, dp_size)


def build_valid_loader(
    run: RunConfig, *, dp_rank: int, dp_size: int, data_path: Sequence[str] = ()
) -> MicroBatchLoader:
    """Open the validation stream, or the stream of another `data_path`.

    It is always read from its first sample, in stored order.
    """
    plan = build_stored_order_plan(data_path or run.data.valid_data_path, seed=run.training.seed)
    return _build_loader(run, plan, None, dp_rank, dp_size)


def _build_loader(
    run: RunConfig, plan: RowPlan, state: OrderState | None, dp_rank: int, dp_size: int
) -> MicroBatchLoader:
    return MicroBatchLoader(
        builder=build_batch_builder(run, plan.blend.folders),
        plan=plan,
        data=run.data,
        training=run.training,
        state=state,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )
