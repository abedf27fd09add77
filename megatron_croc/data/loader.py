"""Micro-batches of one data-parallel rank, built ahead of training by a few threads.

    global batch g    order[start + g * GBS : start + (g + 1) * GBS]
      micro-batch m     | MBS samples of rank 0 | MBS samples of rank 1 | ...
                              |
    positions --thread pool (bounded, in order)--> Batch --> next(loader)

Which samples make up a global batch depends on the position in the run alone; the number of ranks
and threads only decides who builds which part. State is one number, the consumed samples.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as WaitTimeoutError

from megatron_croc.config.run import RunConfig
from megatron_croc.data.bad_samples import BadSampleBudget, BadSampleError
from megatron_croc.data.batch import Batch
from megatron_croc.data.batch_builder import BatchBuilder, row_multiple
from megatron_croc.errors import ConfigError, DataError

STALL_SECONDS = 600.0
"""Longest wait for one micro-batch before the loader gives up on a hanging file system."""

Built = tuple[Batch, list[BadSampleError]]


class MicroBatchLoader(Iterator[Batch]):
    """Endless stream of this rank's micro-batches. Close it, or use it in a `with` statement."""

    def __init__(
        self,
        *,
        run: RunConfig,
        data_path: Sequence[str],
        dp_rank: int,
        dp_size: int,
        consumed_samples: int,
        pad_to_multiple_of: int,
        seed: int,
        shuffle: bool,
    ) -> None:
        """Open the data and start building.

        Args:
            run: batch sizes, data, model sizes.
            data_path: folders of shards.
            dp_rank: this rank among the copies of the model.
            dp_size: copies of the model.
            consumed_samples: samples of the run used up so far, over all ranks; where to go on.
            pad_to_multiple_of: rows are padded to a multiple of it.
            seed: of the order and of the replaced sets.
            shuffle: a new order every epoch; False: as stored.

        Raises:
            ConfigError: the global batch does not divide among ranks and micro-batches.
            DataError: data or tokenizer missing, damaged or unfit for the model.
        """
        self._micro = run.training.micro_batch_size
        self._global = run.training.global_batch_size
        if not 0 <= dp_rank < dp_size:
            raise ConfigError(f"dp_rank = {dp_rank} is not below dp_size = {dp_size}")
        if self._global % (self._micro * dp_size):
            raise ConfigError(
                f"global_batch_size = {self._global} is not a multiple of micro_batch_size * "
                f"data parallel size = {self._micro} * {dp_size}: change one of them"
            )
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._start = consumed_samples
        self._builder = BatchBuilder(
            run=run,
            data_path=data_path,
            seed=seed,
            shuffle=shuffle,
            pad_to_multiple_of=pad_to_multiple_of,
        )
        self._budget = BadSampleBudget(run.data.max_bad_fraction)
        self._next = 0  # the next micro-batch to be started
        self._pending: deque[tuple[int, Future[Built]]] = deque()
        self._depth = run.data.num_workers * run.data.prefetch_factor
        self._pool = (
            ThreadPoolExecutor(run.data.num_workers, thread_name_prefix="loader")
            if self._depth
            else None
        )
        self._closed = False
        self._refill()

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return self._builder.num_samples

    @property
    def bad_counts(self) -> dict[str, int]:
        """Bad samples met by this rank since it was started, by kind."""
        return dict(self._budget.counts)

    def positions(self, number: int) -> range:
        """Positions in the run of this rank's micro-batch `number`, counted from the start."""
        batch, micro_batch = divmod(number, self._global // (self._micro * self._dp_size))
        first = (
            self._start
            + batch * self._global
            + (micro_batch * self._dp_size + self._dp_rank) * self._micro
        )
        return range(first, first + self._micro)

    def __next__(self) -> Batch:
        """The next micro-batch.

        Raises:
            DataError: too many bad samples, a damaged shard, or nothing came for a long time.
            OSError: the file system failed again and again.
        """
        if self._closed:
            raise RuntimeError("the loader is closed")
        try:
            batch, bad = self._take()
            self._budget.record(len(batch.sample_ids), bad)
        except BaseException:
            self.close(wait=False)  # a thread that hangs must not keep the error back
            raise
        return batch

    def _take(self) -> Built:
        if self._pool is None:
            self._next += 1
            return self._builder.build(self.positions(self._next - 1))
        number, future = self._pending.popleft()
        try:
            built = future.result(timeout=STALL_SECONDS)
        except WaitTimeoutError as error:
            if future.done():  # the thread's own error (an OSError too), not our patience
                raise
            positions = self.positions(number)
            raise DataError(
                f"samples at positions {positions.start} to {positions.stop - 1} of the run were "
                f"not ready after {STALL_SECONDS:.0f} s: look at the storage of data_path"
            ) from error
        self._refill()
        return built

    def _refill(self) -> None:
        """Keep the threads busy, but no further ahead than prefetch_factor allows."""
        while self._pool is not None and len(self._pending) < self._depth:
            future = self._pool.submit(self._builder.build, self.positions(self._next))
            self._pending.append((self._next, future))
            self._next += 1

    def close(self, *, wait: bool = True) -> None:
        """Stop the threads; what they had ready is dropped. Closing twice does no harm."""
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=wait, cancel_futures=True)
        self._pending.clear()

    def __enter__(self) -> "MicroBatchLoader":
        """The loader itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


def check_data(run: RunConfig) -> None:
    """Open everything a run will read, before anything expensive is built.

    Raises:
        DataError: data or tokenizer missing, damaged or unfit for the model.
    """
    folders = [run.data.data_path]
    if run.training.eval_interval:
        folders.append(run.data.valid_data_path)
        if run.data.eval_answers_data_path:
            folders.append(run.data.eval_answers_data_path)
    for data_path in folders:
        BatchBuilder(
            run=run,
            data_path=data_path,
            seed=run.training.seed,
            shuffle=False,
            pad_to_multiple_of=row_multiple(run),
        )


def build_train_loader(
    run: RunConfig, *, dp_rank: int, dp_size: int, consumed_samples: int
) -> MicroBatchLoader:
    """The training stream of one data-parallel rank, from the sample after the consumed ones."""
    return MicroBatchLoader(
        run=run,
        data_path=run.data.data_path,
        dp_rank=dp_rank,
        dp_size=dp_size,
        consumed_samples=consumed_samples,
        pad_to_multiple_of=row_multiple(run),
        seed=run.training.seed,
        shuffle=True,
    )


def build_valid_loader(run: RunConfig, *, dp_rank: int, dp_size: int) -> MicroBatchLoader:
    """The validation stream: always from its first sample, in stored order, so it never changes."""
    return MicroBatchLoader(
        run=run,
        data_path=run.data.valid_data_path,
        dp_rank=dp_rank,
        dp_size=dp_size,
        consumed_samples=0,
        pad_to_multiple_of=row_multiple(run),
        seed=run.training.seed,
        shuffle=False,
    )
