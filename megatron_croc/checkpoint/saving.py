"""Write checkpoints while a run goes on: nothing half-written is ever taken for one.

    stage     iter_0000100.incomplete/: every rank writes its files and reads them back
    agree     every rank tells rank 0 what it wrote; one failure fails the checkpoint on all
    finish    rank 0: index, state, settings, manifest.json (digests of all files), fsync
    publish   rename to iter_0000100/, then latest_checkpointed_iteration.txt, each in one move
    prune     older checkpoints that need not be kept lose their name, then their content

A failed save is said in a line and training goes on; the latest checkpoint stays what it was.
"""

import io
import json
import logging
import os
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

from megatron_croc.atomic_files import sync_directory, write_atomically
from megatron_croc.checkpoint.manifest import write_manifest
from megatron_croc.checkpoint.retention import STAGED, prune, retire, sweep
from megatron_croc.checkpoint.safe_reading import COMMON_FILE
from megatron_croc.checkpoint.sharded import checkpoint_content
from megatron_croc.checkpoint.state import LATEST_FILE, TrainState, iteration_folder
from megatron_croc.checkpoint.writer import BACKENDS, BACKENDS_FILE, Share, Written, reason
from megatron_croc.config.base import to_yaml
from megatron_croc.config.run import RunConfig
from megatron_croc.errors import CheckpointError
from megatron_croc.log import get_logger, log_on_rank_zero, rank, world_size
from megatron_croc.parallel.device import current_device
from megatron_croc.parallel.stopwatch import region

logger = get_logger(__name__)


def save_checkpoint(
    run: RunConfig,
    state: TrainState,
    chunks: Sequence[nn.Module],
    optimizer: MegatronOptimizer,
    pg_collection: ProcessGroupCollection,
) -> Path:
    """Write one checkpoint, wait for it, and make it the latest; every rank must call it.

    Returns:
        the checkpoint's folder.

    Raises:
        CheckpointError: on every rank, when any rank could not write its part.
    """
    saver = CheckpointSaver(run, chunks, optimizer, pg_collection)
    saver.save(state)
    saver.close()
    assert run.checkpoint.save is not None
    return iteration_folder(Path(run.checkpoint.save), state.iteration)


class CheckpointSaver:
    """Saves a run's checkpoints. Every rank calls every method, at the same step.

    With `async_save`, `save` returns when the state is copied to host memory, and `poll` publishes
    the checkpoint at a later step, once every rank has written: the ranks learn it from an
    all-reduce that one step starts and the next picks up, so none waits for another one's disk.
    """

    def __init__(
        self,
        run: RunConfig,
        chunks: Sequence[nn.Module],
        optimizer: MegatronOptimizer,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        """Clear what a killed run left half-written or half-deleted in the run's folder.

        Without a folder (`run.checkpoint.save` is None) nothing is ever saved.
        """
        self.run = run
        self.chunks = chunks
        self.optimizer = optimizer
        self.pg_collection = pg_collection
        self.root = Path(run.checkpoint.save) if run.checkpoint.save else None
        self._pending: _Pending | None = None
        self._gone: list[Path] = []
        self._deleting: list[threading.Thread] = []
        self._failure: str | None = None
        if self.root is not None and rank() == 0:
            sweep(self.root)

    @region("checkpoint", whole=True)
    def save(self, state: TrainState) -> None:
        """Save the state as it is now; first finishes the save before it.

        A save that fails is logged, and the run goes on from memory.
        """
        if self.root is None:
            return
        self.finish()
        final = iteration_folder(self.root, state.iteration)
        staged = final.with_name(final.name + STAGED)
        if error := _on_rank_zero(lambda: _make_empty(staged)):
            self._failed(final, error)
            return
        is_async = self.run.checkpoint.async_save
        with _weights_of_this_step(self.run, self.chunks):
            content = checkpoint_content(self.chunks, self.optimizer, self.pg_collection)
            share = Share(content, staged, live=self._live() if is_async else None)
        self._pending = _Pending(share, replace(state), staged, final)
        if not is_async:
            self.finish()

    def poll(self) -> None:
        """Once a step: publish the checkpoint under way if all ranks have written theirs."""
        if self._pending is not None and self._pending.is_written_everywhere():
            self.finish()

    @region("checkpoint", whole=True)
    def finish(self) -> None:
        """Wait for the save under way, if there is one, and publish it."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        written = pending.wait()
        everyone: list[Written] | None = [None] * world_size() if rank() == 0 else None  # type: ignore[list-item]
        dist.gather_object(written, everyone)
        if error := _on_rank_zero(lambda: self._publish(pending, everyone or [])):
            if rank() == 0:
                shutil.rmtree(pending.staged, ignore_errors=True)  # a full disk needs the room
            self._failed(pending.final, error)
            return
        self._failure = None
        log_on_rank_zero(logger, logging.INFO, "saved %s", pending.final)
        if rank() == 0:
            self._prune(pending.final)

    def close(self) -> None:
        """Finish everything; the last word about what was saved.

        Raises:
            CheckpointError: the last save failed, so the newest state is in no checkpoint.
        """
        self.finish()
        for thread in self._deleting:
            thread.join()
        self._deleting = []
        if self._failure is not None:
            raise CheckpointError(self._failure)

    def _failed(self, final: Path, error: str) -> None:
        self._failure = f"{final} could not be saved: {error}"
        latest = "the latest checkpoint stays what it was"
        log_on_rank_zero(logger, logging.ERROR, "%s; training goes on, %s", self._failure, latest)

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
        """On rank 0: finish the folder, give it its name, point the tracker at it."""
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
        write_atomically(staged / "run.yaml", to_yaml(self.run).encode())
        pending.state.save(staged)
        digests = {name: digest for w in everyone for name, digest in w.digests.items()}
        write_manifest(staged, digests)
        if final.exists():
            if (away := retire(final)) is None:
                raise CheckpointError("one of that name is being read")
            self._gone.append(away)
        root = final.parent
        os.replace(staged, final)
        sync_directory(root)
        write_atomically(root / LATEST_FILE, f"{pending.state.iteration}\n".encode())
        sync_directory(root)

    def _prune(self, latest: Path) -> None:
        """On rank 0: rename now, delete in the background."""
        checkpoint = self.run.checkpoint
        self._gone += prune(
            latest, keep_last=checkpoint.keep_last, keep_every=checkpoint.keep_every
        )
        thread = threading.Thread(target=_delete, args=(self._gone,), daemon=True)
        self._gone = []
        thread.start()
        self._deleting = [t for t in self._deleting if t.is_alive()] + [thread]


class _Pending:
    """A checkpoint that is being written."""

    def __init__(self, share: Share, state: TrainState, staged: Path, final: Path) -> None:
        self.share = share
        self.state = state
        self.staged = staged
        self.final = final
        self._thread = threading.Thread(target=share.write, daemon=True)
        self._thread.start()
        self._question: tuple[dist.Work, Tensor] | None = None

    def wait(self) -> Written:
        """What this rank wrote."""
        self._thread.join()
        if self._question is not None:
            self._question[0].wait()  # started on all ranks, so it ends
        assert self.share.written is not None
        return self.share.written

    def is_written_everywhere(self) -> bool:
        """The answer to the question asked a step ago: the same on every rank."""
        if self._question is not None:
            work, answer = self._question
            work.wait()
            if answer.item() == 1:
                return True
        done = self.share.written is not None
        answer = torch.tensor([int(done)], device=current_device())
        work = dist.all_reduce(answer, op=dist.ReduceOp.MIN, async_op=True)
        assert work is not None
        self._question = (work, answer)  # type: ignore[assignment]
        return False


@contextmanager
def _weights_of_this_step(run: RunConfig, chunks: Sequence[nn.Module]) -> Iterator[None]:
    """With overlap_param_gather, weights not yet gathered are those of the step before."""
    overlapped = chunks if run.optimizer.overlap_param_gather else ()
    for chunk in overlapped:
        chunk.disable_forward_pre_hook(param_sync=True)  # type: ignore[operator]
    yield
    for chunk in overlapped:
        chunk.enable_forward_pre_hook()  # type: ignore[operator]


def _on_rank_zero(action: Callable[[], None]) -> str | None:
    """Do something on rank 0; why it failed, on every rank."""
    outcome: list[str | None] = [None]
    if rank() == 0:
        try:
            action()
        except Exception as error:
            outcome = [reason(error)]
    dist.broadcast_object_list(outcome, src=0)
    return outcome[0]


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _delete(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
