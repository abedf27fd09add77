"""One rank's share of a checkpoint: planned together, written alone.

megatron-core plans a save and writes it through child processes (280 MB each, orphaned when their
rank is killed, and forked with gloo's sockets open). Here the planning is megatron's and the same
function writes the same bytes, but in this process: at once, or in a thread that dies with it.
"""

import inspect
import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from megatron_croc.checkpoint.manifest import FileDigest, digest_file
from megatron_croc.errors import first_line

BACKENDS_FILE = "metadata.json"
BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""How megatron-core recognises its checkpoints."""


@dataclass(kw_only=True)
class Written:
    """What a rank has to say after writing; travels to rank 0."""

    results: list[WriteResult]
    digests: dict[str, FileDigest]
    error: str | None = None
    """Why the share could not be written."""


class _Planning(TorchDistSaveShardedStrategy):
    """megatron's planning, which hands out the plan instead of callbacks."""

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *_: Any) -> Any:
        return writer, planned[1]


class Share:
    """What this rank writes of one checkpoint."""

    def __init__(
        self, content: dict[str, Any], folder: Path, *, live: Sequence[Tensor] | None
    ) -> None:
        """Plan with all ranks, and bring this rank's tensors to host memory.

        Args:
            content: megatron's sharded state.
            folder: where the files go; must exist for `write`.
            live: None: write before anything changes. Otherwise the tensors that training goes on
                changing; those on the CPU are copied.
        """
        filesystem_async._results_queue = queue.Queue()  # type: ignore[assignment]
        sharded, self.common = save_preprocess(content)
        planning = _Planning("torch_dist", 1, thread_count=1)
        known = inspect.signature(planning.async_save).parameters
        # From 0.17 on the planner of another package is the default.
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
        """Write and read back this rank's files; never raises, leaves its answer in `written`."""
        try:
            self.written = self._write()
        except Exception as error:
            self.written = Written(results=[], digests={}, error=reason(error))
        self.buckets = []

    def _write(self) -> Written:
        written = Written(results=[], digests={})
        transforms = [self.writer.transforms] if hasattr(self.writer, "transforms") else []
        for number, bucket in enumerate(self.buckets):
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


class _Counter:
    """Stands in for the queue by which child processes say they are done."""

    def get(self) -> None: ...

    def task_done(self) -> None: ...


def _detached(buckets: list[Any], live: Sequence[Tensor]) -> Iterator[Any]:
    """Buckets whose tensors share no memory with `live`."""
    storages = {t.untyped_storage().data_ptr() for t in live if t.device.type == "cpu"}

    def copy(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor

    for path, name, (objects, tensors) in buckets:
        yield path, name, (objects, [(item, copy(tensor)) for item, tensor in tensors])


def reason(error: BaseException) -> str:
    """The line that says most: the operating system's, where it is behind the error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return f"{cause.strerror or cause}"
        cause = cause.__cause__ or cause.__context__
    return first_line(error)
