"""megatron-core's checkpoint writer without child processes.

For a save that the trainer waits for anyway, megatron spawns a manager process on every rank
(280 MB, orphaned when the rank is killed), and 0.16 forks one more for every file (0.19: a thread).
The same functions, called in this process with an ordinary queue, write the same bytes.
"""

import queue
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync


class _Counter:
    """Stands in for the queue by which child processes say they are done."""

    def get(self) -> None: ...

    def task_done(self) -> None: ...


def _write_in_process(
    transform_list: list, use_msc: bool, rank: int, write_buckets: list, results_queue: queue.Queue
) -> None:
    results: dict[int, Any] | Exception = {}
    for number, bucket in enumerate(write_buckets):
        answers: queue.Queue = queue.Queue()
        FileSystemWriterAsync.write_preloaded_data(
            transform_list,
            number,
            bucket,
            answers,  # type: ignore[arg-type]
            _Counter(),  # type: ignore[arg-type]
            use_fsync=True,
            use_msc=use_msc,
        )
        _, answer = answers.get_nowait()
        if isinstance(answer, Exception):
            results = answer
            break
        results[number] = answer
    results_queue.put(results)


def write_in_this_process() -> None:
    """Make megatron's synchronous saves run here; idempotent."""
    filesystem_async._results_queue = queue.Queue()  # type: ignore[assignment]
    if hasattr(FileSystemWriterAsync, "write_preloaded_data_multiproc"):
        writer: Any = FileSystemWriterAsync
        writer.write_preloaded_data_multiproc = staticmethod(_write_in_process)
