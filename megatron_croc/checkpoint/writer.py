"""Files of a checkpoint that one rank writes: planned by all ranks together, written by each alone.

megatron-core writes them in child processes (280 MB each, orphaned when their rank is killed, and
forked with gloo's sockets open). Here megatron plans the save and its function writes the same
bytes, but in this process: directly, or in a daemon thread. megatron's results queue is replaced
for the whole process (docs/design.md, "State that belongs to the whole process").
"""

import inspect
import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from megatron_croc.checkpoint.manifest import FileDigest, digest_file
from megatron_croc.errors import CheckpointError, first_line

BACKENDS_FILE = "metadata.json"
BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""Content of the file by which megatron-core recognises its checkpoints."""


@dataclass(kw_only=True)
class Written:
    """Result of writing one rank's files; sent to rank 0."""

    results: list[WriteResult]
    digests: dict[str, FileDigest]
    error: str | None = None
    """Reason of a failure; None after success."""


class _Planning(TorchDistSaveShardedStrategy):
    """megatron's save strategy, reduced to planning: returns the plan instead of callbacks."""

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *_: Any) -> Any:
        return writer, planned[1]


class Share:
    """Files of one checkpoint that this rank writes."""

    def __init__(
        self, content: dict[str, Any], folder: Path, *, live: Sequence[Tensor] | None
    ) -> None:
        """Plan the save with all ranks, and copy this rank's tensors to host memory.

        Args:
            content: megatron's sharded state.
            folder: folder of the files; must exist when `write` is called.
            live: tensors that training changes before they are written; those on the CPU are
                copied. None: nothing changes before `write` has ended.
        """
        filesystem_async._results_queue = queue.Queue()  # type: ignore[assignment]
        sharded, self.common = save_preprocess(content)
        planning = _Planning("torch_dist", 1, thread_count=1)
        known = inspect.signature(planning.async_save).parameters
        # Since 0.17 another package's planner is the default.
        ours = {"async_strategy": "mcore"} if "async_strategy" in known else {}
        self.metadata: Metadata | None
        self.writer: FileSystemWriterAsync
        self.writer, self.metadata = planning.async_save(sharded, folder, **ours)  # type: ignore[misc]
        buckets = self.writer.write_buckets or []
        self.buckets = FileSystemWriterAsync.preload_tensors(buckets, non_blocking=True)
        if live is not None:
            self.buckets = list(_detached(self.buckets, live))
        self.written: Written | None = None

    def write(self) -> None:
        """Write this rank's files and read them back. Never raises; the result is in `written`."""
        try:
            self.written = self._write()
        except Exception as error:
            self.written = Written(results=[], digests={}, error=reason(error))
        self.buckets = []

    def _write(self) -> Written:
        written = Written(results=[], digests={})
        transforms = [self.writer.transforms] if hasattr(self.writer, "transforms") else []
        for number, bucket in enumerate(self.buckets):
            _require_finite(bucket)
            answers: queue.Queue = queue.Queue()
            FileSystemWriterAsync.write_preloaded_data(
                transforms,
                number,
                bucket,
                answers,  # type: ignore[arg-type]
                _Counter(),  # type: ignore[arg-type]
                use_fsync=True,
            )
            _, answer = answers.get_nowait()
            if isinstance(answer, Exception):
                raise answer
            written.results += answer
            path, name, _ = bucket
            written.digests[name] = digest_file(Path(path))
        return written


def _require_finite(bucket: Any) -> None:
    """Refuse NaN and infinity in weights and optimizer state, on the bytes that are written."""
    _, _, (_, tensors) = bucket
    for item, tensor in tensors:
        # The sum needs no memory; it may overflow by itself, so only the values decide.
        if tensor.is_floating_point() and not torch.isfinite(tensor.float().sum()):
            if not torch.isfinite(tensor.float()).all():
                raise CheckpointError(f"{item.index.fqn} is not finite (NaN or infinity)")


class _Counter:
    """Stub of the queue by which megatron's child processes report their end."""

    def get(self) -> None: ...

    def task_done(self) -> None: ...


def _detached(buckets: list[Any], live: Sequence[Tensor]) -> Iterator[Any]:
    """Buckets with copies of all CPU tensors that share memory with `live`."""
    storages = {t.untyped_storage().data_ptr() for t in live if t.device.type == "cpu"}

    def copy(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor

    for path, name, (objects, tensors) in buckets:
        yield path, name, (objects, [(item, copy(tensor)) for item, tensor in tensors])


def reason(error: BaseException) -> str:
    """Return the operating system's message behind an error, else the error's first line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return f"{cause.strerror or cause}"
        cause = cause.__cause__ or cause.__context__
    return first_line(error)
