"""Saving of checkpoints: a half-written checkpoint can never be mistaken for a complete one.

    stage     iter_0000100.incomplete/: every rank writes its files and reads them back
    agree     every rank reports to rank 0; one failure fails the checkpoint on all ranks
    finish    rank 0: index, state, settings, manifest.json (digests of all files), fsync
    publish   rename to iter_0000100/, then write latest_checkpointed_iteration.txt atomically
    prune     rename, then delete older checkpoints that need not be kept; not while steps are skipped

A failed save is logged and training continues; the previous checkpoint stays the latest. A save
fails if a value is not finite. A whole checkpoint is never replaced (publishing.py).
"""

import io
import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_croc.atomic_files import make_directory, write_atomically
from megatron_croc.checkpoint.choosing import agreed_damage
from megatron_croc.checkpoint.manifest import write_manifest
from megatron_croc.checkpoint.publishing import publish, sweep
from megatron_croc.checkpoint.retention import STAGED, prune
from megatron_croc.checkpoint.run_folder import resumes_in_place
from megatron_croc.checkpoint.safe_reading import COMMON_FILE
from megatron_croc.checkpoint.sharded import checkpoint_content
from megatron_croc.checkpoint.state import LATEST_FILE, TrainState, iteration_folder
from megatron_croc.checkpoint.writer import BACKENDS, BACKENDS_FILE, Share, Written, reason
from megatron_croc.config.checkpoint import CheckpointConfig
from megatron_croc.errors import CheckpointError
from megatron_croc.log import get_logger, log_on_rank_zero, rank, world_size
from megatron_croc.parallel.device import current_device
from megatron_croc.parallel.stopwatch import region

logger = get_logger(__name__)


class CheckpointSaver:
    """Writer of a run's checkpoints. Every rank calls every method at the same step.

    With `async_save`, `save` returns once the state is copied to host memory. `poll` publishes the
    checkpoint at a later step, when all ranks have written their files. They find out by an
    all-reduce that one step starts and the next step reads, so no rank waits for another's disk.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        chunks: Sequence[nn.Module],
        optimizer: MegatronOptimizer,
        pg_collection: ProcessGroupCollection,
        *,
        settings: str,
        resumed_at: int = 0,
    ) -> None:
        """Delete incomplete checkpoints that a killed run left in the folder.

        Args:
            config: folder and retention; nothing is saved if `save` is None.
            chunks: this rank's model chunks, wrapped in DistributedDataParallel.
            optimizer: distributed optimizer.
            pg_collection: process groups.
            settings: all settings of the run as YAML, written to run.yaml in each checkpoint.
            resumed_at: iteration of the checkpoint that the run resumed from; 0: a new run.
        """
        self.config, self.settings = config, settings
        self.chunks = chunks
        self.optimizer = optimizer
        self.pg_collection = pg_collection
        self.root = Path(config.save) if config.save else None
        self._pending: _Pending | None = None
        self._gone: list[Path] = []
        self._deleting: list[threading.Thread] = []
        self._failure: str | None = None
        self._own = {resumed_at} if resumes_in_place(config) else set[int]()
        clear_leftovers(config)

    @region("checkpoint", whole=True)
    def save(self, state: TrainState) -> None:
        """Save the current state; a pending save is finished first.

        A failed save is logged, and training continues.
        """
        if self.root is None:
            return
        self.finish()
        final = iteration_folder(self.root, state.iteration)
        if state.iteration in self._own and not agreed_damage(final):
            self._failure = None
            log_on_rank_zero(logger, logging.INFO, "%s holds this state already", final)
            return
        staged = final.with_name(final.name + STAGED)
        if error := _on_rank_zero(lambda: _make_empty(staged)):
            self._failed(final, error)
            return
        is_async = self.config.async_save
        with _weights_of_this_step(self.chunks):
            content = checkpoint_content(self.chunks, self.optimizer, self.pg_collection)
            share = Share(content, staged, live=self._live() if is_async else None)
        self._pending = _Pending(share, replace(state), staged, final)
        if not is_async:
            self.finish()

    def poll(self) -> None:
        """Publish the pending checkpoint if all ranks have written it. Call it every step."""
        if self._pending is not None and self._pending.is_written_everywhere():
            self.finish()

    @region("checkpoint", whole=True)
    def finish(self) -> None:
        """Wait for the pending save, if there is one, and publish it."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        written = pending.wait()
        everyone: list[Written] | None = [None] * world_size() if rank() == 0 else None  # type: ignore[list-item]
        dist.gather_object(written, everyone)
        if error := _on_rank_zero(lambda: self._publish(pending, everyone or [])):
            if rank() == 0:
                shutil.rmtree(pending.staged, ignore_errors=True)  # free the space on a full disk
            self._failed(pending.final, error)
            return
        self._failure = None
        self._own.add(pending.state.iteration)
        log_on_rank_zero(logger, logging.INFO, "saved %s", pending.final)
        if rank() == 0:
            # In a streak of skipped steps, nobody knows yet which checkpoint is the last good one.
            self._remove_old(pending.final, prunes=pending.state.skipped_in_a_row == 0)

    def close(self) -> None:
        """Finish the pending save and all deletions.

        Raises:
            CheckpointError: the last save failed, so no checkpoint holds the newest state.
        """
        if (failure := self.close_quietly()) is not None:
            raise CheckpointError(failure)

    def close_quietly(self) -> str | None:
        """Finish as `close` does; return the reason why the last save failed, or None."""
        self.finish()
        for thread in self._deleting:
            thread.join()
        self._deleting = []
        return self._failure

    def _failed(self, final: Path, error: str) -> None:
        self._failure = f"{final} could not be saved: {error}"
        message = "%s; training goes on, and the latest checkpoint is unchanged"
        log_on_rank_zero(logger, logging.ERROR, message, self._failure)

    def _live(self) -> list[Tensor]:
        """Tensors that the next step changes in place."""
        tensors: list[Tensor] = []
        for chunk in self.chunks:
            tensors += [*chunk.parameters(), *nn.Module.buffers(chunk)]  # DDP has its own `buffers`
        for optimizer in self.optimizer.chained_optimizers:  # type: ignore[attr-defined]
            for group in optimizer.param_groups:
                tensors += group["params"]
            for state in optimizer.optimizer.state.values():
                tensors += [value for value in state.values() if isinstance(value, Tensor)]
        return tensors

    def _publish(self, pending: "_Pending", everyone: list[Written]) -> None:
        """On rank 0: complete the folder, rename it, and name it in the tracker file."""
        errors = [f"rank {n}: {w.error}" for n, w in enumerate(everyone) if w.error]
        if errors:
            raise CheckpointError("; ".join(errors))
        share, staged, final = pending.share, pending.staged, pending.final
        assert share.metadata is not None
        share.writer.finish(share.metadata, [w.results for w in everyone])
        common = io.BytesIO()
        torch.save(share.common, common)
        write_atomically(staged / COMMON_FILE, common.getvalue())
        write_atomically(staged / BACKENDS_FILE, json.dumps(BACKENDS).encode())
        write_atomically(staged / "run.yaml", self.settings.encode())
        pending.state.save(staged)
        digests = {name: digest for w in everyone for name, digest in w.digests.items()}
        write_manifest(staged, digests)
        self._gone += publish(staged, final)
        write_atomically(final.parent / LATEST_FILE, f"{pending.state.iteration}\n".encode())

    def _remove_old(self, latest: Path, *, prunes: bool) -> None:
        """On rank 0: rename superfluous checkpoints now, delete them in a thread."""
        config = self.config
        if prunes:
            self._gone += prune(latest, keep_last=config.keep_last, keep_every=config.keep_every)
        thread = threading.Thread(target=_delete, args=(self._gone,), daemon=True)
        self._gone = []
        thread.start()
        self._deleting = [t for t in self._deleting if t.is_alive()] + [thread]


class _Pending:
    """Checkpoint that is being written."""

    def __init__(self, share: Share, state: TrainState, staged: Path, final: Path) -> None:
        self.share = share
        self.state = state
        self.staged = staged
        self.final = final
        self._thread = threading.Thread(target=share.write, daemon=True)
        self._thread.start()
        self._all_written: tuple[dist.Work, Tensor] | None = None

    def wait(self) -> Written:
        """Wait for this rank's writer; return its result."""
        self._thread.join()
        if self._all_written is not None:
            self._all_written[0].wait()  # all ranks have started it, so it ends
        assert self.share.written is not None
        return self.share.written

    def is_written_everywhere(self) -> bool:
        """Return True if all ranks had written at the previous call; the same on every rank."""
        if self._all_written is not None:
            work, answer = self._all_written
            work.wait()
            if answer.item() == 1:
                return True
        done = self.share.written is not None
        answer = torch.tensor([int(done)], device=current_device())
        work = dist.all_reduce(answer, op=dist.ReduceOp.MIN, async_op=True)
        assert work is not None
        self._all_written = (work, answer)  # type: ignore[assignment]
        return False


@contextmanager
def _weights_of_this_step(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Gather all weights first; overlap_param_gather leaves some at the previous step."""
    overlapped = [chunk for chunk in chunks if chunk.ddp_config.overlap_param_gather]  # type: ignore[union-attr]
    for chunk in overlapped:
        chunk.disable_forward_pre_hook(param_sync=True)  # type: ignore[operator]
    yield
    for chunk in overlapped:
        chunk.enable_forward_pre_hook()  # type: ignore[operator]


def _on_rank_zero(action: Callable[[], None]) -> str | None:
    """Run `action` on rank 0; return the reason of its failure on every rank, or None."""
    outcome: list[str | None] = [None]
    if rank() == 0:
        try:
            action()
        except Exception as error:
            outcome = [reason(error)]
    dist.broadcast_object_list(outcome, src=0)
    return outcome[0]


def clear_leftovers(config: CheckpointConfig) -> None:
    """On rank 0: delete what killed runs left in `save`; a start does it before it writes."""
    if config.save is not None and rank() == 0:
        sweep(Path(config.save))


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    make_directory(folder)


def _delete(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
